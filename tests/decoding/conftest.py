"""What the reference model writes, token by token, for a pool of prompts and ways of sampling."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fusionroute import FusionRouteForCausalLM
from fusionroute.decoding.pace import Acceptance, FastestMode
from fusionroute.decoding.rows import ALL
from fusionroute.decoding.sampling import Sampling, draw

LONGEST = 16
PROMPTS = ([7], [1, 40, 41, 42, 43], [9, 12] * 6, list(range(20, 43)), [300, 4, 4, 4, 5], [88, 90, 88, 90, 88])
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.2, seed=3),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=11),
    Sampling(temperature=1.0, min_p=0.05, repetition_penalty=1.3, seed=5),
    Sampling(repetition_penalty=1.5),
)


def alternating(ids: Sequence[int]) -> list[int]:
    """A mask: even ids at even positions, odd ones at odd positions."""
    return [token for token in range(3, 300) if token % 2 == len(ids) % 2]


def write(
    model: FusionRouteForCausalLM,
    prompt: Sequence[int],
    sampling: Sampling,
    count: int = LONGEST,
    alpha: float | None = None,
    expert: str | None = None,
    routing: Any = "token",
) -> list[tuple[int, str]]:
    """The next `count` tokens and their experts, every member recomputing the whole row at every token."""
    ids, written = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            output = model(
                torch.tensor([ids]),
                logits_to_keep=1,
                alpha=alpha,
                expert=expert,
                routing=routing,
                prompt_length=len(prompt),
            )
        token = draw(output.logits[0, -1], sampling, ids=ids, new=len(ids) - len(prompt))
        route = int(output.routes[0, -1])
        written.append((token, ALL if route < 0 else model.config.expert_names[route]))
        ids.append(token)
    return written


@pytest.fixture(scope="session")
def collection(make_collection: Callable[[str], Any]) -> Callable[[str], FusionRouteForCausalLM]:
    """A function from a shape to its model without end ids; an engine moves weights, so not the shared one."""
    loaded: dict[str, FusionRouteForCausalLM] = {}

    def get(shape: str) -> FusionRouteForCausalLM:
        if shape not in loaded:
            loaded[shape] = FusionRouteForCausalLM.from_pretrained(make_collection(shape))
            loaded[shape].generation_config.eos_token_id = None
        return loaded[shape]

    return get


@pytest.fixture(scope="session")
def reference(collection: Callable[[str], FusionRouteForCausalLM]) -> Callable[[str, int, int], list[tuple[int, str]]]:
    """A function from a shape and the numbers of a prompt and a way of sampling to what the reference writes."""
    known: dict[tuple[str, int, int], list[tuple[int, str]]] = {}

    def get(shape: str, prompt: int, sampling: int) -> list[tuple[int, str]]:
        key = (shape, prompt, sampling)
        if key not in known:
            known[key] = write(collection(shape), PROMPTS[prompt], SAMPLINGS[sampling])
        return known[key]

    return get


@pytest.fixture(scope="module")
def always_drafting() -> Iterator[None]:
    """Draft as much as may be, a little, or nothing, and take each mode that drafts, in turn and whatever it costs.

    What pays on tiny models would be left to chance.
    """
    turns, steps = itertools.cycle((8, 8, 0, 8, 2)), itertools.count()

    def take_turns(self: FastestMode[tuple[str, bool]], rows: int) -> tuple[str, bool]:
        modes = [mode for mode in self.modes if mode[1]] or self.modes
        return modes[next(steps) // 3 % len(modes)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Acceptance, "count", lambda self, price, worth: min(next(turns), self.longest))
        patch.setattr(FastestMode, "current", take_turns)
        yield
