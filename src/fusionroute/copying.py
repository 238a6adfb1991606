"""A member's files, copied to where a collection or a merged model is made: what goes along and what stays.

What stays would tell of the machine the files lay on, or is no part of the model. Loads no weights.
"""

import json
import shutil
from pathlib import Path

from fusionroute import sources, weights
from fusionroute.errors import UsageError
from fusionroute.files import read_json, write_json

PROVENANCE = "provenance.json"  # beside weights that were trained here: from which base, and how
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
)
# Configurations and tokenizers, whatever the family calls their files.
_BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer's files; a large vocabulary without its line breaks is two thirds of the size."""
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if (folder / "tokenizer.json").is_file():
        compact = json.dumps(read_json(folder / "tokenizer.json"), ensure_ascii=False, separators=(",", ":"))
        (out / "tokenizer.json").write_text(compact, encoding="utf-8")


def copy_adapter(folder: Path, out: Path, source: str) -> None:
    """Copy an adapter to the new folder `out`; in its config, `source` is named as its base if that is a Hub id."""
    out.mkdir()
    shutil.copyfile(folder / "adapter_model.safetensors", out / "adapter_model.safetensors")
    _copy_provenance(folder, out)
    # PEFT wrote the path it trained from, which means nothing elsewhere; a Hub id lets PEFT load it on its own.
    config = read_json(folder / "adapter_config.json")
    hub = kind(source, out) == "hub"
    write_json(out / "adapter_config.json", config | {"base_model_name_or_path": source if hub else None})


def copy_model(folder: Path, out: Path) -> None:
    """Copy a model's weights, bit for bit, with its configuration and tokenizer, to the new folder `out`.

    A second copy of the weights in other files, code, and what a trainer keeps of itself are left behind.
    """
    out.mkdir()
    held = {tensor.file.name for tensor in weights.read_tensors(folder).values()}
    for path in sorted(folder.iterdir()):
        beside = path.suffix in _BESIDE_WEIGHTS and path.name not in (PROVENANCE, "trainer_state.json")
        if path.name in held or (beside and path.is_file()):
            shutil.copyfile(path, out / path.name)
    _copy_provenance(folder, out)
    config = read_json(out / "config.json")
    # Where it was loaded from, which transformers wrote down before version 5.
    if config.pop("_name_or_path", None) is not None:
        write_json(out / "config.json", config)


def _copy_provenance(folder: Path, out: Path) -> None:
    if (folder / PROVENANCE).is_file():
        provenance = read_json(folder / PROVENANCE)
        base = provenance.get("base")
        # A path of the machine that trained it is nobody else's business; the digest says which base it was.
        path = base is not None and kind(base, out) == "local"
        write_json(out / PROVENANCE, provenance | {"base": None if path else base})


def kind(source: str, relative_to: Path) -> str:
    """`hub`, `local` or what else a source is; `local` too if it is none, since it was a path somewhere."""
    try:
        return sources.Source.parse(source, relative_to=relative_to).kind
    except UsageError:
        return "local"
