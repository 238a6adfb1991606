"""Which token a distribution gives: randomness is a function of (seed, position), so no batch or draft changes it.

Knows nothing of models.
"""

import torch
from torch import Tensor

# Any odd constant would do: neighbouring seeds and positions must not meet in one generator seed.
_STRIDE = 0x9E3779B97F4A7C15
_MASK = (1 << 63) - 1


def gumbel(seed: int, position: int, size: int) -> Tensor:
    """Standard Gumbel noise `[size]` float32 that depends on (seed, position) alone."""
    generator = torch.Generator().manual_seed((seed * _STRIDE + position) & _MASK)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    # rand may return 0, whose logarithm is infinite.
    return -torch.log(-torch.log(uniform.clamp(min=1e-300))).float()


def draw(logits: Tensor, *, temperature: float, seed: int, position: int) -> int:
    """A token from `logits [V]`: the arg-max at temperature 0, else Gumbel-max on the tempered logits.

    Source: the Gumbel-max trick; its arg-max is a sample of softmax(logits / temperature).
    """
    if temperature == 0:
        return int(logits.argmax())
    noise = gumbel(seed, position, logits.shape[-1]).to(logits.device)
    return int((logits.float() / temperature + noise).argmax())
