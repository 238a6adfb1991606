"""The router: a causal LM whose logits are the complement, with a linear route head on what its LM head reads.

Eq. of §3: `w_t = W h_t`, `i* = argmax_i w_t,i`. The head is float32 whatever the LM's dtype: it is n × d numbers, and
its arg-max decides who writes the token. Knows no expert but by name.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionroute.errors import FusionRouteError
from fusionroute.files import staged_file
from fusionroute.members import Member

HEAD_FILE = "route_head.safetensors"


class RouteHead(nn.Linear):
    """`W [n, d]`, zero until trained: every score ties and the lowest index wins."""

    def __init__(self, hidden_size: int, experts: Sequence[str], device: torch.device | None = None) -> None:
        super().__init__(hidden_size, len(experts), bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        self.experts = list(experts)
        self.trained = False

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores `[..., n]` float32 of hidden states `[..., d]`."""
        return nn.functional.linear(hidden.float(), self.weight.float())

    def save(self, folder: Path) -> None:
        """Write the head and the order of the experts it was trained with."""
        from safetensors.torch import save_file

        # One key: safetensors writes several in random order, and the same head should be the same file.
        metadata = {"route_head": json.dumps({"experts": self.experts, "trained": self.trained})}
        with staged_file(folder / HEAD_FILE) as scratch:
            save_file({"weight": self.weight.detach().float().cpu().contiguous()}, scratch, metadata)

    @classmethod
    def load(cls, folder: Path, experts: Sequence[str], hidden_size: int, device: Any = None) -> "RouteHead":
        """Read the head from `folder`.

        Raises:
            FusionRouteError: missing, half-written or not finite, of another width, or trained with other experts or
                another order.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / HEAD_FILE
        if not path.is_file():
            raise FusionRouteError(f"{path} is missing: the collection has no route head; fetch it again")
        try:
            with safe_open(path, "pt") as file:
                weight, metadata = file.get_tensor("weight"), file.metadata() or {}
            about = json.loads(metadata.get("route_head", "{}"))
        except (SafetensorError, ValueError) as error:
            raise FusionRouteError(f"{path} is not whole ({error}): fetch the collection again") from error
        order = about.get("experts", [])
        if order != list(experts):
            raise FusionRouteError(
                f"{path} was trained with experts {', '.join(order)} in this order, config.json lists "
                f"{', '.join(experts)}: put them back in the head's order or train the router again"
            )
        if weight.shape != (len(order), hidden_size):
            raise FusionRouteError(
                f"{path} has shape {list(weight.shape)}, the router needs {[len(order), hidden_size]}: "
                "head and router belong to different models"
            )
        if not weight.isfinite().all():
            raise FusionRouteError(f"{path} has weights that are not finite: fetch it again, or train the router again")
        head = cls(hidden_size, experts, device)
        head.weight.data.copy_(weight)
        head.trained = about.get("trained", True)
        return head


@dataclass
class RouterOutput:
    """`logits [B, K, V]`, `scores [B, K, n]` (float32) at the K positions kept, and the router's KV cache."""

    logits: Tensor
    scores: Tensor
    past_key_values: Any


class Router(nn.Module):
    """A member with a route head."""

    def __init__(self, member: Member, head: RouteHead) -> None:
        super().__init__()
        self.member = member
        self.route_head = head

    def forward(self, **inputs: Any) -> RouterOutput:
        output, hidden = self.member.forward_with_hidden(**inputs)
        return RouterOutput(output.logits, self.route_head(hidden), output.past_key_values)


def head_width(model: Any) -> int:
    """Width d of what the LM head of `model` reads."""
    return model.get_output_embeddings().weight.shape[-1]


def save_router_adapter(member: Member, folder: Path) -> None:
    """Write the router's adapter as it is in memory over the copy in `folder`, unless it is what the copy holds.

    Loading may have rounded it to the base's dtype, so an untouched adapter keeps its file.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    assert member.peft is not None
    assert member.adapter is not None
    path = folder / "adapter_model.safetensors"
    state = get_peft_model_state_dict(member.peft, adapter_name=member.adapter, save_embedding_layers=False)
    state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    stored = load_file(path)
    if any(not torch.equal(stored[name].to(tensor.dtype), tensor) for name, tensor in state.items()):
        with staged_file(path) as scratch:
            save_file(state, scratch, {"format": "pt"})
