"""A LoRA adapter folded into its base tensor by tensor, as the base's files are read: `W + s·BA`, added in float32.

The whole base is never in memory a second time. Knows files and PEFT's settings; knows no model and no engine.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionroute import weights
from fusionroute.errors import FusionRouteError

_PREFIX = "base_model.model."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Settings of a LoRA that make its function another than `W + s·BA`.
_OTHER = (
    "use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "target_parameters", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip


class Folding:
    """The adapter in `folder`.

    Raises:
        FusionRouteError: it is not whole, or does more than add a product of low rank to matrices.
    """

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig, PeftConfig
        from safetensors.torch import load_file

        weights.check_adapter(folder)
        self.folder = folder
        self.config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(self.config, LoraConfig):
            raise self._refused(f"type {self.config.peft_type}")
        other = [name for name in _OTHER if getattr(self.config, name, None)]
        if self.config.bias != "none":
            other.append(f"bias={self.config.bias!r}")
        if other:
            raise self._refused(", ".join(other))
        stored = load_file(folder / "adapter_model.safetensors")
        # Module to its two factors, A [r, in] and B [out, r].
        self._factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in stored.items():
            module, _, rest = name.removeprefix(_PREFIX).partition(".lora_")
            if rest not in ("A.weight", "B.weight"):
                raise self._refused(f"a tensor {name}")
            self._factors.setdefault(module, {})[rest[0]] = tensor
        if halves := sorted(module for module, pair in self._factors.items() if len(pair) < 2):
            raise FusionRouteError(f"{folder}: {halves[0]} has one of its two factors: fetch the adapter again")
        self._left = set(self._factors)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The base's tensor `name` with the adapter's part added (float32), or as it is if the adapter has none.

        Raises:
            FusionRouteError: the shapes differ, or the base is quantised there.
        """
        module = name.removesuffix(".weight")
        if module not in self._factors or not name.endswith(".weight"):
            return tensor
        pair = self._factors[module]
        if tensor.dtype not in _FLOATS:
            raise FusionRouteError(
                f"{self.folder}: {name} is {tensor.dtype} in the base: only floats can be merged into"
            )
        shape = [pair["B"].shape[0], pair["A"].shape[1]]
        if list(tensor.shape) != shape:
            raise FusionRouteError(
                f"{self.folder}: {name} has shape {list(tensor.shape)} in the base and {shape} in the adapter: "
                "it belongs to another base"
            )
        self._left.discard(module)
        added = pair["B"].float() @ pair["A"].float()
        return tensor.float() + self._scale(module, pair["A"].shape[0]) * added

    def finish(self) -> None:
        """To be called when the base has been read.

        Raises:
            FusionRouteError: parts of the adapter found no tensor.
        """
        if self._left:
            raise FusionRouteError(
                f"{self.folder}: {len(self._left)} of the adapter's modules are not in the base, first "
                f"{min(self._left)}: it belongs to another base, or to a quantised one"
            )

    def _scale(self, module: str, rank: int) -> float:
        from peft.utils.other import get_pattern_key

        patterns = self.config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), self.config.lora_alpha)
        return float(alpha / (rank**0.5 if self.config.use_rslora else rank))

    def _refused(self, what: str) -> Any:
        return FusionRouteError(
            f"{self.folder} has {what}: only plain LoRA is merged at load; merge it with PEFT and name the result"
        )
