"""The LM head of a causal LM apart from its backbone, so that logits exist only at the positions that need them.

Shapes: N positions, d hidden width, V vocabulary. Knows causal LMs; knows nothing of routing.
"""

from typing import Any

import torch
from torch import Tensor

from fusionroute.errors import FusionRouteError


class Head:
    """The LM head of a causal LM: hidden states `[N, d]` to the logits `[N, V]` that the model's `forward` gives.

    Soft-capping (Gemma-2) and scaling (Granite, Cohere) are in the model's `forward`, not in its output embeddings;
    they are applied here from the configuration, and `check` compares the result with the model itself.

    Args:
        vocab_size: ids whose logits are given, the first of the vocabulary; None is all.
        linear: to multiply with in place of the model's own output embeddings.
    """

    def __init__(self, model: Any, vocab_size: int | None = None, *, linear: Any = None) -> None:
        config = model.config.get_text_config()
        self.linear = model.get_output_embeddings() if linear is None else linear
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
    return backbone(model)(**{"use_cache": False, **inputs}).last_hidden_state
