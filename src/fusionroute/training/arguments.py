"""What Eq. 2 and Eq. 3 leave open, and how a run is spread over devices: the arguments of both phases."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments

from fusionroute.errors import FusionRouteError
from fusionroute.training.logprobs import CHUNK


@dataclass
class RouterArguments(TrainingArguments):
    """`TrainingArguments`, and what Eq. 2 and Eq. 3 leave open.

    Args:
        route_weight (`float`): λ, the weight of L_route inside L_SFT.
        route_loss (`str`): `geometric` (the paper's), `arithmetic`, or `renormalized`, for which the experts are run at
            every step; see `losses.route_loss`.
        route_head_learning_rate (`float`, *optional*): of the route head; None takes `learning_rate`. The head
            starts at zero beside a trained LM, so it bears, and needs, a far higher one.
        sft_weight (`float`): μ, the weight of L_SFT in batches of phase 2; 1 in phase 1.
        beta (`float`): β of Eq. 3.
        bias (`str`): `sum` (the paper's), `mean` or `none`; see `losses.expert_bias`.
        routing (`str`): `current`: pairs are routed by the head as it is now; `frozen`: by the head after phase 1.
        logit_chunk (`int`): positions whose logits exist at once.
        packing (`bool`): put several sequences of a batch into a row, as long as its longest, where they do not see
            each other. The same losses and gradients from fewer rows.
        sharded (`bool`): split the router's parameters, gradients and moments over the processes of the launch (FSDP2).
            An accelerate configuration that says `FSDP` with `fsdp_version: 2` sets it.

    Raises:
        FusionRouteError: an unknown choice, or what this trainer does not do: `fsdp`, `fp16` where it is sharded.
    """

    route_weight: float = 1 / 3
    route_loss: str = "geometric"
    route_head_learning_rate: float | None = None
    sft_weight: float = 1.0
    beta: float = 0.1
    bias: str = "sum"
    routing: str = "current"
    logit_chunk: int = CHUNK
    packing: bool = False
    sharded: bool = False
    remove_unused_columns: bool = field(default=False)

    def __post_init__(self) -> None:
        self.sharded |= take_fsdp_from_the_launcher()
        super().__post_init__()
        if self.fsdp or (self.fp16 and self.sharded):
            name, instead = ("fsdp", "sharded: true") if self.fsdp else ("fp16", "bf16: true")
            raise FusionRouteError(f"{name}: not with this trainer; say {instead}")
        for name, allowed in (
            ("route_loss", ("geometric", "arithmetic", "renormalized")),
            ("bias", ("sum", "mean", "none")),
            ("routing", ("current", "frozen")),
        ):
            if getattr(self, name) not in allowed:
                raise FusionRouteError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")


def take_fsdp_from_the_launcher() -> bool:
    """Whether an accelerate configuration asks for FSDP2; the trainer shards for itself, so accelerate hears no more.

    Raises:
        FusionRouteError: for what it asks there is another word here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for key, wrong, instead in (
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false; offloading is not supported"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "gradient_checkpointing: true in the recipe's training section"),
    ):
        if os.environ.get(key, "1" if key == "FSDP_VERSION" else "").lower() == wrong:
            raise FusionRouteError(f"accelerate configuration: {key.lower()} is {wrong}; say {instead}")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return True
