"""Eq. 2 and Eq. 3, as pure functions on per-token numbers. Knows no model; sums and denominators are the caller's.

Shapes: N positions of a batch, flat; n experts; P preference pairs. `label_logprobs [N, n]` and `greedy [N, n]` are the
annotations: each expert's log-probability of the next token, and the token it would have written.
Source: Xiong et al., arXiv 2601.05106, §3; where the paper is silent, the choice is marked "ours".
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

RouteLoss = Literal["geometric", "arithmetic", "renormalized"]
Bias = Literal["sum", "mean", "none"]


def informative(greedy: Tensor) -> Tensor:
    """S of Eq. 2: positions `[N]` (bool) where some two experts' greedy next tokens differ, from `greedy [N, n]`."""
    return (greedy != greedy[:, :1]).any(dim=-1)


def route_loss(
    scores: Tensor, label_logprobs: Tensor, kind: RouteLoss = "geometric", log_normaliser: Tensor | None = None
) -> Tensor:
    """L_route of Eq. 2 per position, `[N]` in nats, from `scores [N, n]` and `label_logprobs [N, n]`.

    `w = softmax(scores)`: with free weights the loss has no lower bound (ours).
    `geometric`: `Σ_i w_i·(−log π_i(y))`, the paper's `−log π_agg` without renormalising π_agg (ours: then the experts'
    label log-probabilities are all it needs). `arithmetic`: `−log Σ_i w_i π_i(y)`, the marginal likelihood of Co-LLM
    (arXiv 2403.03870). `renormalized`: the first with π_agg normalised over the vocabulary; it needs the function
    `log_normaliser` of the same scores, `[N]`.
    """
    if kind in ("geometric", "renormalized"):
        loss = -(scores.float().softmax(dim=-1) * label_logprobs.float()).sum(dim=-1)
        if kind == "geometric":
            return loss
        if log_normaliser is None:
            raise ValueError("the renormalized route loss needs the pool's log_normaliser")
        return loss + log_normaliser
    if kind == "arithmetic":
        return -torch.logsumexp(scores.float().log_softmax(dim=-1) + label_logprobs.float(), dim=-1)
    raise ValueError(f"route loss must be geometric, arithmetic or renormalized, not {kind!r}")


def log_normaliser(scores: Tensor, logprobs: Tensor) -> Tensor:
    """`log Σ_v Π_i π_i(v)^{w_i}` with `w = softmax(scores)`, `[N]`, from `scores [N, n]` and `logprobs [N, n, V]`.

    What `log π_agg` of Eq. 2 lacks of being a distribution's; at most 0, and 0 where the experts agree (ours).
    """
    return torch.logsumexp((scores.float().softmax(dim=-1).unsqueeze(-1) * logprobs).sum(dim=-2), dim=-1)


def routed_logprobs(label_logprobs: Tensor, routes: Tensor) -> Tensor:
    """The routed expert's label log-probability `[N]`, from `label_logprobs [N, n]` and `routes [N]`."""
    return label_logprobs.gather(-1, routes.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Segments:
    """Which sequence each of N flat positions belongs to (`index [N]`), and how many there are."""

    index: Tensor
    count: int

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values [N]` per sequence, `[count]`."""
        return values.new_zeros(self.count).index_add(0, self.index, values)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values [N]` per sequence, `[count]`; 0 where it has no position."""
        return self.sum(values) / self.sum(torch.ones_like(values)).clamp(min=1)


def expert_bias(routed: Tensor, segments: Segments, kind: Bias = "sum") -> Tensor:
    """bias of Eq. 3 per pair, `[P]`, from the routed experts' label log-probabilities `routed [N]`; no gradient.

    Sequences alternate chosen, rejected. `sum` is the paper's; `mean` divides each side by its length; `none` is plain
    DPO (both ours, for the ablation).
    """
    if kind == "none":
        return routed.new_zeros(segments.count // 2)
    routed = routed.detach()
    sides = segments.sum(routed) if kind == "sum" else segments.mean(routed)
    return sides[0::2] - sides[1::2]


class Cdpo(NamedTuple):
    """Of P pairs: the loss, the margin Δ_θ, and σ'(β·Δ + β·bias), each `[P]`."""

    loss: Tensor
    margin: Tensor
    slope: Tensor


def cdpo_loss(policy: Tensor, reference: Tensor, bias: Tensor, beta: float = 0.1) -> Cdpo:
    """Eq. 3: `−log σ(β·Δ_θ + β·bias)` per pair.

    Args:
        policy, reference: Σ_t log π per sequence `[2P]`, alternating chosen and rejected, under θ and under the router
            after phase 1.
        bias: `[P]`, see `expert_bias`.

    Eq. 3 leaves out the normaliser of the fused distribution, Σ_t log Z_t(θ); so do we.
    """
    ratio = policy - reference.detach()
    margin = ratio[0::2] - ratio[1::2]
    logit = beta * (margin + bias.detach())
    probability = torch.sigmoid(logit.detach())
    return Cdpo(-logsigmoid(logit), margin, probability * (1 - probability))
