"""A collection made ready to write, as `generate`, `chat` and `serve` do it. Imports nothing of training."""

from pathlib import Path
from typing import Any

from fusionroute import collection as collections
from fusionroute.decoding.drafting import PromptLookup
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.members import Members
from fusionroute.modeling import FusionRouteForCausalLM
from fusionroute.progress import quiet


def load_engine(
    folder: Path, *, kv_budget: int | None = None, reuse: bool = False, compile: bool = False, **loading: Any
) -> Engine:
    """The engine of the collection in `folder`, with its tokenizer; it drafts where members can take tokens back.

    Args:
        kv_budget: as of `Engine`, in bytes.
        reuse: as of `Engine`, where members can take tokens back.
        compile: as of `Members`.
        loading: arguments of `FusionRouteForCausalLM.from_pretrained`.

    Raises:
        FusionRouteError: the collection does not load.
    """
    with quiet():
        model = FusionRouteForCausalLM.from_pretrained(folder, **loading)
        tokenizer = collections.load_tokenizer(folder, base=loading.get("base"))
    members = Members(model, compile=compile)
    return Engine(
        model,
        tokenizer,
        members=members,
        drafter=PromptLookup() if members.rewindable else None,
        kv_budget=kv_budget,
        reuse=reuse and members.rewindable,
    )
