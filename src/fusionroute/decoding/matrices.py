"""`y = W x + b` for few tokens, with W laid out as the machine reads it fastest.

A decoding step multiplies each weight once by a handful of tokens, so it costs what reading the weights costs. On a
CPU, oneDNN reads a weight in blocks of its own 1.3 to 2 times as fast as the rows that PyTorch keeps; laying it out so
is done once. Knows one matrix.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

# oneDNN's kernels for one and two tokens read blocks more slowly than those for more: measured, by a quarter.
FEWEST = 4


def filled(count: int) -> int:
    """Tokens that a product of `count` is filled up to: at least `FEWEST`, and beyond 16 one of eight sizes an octave.

    oneDNN compiles a kernel for every size, keeps a thousand and does not give back the memory of those it drops: six
    matrices of SmolLM2-135M with every size to 700 took 1.8 GB, and 1.5 GB more when they came again.
    """
    step = 1 << max((count - 1).bit_length() - 4, 0)
    return max(-(-count // step) * step, FEWEST)


@cache
def _has_blocks(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type in blocks on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype))
        torch.ops.mkldnn._linear_pointwise(torch.zeros(FEWEST, 16, dtype=dtype), weight, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


class Matrix:
    """A weight `[out, in]`, maybe with a bias `[out]`.

    Args:
        blocks: multiply with a copy in oneDNN's layout; where there is no such layout, with `weight` itself.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, blocks: bool) -> None:
        self.weight, self.bias = weight.detach(), bias
        self.blocks = blocks and weight.device.type == "cpu" and _has_blocks(weight.dtype)
        if self.blocks:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        """`[N, in] -> [N, out]`."""
        if not self.blocks:
            return linear(x, self.weight, self.bias)
        count = x.shape[0]
        if (spare := filled(count) - count) > 0:
            return self(pad(x, (0, 0, 0, spare)))[:count]
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y + W x`, of a matrix without a bias."""
        return y + self(x) if self.blocks else torch.addmm(y, x, self.weight.T)
