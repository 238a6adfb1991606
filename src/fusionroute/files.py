"""Files appear whole or not at all: write beside the target, then rename. Knows nothing of models."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusionroute.errors import FusionRouteError


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `target` into a one-line `FusionRouteError`."""
    try:
        yield
    except FusionRouteError:
        raise
    except Exception as error:
        parent = next(p for p in [target.absolute(), *target.absolute().parents] if p.exists())
        free = shutil.disk_usage(parent).free
        number = error.errno if isinstance(error, OSError) else None
        # torch and safetensors report a full disk in words of their own.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or free < 1 << 20:
            raise FusionRouteError(
                f"no space left to write {target} ({free / 1e6:.0f} MB free): free some and run again"
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise FusionRouteError(f"cannot write {target}: {os.strerror(number or 0)}") from error
        raise


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`; it becomes `target` if the block succeeds and vanishes if it does not."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        os.close(handle)
        scratch = Path(name)
        try:
            yield scratch
            scratch.chmod(0o644)  # mkstemp makes it private; a collection is meant to be read
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it becomes `target` if the block succeeds and vanishes if it does not.

    Raises:
        FusionRouteError: `target` is the working folder; or, if `replace` is false, it has something in it, before the
            block or after it.
    """
    place = target.resolve()  # where a link leads, for there the room is
    taken = f"{target} exists already: name another folder or remove it"
    if place.exists() and not replace and (not place.is_dir() or any(place.iterdir())):
        raise FusionRouteError(taken)
    if place.exists() and place.samefile("."):
        raise FusionRouteError(f"{target} is the working folder, which cannot be put in place whole: name another one")
    with disk_errors(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
        try:
            yield scratch
            scratch.chmod(0o755)
            if replace and place.exists():
                _exchange(place, scratch)
            else:
                with contextlib.suppress(OSError):
                    place.rmdir()  # only if it is empty still: the block may have taken hours
                if place.exists():
                    raise FusionRouteError(taken)
                os.replace(scratch, place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _exchange(old: Path, new: Path) -> None:
    """Put the folder `new` in the place of `old`. It takes two renames: if the second fails, the first is undone."""
    aside = Path(tempfile.mkdtemp(dir=old.parent, prefix=f".{old.name}.old."))
    try:
        os.replace(old, aside / "old")
        try:
            os.replace(new, old)
        except OSError:
            os.replace(aside / "old", old)
            raise
        shutil.rmtree(aside)
    finally:
        with contextlib.suppress(OSError):
            aside.rmdir()  # but for what could not be put back


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with staged_file(target) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FusionRouteError: the file is missing, half-written or may not be read; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FusionRouteError(f"{path} is missing") from None
    except OSError as error:
        raise FusionRouteError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FusionRouteError(f"{path} is not whole JSON ({error}): remove it or fetch it again") from None
