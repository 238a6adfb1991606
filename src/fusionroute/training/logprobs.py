"""Label log-probabilities without a `[B, T, V]` tensor: the LM head runs on the positions that need it, in chunks.

Shapes: N flat positions, d hidden width, V vocabulary. Knows causal LMs; knows nothing of routing or losses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Positions whose logits exist at once. 128 × 49,152 float32 is 25 MB; larger chunks are no faster on the CPUs measured.
CHUNK = 128


class LabelScores(NamedTuple):
    """Of N positions: the label's log-probability (float32, nats) and the arg-max id, both `[N]`."""

    logprobs: Tensor
    greedy: Tensor


def score_labels(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, chunk: int = CHUNK) -> LabelScores:
    """Log-probability of `labels [N]` and greedy ids after `hidden [N, d]`; differentiable in `hidden` and the head.

    With a frozen head nothing of size V is kept for the backward pass and no logit is computed twice: the gradient of
    position t's log-probability in its own hidden state is a vector of width d, found while the chunk's logits exist,
    and the backward pass only scales it. With a trainable head the chunk's logits are computed again in the backward.
    """
    trainable = getattr(head, "trainable", False)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or trainable)
    logprobs, greedy = [], []
    for start in range(0, hidden.shape[0], chunk):
        piece, wanted = hidden[start : start + chunk], labels[start : start + chunk]
        if not needs_grad:
            scores = _score(piece, head, wanted)
        elif trainable:
            scores = checkpoint(_score, piece, head, wanted, use_reentrant=False)
        else:
            scores = LabelScores(*_FrozenHead.apply(piece, head, wanted))
        logprobs.append(scores[0])
        greedy.append(scores[1])
    if not logprobs:
        return LabelScores(hidden.new_zeros(0, dtype=torch.float32), labels.new_zeros(0))
    return LabelScores(torch.cat(logprobs), torch.cat(greedy))


def score_logits(logits: Tensor, labels: Tensor) -> LabelScores:
    """Log-probability of `labels [N]` and greedy ids under `logits [N, V]`."""
    logits = logits.float()
    return LabelScores(
        logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1), logits.detach().argmax(dim=-1)
    )


def _score(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> LabelScores:
    return score_logits(head(hidden), labels)


class _FrozenHead(torch.autograd.Function):
    """`_score` for a head without trainable parameters; saves ∂logprob_t/∂hidden_t, `[N, d]`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            scores = _score(leaf, head, labels)
            # A position's log-probability depends on its own hidden state alone, so the sum's gradient has all of them.
            (jacobian,) = torch.autograd.grad(scores.logprobs.sum(), leaf)
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(scores.greedy)
        return scores.logprobs.detach(), scores.greedy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _greedy: Any) -> tuple[Tensor, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (grad.unsqueeze(-1) * jacobian).to(jacobian.dtype), None, None
