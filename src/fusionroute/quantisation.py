"""Experts with weights of 8 or 4 bits, by torchao: smaller, and no longer quite the model that was published.

Lossy, so it is never the default: a member has it where the collection or the user says so, as its dtype. Inputs and
sums stay in floating point; embedding and LM head are left as they are. Knows one model.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from fusionroute.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Weights that share a scale in 4 bits; in 8 bits a row of the matrix does.
GROUP = 32
FORMATS = ("int8", "int4")


def quantise(model: "PreTrainedModel", form: str) -> "PreTrainedModel":
    """Round the weights of `model`'s blocks in place: `int8` with a scale per output, `int4` per 32 inputs of one.

    On GPUs 4-bit weights are packed two to a byte; elsewhere torchao has no product for those, so each takes a byte,
    and only what 4 bits do to the answers can be seen.

    Raises:
        UsageError: torchao is not installed, or a width is no multiple of 32.
    """
    try:
        from torchao.quantization import (
            Int4WeightOnlyConfig,
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )  # fmt: skip
    except ImportError:
        raise UsageError(f"{form} weights are torchao's: pip install 'fusionroute[torchao]'") from None
    import torch

    head = model.get_output_embeddings()
    linears = {id(module): module for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    config: Any
    if form == "int4":
        odd = sorted({m.in_features for m in linears.values() if m.in_features % GROUP})
        if odd:
            raise UsageError(f"int4 shares a scale among {GROUP} weights, and this model has matrices {odd[0]} wide")
        if model.device.type == "cuda":
            config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
        else:
            config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]
    else:
        config = Int8WeightOnlyConfig()
    quantize_(model, config, filter_fn=lambda module, _name: id(module) in linears)
    return model
