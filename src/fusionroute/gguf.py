"""GGUF to safetensors: the weights unpacked to bfloat16, with config and tokenizer, as transformers would save them.

Knows nothing of where the file came from or of the cache the result goes to.
"""

import contextlib
import importlib.util
import io
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusionroute.errors import FusionRouteError, first_line


def convert(gguf: Path, folder: Path, sha256: str) -> None:
    """Write `gguf` into `folder` as bfloat16 safetensors, config, generation config, tokenizer and a card.

    Args:
        sha256: of the file, for the card.

    Raises:
        FusionRouteError: it is no GGUF file, cannot be read, or would be read as another model than it is; or the
            package `gguf` is missing.
    """
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
        raise FusionRouteError(f"{gguf.name} cannot be converted: {first_line(error)}") from error
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
