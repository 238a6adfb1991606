"""Eq. 1 and the token trace, as pure functions on tensors. Knows no model, tokenizer or file.

Shapes: B rows, T positions, V vocabulary, n experts. Everything is added in float32 (invariant 6).
Source: Xiong et al., arXiv 2601.05106, Eq. 1 with the weight α of the complement (α = 1 in the paper).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def route(scores: Tensor) -> Tensor:
    """The chosen expert, `arg max` over the last axis of `scores [..., n]`; ties go to the lowest index."""
    # torch.argmax does not promise which of several maxima it returns, so they are given distinct ranks.
    ranks = torch.arange(scores.shape[-1], 0, -1, device=scores.device)
    return ((scores == scores.amax(dim=-1, keepdim=True)) * ranks).argmax(dim=-1)


def fuse(router_logits: Tensor, expert_logits: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
    """Eq. 1: `α·ℓ_router + ℓ_expert`, `[..., V] -> [..., V]` float32.

    Raw logits and log-probabilities differ by a constant per position, so both give the same distribution.

    Args:
        alpha: one weight, or one per position as a tensor `[..., 1]`. Where it is 0 the router does not count, whatever
            its logits are: 0 · ∞ would be no number.
    """
    expert = expert_logits.float()
    if isinstance(alpha, Tensor):
        return torch.where(alpha == 0, expert, expert + alpha * router_logits.float())
    return expert if alpha == 0 else expert + alpha * router_logits.float()


def select(expert_logits: Sequence[Tensor], routes: Tensor) -> Tensor:
    """Logits of the chosen expert: n tensors `[..., V]` and `routes [...]` give `[..., V]`."""
    chosen = expert_logits[0]
    for index in range(1, len(expert_logits)):
        chosen = torch.where((routes == index).unsqueeze(-1), expert_logits[index], chosen)
    return chosen


def product(expert_logits: Sequence[Tensor]) -> Tensor:
    """The uniform product of all experts, `Π_i π_i^{1/n}` up to its normaliser: the mean of their logits, float32."""
    return torch.stack([logits.float() for logits in expert_logits]).mean(dim=0)


@dataclass(frozen=True)
class TokenTrace:
    """Who wrote one token.

    Attributes:
        id: the emitted token.
        text: its text, in a stream the characters it completes.
        expert: the chosen expert; `router` where the router writes alone, `all` where every expert does.
        weights: softmax of the route scores, by expert; equal where the policy asks for none.
        expert_choice, router_choice, fused_choice: arg-max ids of the expert alone, the router alone, and Eq. 1.
        overruled: the fused arg-max is not the expert's.
        gap: fused log-probability of the emitted token minus the expert's, in nats.
        drafted: the token was proposed by a drafter and accepted.
    """

    id: int
    text: str
    expert: str
    weights: dict[str, float]
    expert_choice: int
    router_choice: int
    fused_choice: int
    overruled: bool
    gap: float
    drafted: bool = False

    def to_dict(self) -> dict[str, Any]:
        # Not asdict, which takes ten times as long: a stream does this at every token.
        return {**vars(self), "weights": dict(self.weights)}


def choices(fused: Tensor, experts: Tensor, routers: Tensor, tokens: Tensor) -> list[dict[str, Any]]:
    """What each side would have written at K positions, as fields of `TokenTrace`.

    Args:
        fused, experts, routers: logits `[K, V]` of Eq. 1 and of its two terms.
        tokens: the emitted ids `[K]`.
    """
    at = tokens.unsqueeze(-1)
    if fused is experts:
        gaps = [0.0] * len(tokens)
    else:
        own = experts.float()
        gap = fused.gather(-1, at) - own.gather(-1, at)
        gaps = (gap.squeeze(-1) - fused.logsumexp(-1) + own.logsumexp(-1)).tolist()
    # Where the router is left out one tensor may stand for another; V may be 150,000.
    sides = (experts, routers, fused)
    best = {id(logits): logits.argmax(dim=-1).tolist() for logits in {id(side): side for side in sides}.values()}
    columns = [best[id(logits)] for logits in sides]
    return [
        {"expert_choice": e, "router_choice": r, "fused_choice": f, "overruled": f != e, "gap": gap}
        for e, r, f, gap in zip(*columns, gaps, strict=True)
    ]


def shares(trace: Sequence[TokenTrace], names: Sequence[str]) -> dict[str, float]:
    """Fraction of the tokens that each expert wrote."""
    return {name: sum(t.expert == name for t in trace) / max(len(trace), 1) for name in names}


def switch_rate(trace: Sequence[TokenTrace]) -> float:
    """Changes of expert ÷ (tokens − 1)."""
    changes = sum(a.expert != b.expert for a, b in pairwise(trace))
    return changes / max(len(trace) - 1, 1)


def overruled_rate(trace: Sequence[TokenTrace]) -> float:
    """Fraction of the tokens at which the router overruled the expert."""
    return sum(t.overruled for t in trace) / max(len(trace), 1)
