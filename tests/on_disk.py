"""What tests of collections on disk look at: files, configurations and logits."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM

IDS = torch.tensor([[5, 9, 250, 17, 33, 4, 4, 90, 12, 200]])


def logits(model: "FusionRouteForCausalLM") -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def digests(folder: Path) -> dict[str, str]:
    """Relative path to content hash, of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
