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
        FusionRouteError: `target` exists, is not empty and `replace` is false.
    """
    if target.exists() and not replace and (not target.is_dir() or any(target.iterdir())):
        raise FusionRouteError(f"{target} exists already: name another folder or remove it")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield scratch
            scratch.chmod(0o755)
            if target.exists():
                # A folder cannot be exchanged in one call, so the old one steps aside for the rename.
                aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
                os.replace(target, aside / "old")
                os.replace(scratch, target)
                shutil.rmtree(aside)
            else:
                os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with staged_file(target) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FusionRouteError: the file is missing or half-written; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FusionRouteError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FusionRouteError(f"{path} is not whole JSON ({error}): remove it or fetch it again") from None
