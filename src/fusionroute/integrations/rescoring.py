"""Who wrote a finished text: the router alone reads it once more, and its scores are the routes that wrote it.

For engines that cannot report routes. In float32 these are the engine's own; in bfloat16 a near tie may round the other
way. Experts are not loaded, so what each side would have written is not known here.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fusionroute import collection, fusion
from fusionroute.configuration import ROUTER
from fusionroute.lm_head import hidden_states
from fusionroute.members import LoadOptions, load_members
from fusionroute.router import RouteHead, head_width
from fusionroute.serving.words import Words


class Rescoring:
    """The router of the collection in `folder`, on the CPU; `base` as in `fusionroute serve --base`."""

    def __init__(self, folder: Path, base: str | None = None) -> None:
        config = collection.read_config(folder)
        spec = config.specs_on(base)[0]
        (self.member,) = load_members([spec], folder, LoadOptions(other_base=None if base is None else spec.source))
        self.names = config.expert_names
        self.head = RouteHead.load(folder / ROUTER, self.names, head_width(self.member.model))
        self.words = Words(collection.load_tokenizer(folder, base=base))
        ends = config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    @torch.inference_mode()
    def __call__(self, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """The field `fusionroute` of one answer: its tokens without the end id, shares, switch rate, `rescored`."""
        if tokens and tokens[-1] in self.ends:
            tokens = tokens[:-1]
        written: list[dict[str, Any]] = []
        if tokens:
            self.member.activate()
            # What is decided at a position writes the token after it.
            hidden = hidden_states(self.member.model, input_ids=torch.tensor([[*prompt, *tokens[:-1]]]))
            scores = self.head(hidden[0, -len(tokens) :])
            routes, weights = fusion.route(scores).tolist(), scores.softmax(dim=-1).tolist()
            written = [
                {
                    "id": token,
                    "text": self.words.text(token),
                    "expert": self.names[index],
                    "weights": {name: round(weight, 4) for name, weight in zip(self.names, row, strict=True)},
                }
                for token, index, row in zip(tokens, routes, weights, strict=True)
            ]
        experts = [entry["expert"] for entry in written]
        return {
            "tokens": written,
            "shares": {name: experts.count(name) / max(len(experts), 1) for name in self.names},
            "switch_rate": sum(a != b for a, b in pairwise(experts)) / max(len(experts) - 1, 1),
            "rescored": True,
        }
