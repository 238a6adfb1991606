"""Weight files: are they whole, and which are they? Digests of tensor content, whatever file holds it.

Reads safetensors headers and bytes; loads no model and knows nothing of where the files came from.
"""

import contextlib
import hashlib
import json
import re
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from fusionroute.errors import FusionRouteError
from fusionroute.files import read_json, staged_file

_PIECE = 4 << 20  # bytes read at a time: large enough for the disk, small beside any model
# What of an adapter's config changes the function that its tensors compute; the rest (paths, versions, init) does not.
_ADAPTER_KEYS = [
    "peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "bias", "modules_to_save",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layers_to_transform", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens",
]  # fmt: skip
# Ways to begin a LoRA that take its start off the base's weights: A and B then belong to what is left of them, and PEFT
# changes the base when it loads such an adapter.
_OFF_THE_BASE = ("pissa", "olora", "corda", "loftq")
_SETS = ("target_modules", "modules_to_save", "layers_to_transform")  # lists in no order


class StoredTensor(NamedTuple):
    """Where one tensor of a safetensors file is; `dtype` as the format writes it, such as BF16."""

    file: Path
    dtype: str
    shape: list[int]
    begin: int  # bytes from the start of the file
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        FusionRouteError: its header does not parse, or its size is not what the header says.
    """
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
                name: StoredTensor(
                    path, entry["dtype"], entry["shape"], *(8 + length + at for at in entry["data_offsets"])
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FusionRouteError(f"{refusal} (its header does not parse: {error}): fetch it again") from None
    expected = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if expected != size:
        raise FusionRouteError(f"{refusal} ({size} bytes, its header says {expected}): fetch it again")
    return tensors


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder, by name: those of model.safetensors, or of the shards that its index names.

    Raises:
        FusionRouteError: there are none or only pickled ones, a shard or a tensor that the index names is missing, or
            a file is not whole.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        pickles = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))]
        has = f"has only {pickles[0]}, which is pickle" if pickles else "has no model.safetensors"
        raise FusionRouteError(f"{folder} {has}: safetensors only (convert it, or name a .gguf file itself)")
    listed = read_json(index)
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FusionRouteError(f"{index} has no weight_map: fetch it again")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise FusionRouteError(f"{folder / shard} is missing, and {index.name} names it: fetch it again")
        tensors |= read_header(folder / shard)
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise FusionRouteError(f"{index} names {absent[0]}, which {weight_map[absent[0]]} lacks: fetch both again")
    return tensors


def _require_folder(folder: Path, config: str, hint: str) -> None:
    if not folder.is_dir():
        raise FusionRouteError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}: check the path")
    if not (folder / config).is_file():
        raise FusionRouteError(f"{folder} has no {config}: {hint}")
    if not isinstance(read_json(folder / config), dict):
        raise FusionRouteError(f"{folder / config} is not a JSON object: fetch it again")


def check_model(folder: Path) -> None:
    """Refuse a folder that cannot be loaded as a model.

    Raises:
        FusionRouteError: config.json or weights are missing, only pickled, or not whole (the message names the file),
            or an adapter lies beside them.
    """
    adapter = (folder / "adapter_config.json").is_file()
    hint = "it is an adapter" if adapter else "name a model, which an adapter is not, or a .gguf itself"
    _require_folder(folder, "config.json", hint)
    read_tensors(folder)
    if adapter:
        raise FusionRouteError(
            f"{folder} holds a model and an adapter, and transformers would load the one with the other on it: "
            "give each a folder of its own"
        )


def check_adapter(folder: Path) -> None:
    """Refuse a folder that cannot be loaded as an adapter.

    Raises:
        FusionRouteError: adapter_config.json or adapter_model.safetensors is missing, only pickled, or not whole; or
            the adapter belongs to another base than the one it names.
    """
    _require_folder(folder, "adapter_config.json", "name the folder that PEFT saved")
    if not (folder / "adapter_model.safetensors").is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        has = "only adapter_model.bin, which is pickle" if pickle else "no adapter_model.safetensors"
        raise FusionRouteError(f"{folder} has {has}: safetensors only, save it again with safe_serialization")
    read_header(folder / "adapter_model.safetensors")
    begun = read_json(folder / "adapter_config.json").get("init_lora_weights")
    if str(begun).lower().startswith(_OFF_THE_BASE):
        raise FusionRouteError(
            f"{folder} has init_lora_weights={begun!r}: its start was taken off the base, which others use as it is; "
            "make it a plain LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def digest(folder: Path) -> str:
    """ "sha256:…" over the content of a model's or an adapter's tensors, whatever the sharding and file metadata.

    Hashed are, for each tensor by name, its name, dtype, shape and bytes; of an adapter also what in its config changes
    the function. Remembered by the files' path, size and time; a cache that cannot be written is no error.

    Raises:
        FusionRouteError: as `check_model` and `check_adapter`.
    """
    # A trainer may leave config.json beside an adapter, so the weights decide.
    is_adapter = (folder / "adapter_model.safetensors").is_file() and not any(folder.glob("model*.safetensors*"))
    if is_adapter:
        check_adapter(folder)
        tensors = read_header(folder / "adapter_model.safetensors")
        settings = _adapter_settings(folder / "adapter_config.json")
    else:
        check_model(folder)
        tensors, settings = read_tensors(folder), ""

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
    return f"sha256:{remembered('weights' + settings, files, compute)}"


def _adapter_settings(path: Path) -> str:
    """The parts of an adapter's config that change its function; what is absent equals what is off."""
    config = read_json(path)
    kept = {}
    for key in _ADAPTER_KEYS:
        value = config.get(key)
        if value is None or value is False or value in ({}, [], "none"):
            continue
        kept[key] = sorted(value) if key in _SETS and isinstance(value, list) else value
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


def remembered(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """The hex sha256 that `compute` gives for `files`, computed again only when their path, size or time changes.

    Args:
        what: tells apart different digests of the same files.
    """
    stats = [path.stat() for path in files]
    key = [what, *((str(f.resolve()), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True))]
    note = cache_folder() / "digests" / hashlib.sha256(json.dumps(key).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[0-9a-f]{64}", text := note.read_text()):
            return text
    digest = compute()
    # A file written moments ago may change once more within its clock's tick, at the same size.
    if time.time() - max((s.st_mtime for s in stats), default=0.0) > 2:
        with contextlib.suppress(OSError, FusionRouteError), staged_file(note) as scratch:
            scratch.write_text(digest)
    return digest


def copy_hashed(source: Path | IO[bytes], target: Path | None) -> str:
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


def require_sha256(name: str, actual: str, expected: str) -> None:
    """Raise a `FusionRouteError` if the file called `name` has another hex sha256 than its source says."""
    if actual != expected.lower():
        raise FusionRouteError(f"{name} has sha256 {actual}, the source says {expected.lower()}: use the file it names")


def cache_folder() -> Path:
    """Where converted weights and remembered digests are kept: `HF_HOME/fusionroute`."""
    import huggingface_hub.constants

    return Path(huggingface_hub.constants.HF_HOME) / "fusionroute"
