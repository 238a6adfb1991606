"""Which token a distribution gives: randomness is a function of (seed, position), so no batch or draft changes it.

The steps are those of transformers' `generate`, in its order, on the fused logits. Knows nothing of models.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionroute.errors import FusionRouteError, UsageError, require

_MASK = (1 << 64) - 1
# Divided by less, logits may be infinite in float32, and the arg-max of several infinities is the first.
_COLDEST = 1e-30
_LOUD = 7.0  # one token of a thousand has more noise
_NO_NUMBERS = "logits that are no numbers (NaN): damaged weights, an overflow in this dtype, or an infinite bias"

Mask = Callable[[Sequence[int]], Collection[int] | Tensor]


@dataclass(frozen=True)
class Sampling:
    """How one row draws its tokens.

    Attributes:
        temperature: 0 is greedy; else what the fused logits are divided by.
        top_k: the so many likeliest tokens; 0 is all.
        top_p: the likeliest tokens whose probabilities reach it.
        min_p: tokens at least so likely, relative to the likeliest.
        repetition_penalty: divides positive fused logits of tokens that the row has, prompt included, and multiplies
            negative ones (CTRL, arXiv 1909.05858).
        frequency_penalty, presence_penalty: taken from the fused logit of a new token's id as often as the row has
            written it, and once if it has (the OpenAI API's, which leaves the prompt out).
        bias: id to what is added to its fused logit.
        min_tokens: no end id before so many new tokens.
        seed: the same seed gives the same text, in any batch.
        mask: ids so far, prompt included, to the ids allowed next, a tensor `[N]` int64 if they are many; stateless.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    seed: int = 0
    mask: Mask | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        rules = {
            "temperature must be at least 0 and finite": 0 <= self.temperature < math.inf,
            "top_k must be at least 0": self.top_k >= 0,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "min_p must be in [0, 1]": 0 <= self.min_p <= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
            "min_tokens must be at least 0": self.min_tokens >= 0,
        }
        require(self, rules)

    @property
    def greedy(self) -> bool:
        """Whether a token is the arg-max of the fused logits as they are."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return self.temperature == 0 and not (penalties or self.bias or self.min_tokens) and self.mask is None


def gumbel(seed: int, position: int, size: int) -> Tensor:
    """Standard Gumbel noise `[size]` float32 that depends on (seed, position) alone."""
    return _gumbel(_uniform(seed, position, size))


def _uniform(seed: int, position: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(_mix(seed, position))
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _gumbel(uniform: Tensor) -> Tensor:
    # rand may return 0, whose logarithm is infinite.
    return -torch.log(-torch.log(uniform.clamp(min=1e-300))).float()


def noisy_argmax(logits: Tensor, seed: int, position: int) -> int:
    """The arg-max of `logits [V] + gumbel(seed, position, V)`.

    Two logarithms for each of 152,000 tokens take ten times as long as the numbers they are of, so noise is worked out
    only for tokens that it can make the largest.

    Raises:
        FusionRouteError: logits that are NaN.
    """
    logits = logits.cpu()
    uniform = _uniform(seed, position, len(logits))
    top = int(logits.argmax())
    least = float(logits[top] + _gumbel(uniform[top]))
    if math.isnan(least):
        raise FusionRouteError(_NO_NUMBERS)
    # A token with less noise than _LOUD must come that near by itself; 1 more, because sums are rounded.
    (places,) = ((logits >= least - _LOUD - 1) | (uniform > math.exp(-math.exp(-_LOUD)))).nonzero(as_tuple=True)
    return int(places[(logits[places] + _gumbel(uniform[places])).argmax()])


def _mix(seed: int, position: int) -> int:
    """32 bits, all that torch's CPU generator is seeded with, of a hash of both (splitmix64's finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + position) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) >> 32


def adjust(logits: Tensor, sampling: Sampling, ids: Sequence[int], new: int, ends: Collection[int]) -> Tensor:
    """The fused `logits [V]` as they are drawn from, float32; −inf on what is left out.

    Args:
        ids: the row so far, prompt included, `new` of them new.
        ends: end ids.

    Raises:
        UsageError: the mask allows no token.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(ids)), dtype=torch.long, device=logits.device)
        had = logits[seen]
        penalty = sampling.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(had > 0, had / penalty, had * penalty))
    written = Counter(ids[len(ids) - new :]) if sampling.frequency_penalty or sampling.presence_penalty else {}
    added = {i: -sampling.frequency_penalty * count - sampling.presence_penalty for i, count in written.items()}
    for i, value in (sampling.bias or {}).items():
        added[i] = added.get(i, 0.0) + value
    if added:
        logits = logits.index_add(
            0,
            torch.tensor(list(added), device=logits.device),
            torch.tensor(list(added.values()), dtype=logits.dtype, device=logits.device),
        )
    if new < sampling.min_tokens and ends:
        logits = logits.index_fill(0, torch.tensor(sorted(ends), device=logits.device), float("-inf"))
    if sampling.mask is not None:
        found = sampling.mask(ids)
        allowed = found if isinstance(found, Tensor) else torch.tensor(sorted(found), dtype=torch.long)
        allowed = allowed.to(logits.device)
        if not logits[allowed].isfinite().any():
            raise UsageError("the mask allows no token, or only an end before min_tokens")
        logits = torch.full_like(logits, float("-inf")).index_copy(0, allowed, logits[allowed])
    if sampling.temperature == 0:
        return logits
    logits = logits / max(sampling.temperature, _COLDEST)
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), float("-inf"))
    return logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens whose probabilities reach `top_p`, at least one; −inf elsewhere.

    Tokens with less than half an even share of what may be left out are left out together, unsorted: few of 152,000
    are not among them.
    """
    logprobs = logits.log_softmax(-1)
    kept = logprobs >= math.log((1 - top_p) / (2 * len(logits)))
    if not kept.any():
        raise FusionRouteError(_NO_NUMBERS)
    mass = 1 - float(logprobs[~kept].exp().sum())
    (places,) = kept.nonzero(as_tuple=True)
    ordered, order = logits[places].sort()
    out = ordered.softmax(-1).cumsum(-1) * mass <= mass - top_p
    out[-1] = False
    inside = places[order[~out]]
    return torch.full_like(logits, float("-inf")).index_copy(0, inside, logits[inside])


def draw(
    logits: Tensor, sampling: Sampling, *, ids: Sequence[int] = (), new: int = 0, ends: Collection[int] = ()
) -> int:
    """The row's next token from the fused `logits [V]`: an arg-max if greedy, else Gumbel-max.

    The noise is keyed by (seed, len(ids)): what is drawn at a position depends on nothing else.
    Source: the Gumbel-max trick; its arg-max is a sample of the softmax.
    """
    if sampling.greedy:
        return int(logits.argmax())
    adjusted = adjust(logits, sampling, ids, new, ends)
    if sampling.temperature == 0:
        return int(adjusted.argmax())
    return noisy_argmax(adjusted, sampling.seed, len(ids))
