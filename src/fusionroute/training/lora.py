"""LoRA adapters: their shape, how one is made, how one is written. Knows nothing of what they are trained for."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fusionroute.copying import PROVENANCE, kind
from fusionroute.files import staged_folder, write_json


class LoraSettings(BaseModel):
    """A LoRA adapter's shape (arXiv 2106.09685): rank `r`; the update is scaled by `alpha / r`."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(default=8, gt=0)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


def lora_config(settings: LoraSettings, **more: Any) -> Any:
    """PEFT's configuration of an adapter on a causal LM; `more` are fields of it."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        **{"task_type": "CAUSAL_LM", **more},
    )


def save_adapter(
    model: Any, folder: Path, dtype: Any, provenance: dict[str, Any], state: dict[str, Any] | None = None
) -> None:
    """Write the adapter of the PeftModel `model` in `dtype`, with where it came from beside it.

    The provenance holds the digest of the base: PEFT's own file can only name a path.

    Args:
        state: its tensors by the model's names, where the model has only parts of them.
    """
    from safetensors.torch import load_file, save_file

    with staged_folder(folder, replace=True) as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False, state_dict=state)
        weights = scratch / "adapter_model.safetensors"
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})
        config_file = scratch / "adapter_config.json"
        config = json.loads(config_file.read_text())
        base = provenance.get("base")
        config["base_model_name_or_path"] = base if base and kind(base, folder) == "hub" else None
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        (scratch / "README.md").unlink(missing_ok=True)  # PEFT's template, all placeholders
        write_json(scratch / PROVENANCE, provenance)
