"""Label log-probabilities without a `[B, T, V]` tensor: the LM head runs on the positions that need it, in chunks.

Shapes: N flat positions, d hidden width, V vocabulary. Knows causal LMs; knows nothing of routing or losses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionroute.errors import FusionRouteError

# Positions whose logits exist at once. 128 × 49,152 float32 is 25 MB; larger chunks are no faster on the CPUs measured.
CHUNK = 128


class Head:
    """The LM head of a causal LM: hidden states `[N, d]` to the logits `[N, V]` that the model's `forward` gives.

    Soft-capping (Gemma-2) and scaling (Granite, Cohere) are in the model's `forward`, not in its output embeddings;
    they are applied here from the configuration, and `check` compares the result with the model itself.
    """

    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        config = model.config.get_text_config()
        self.linear = model.get_output_embeddings()
        self.vocab_size = vocab_size
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits if self.vocab_size is None else logits[..., : self.vocab_size]

    @property
    def trainable(self) -> bool:
        return any(p.requires_grad for p in self.linear.parameters())

    @torch.no_grad()
    def check(self, model: Any) -> None:
        """Compare with the model's own logits on a few ids.

        Raises:
            FusionRouteError: the architecture treats its logits in a way that is not known here.
        """
        ids = torch.arange(4, device=model.device).unsqueeze(0)
        own = model(input_ids=ids, use_cache=False).logits[..., : self.vocab_size].float()
        ours = self(hidden_states(model, input_ids=ids)).float()
        if not own.isfinite().all():
            raise FusionRouteError(f"{type(model).__name__} gives logits that are not finite: its weights are damaged")
        if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2):
            raise FusionRouteError(
                f"{type(model).__name__} changes its logits after the LM head in a way unknown here (difference "
                f"{(own - ours).abs().max():.3g}): please report the architecture"
            )


def backbone(model: Any) -> Any:
    """The model without its LM head."""
    return model.get_decoder()


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """What the LM head reads, `[B, T, d]`: the last hidden states after the final norm."""
    return backbone(model)(**inputs, use_cache=False).last_hidden_state


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
            scores = torch.utils.checkpoint.checkpoint(_score, piece, head, wanted, use_reentrant=False)
        else:
            scores = LabelScores(*_FrozenHead.apply(piece, head, wanted))
        logprobs.append(scores[0])
        greedy.append(scores[1])
    if not logprobs:
        return LabelScores(hidden.new_zeros(0, dtype=torch.float32), labels.new_zeros(0))
    return LabelScores(torch.cat(logprobs), torch.cat(greedy))


def _score(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> LabelScores:
    logits = head(hidden).float()
    return LabelScores(
        logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1), logits.detach().argmax(dim=-1)
    )


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
