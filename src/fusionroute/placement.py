"""Where and how each member runs. Knows names of devices and dtypes, no tensor; imports nothing heavy."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fusionroute.errors import UsageError


@dataclass(frozen=True)
class Placement:
    """One member's device, dtype and attention implementation; None leaves it as for the others.

    `int8` and `int4` as dtype round the weights of an expert that is a whole model (`fusionroute.quantisation`).

    Members on one base share its weights only where all three are the same.
    """

    device: str | None = None
    dtype: str | None = None
    attention: str | None = None


def parse_placements(entries: Iterable[str]) -> dict[str, Placement]:
    """By member, from `NAME=DEVICE[,DTYPE[,ATTENTION]]`; what is left empty is as for the others.

    Raises:
        UsageError: another form, or a member named twice.
    """
    found: dict[str, Placement] = {}
    for entry in entries:
        name, equals, rest = entry.partition("=")
        parts = [part.strip() or None for part in rest.split(",")]
        if not (name and equals and any(parts)) or len(parts) > 3:
            raise UsageError(f"--place {entry!r} must be NAME=DEVICE[,DTYPE[,ATTENTION]], such as math=cuda:1,bfloat16")
        if name in found:
            raise UsageError(f"--place names {name} twice")
        found[name] = Placement(*parts)
    return found


def best_device() -> str:
    """What commands run on if nothing else is asked for: the first GPU, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def loading(*, dtype: str | None, base: str | None, device: str | None, place: Iterable[str] | None) -> dict[str, Any]:
    """What a command's options are as arguments of `FusionRouteForCausalLM.from_pretrained`."""
    return {
        "dtype": dtype,
        "base": base,
        "device": device or best_device(),
        "placement": parse_placements(place or ()),
    }
