"""Logits along a given text under a policy: nothing is written, so the reference model does it in one pass."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusionroute.configuration import ROUTER

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


@torch.inference_mode()
def read(
    model: "FusionRouteForCausalLM",
    ids: Tensor,
    mask: Tensor,
    policy: Mapping[str, Any],
    *,
    keep: int,
    prompt_length: int,
) -> Tensor:
    """Logits `[B, keep, V]` at the last positions of rows `ids [B, T]` that `mask [B, T]` says are padded on the left.

    In float32; where the router is alone, in its own dtype.

    Args:
        policy: expert, alpha and routing, as in `Request`; expert `router` is the router alone.
        prompt_length: columns of the prompt, at whose end `routing="query"` decides.
    """
    ids, mask = ids.to(model.device), mask.to(model.device)
    if policy.get("expert") == ROUTER:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = model.router(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
        )
        return output.logits[..., : model.config.vocab_size]
    end = {"prompt_length": prompt_length} if policy.get("routing") == "query" else {}
    return model(ids, attention_mask=mask, logits_to_keep=keep, **policy, **end).logits
