"""Rows with policies of their own, in one batch, against the reference model row by row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.decoding.conftest import PROMPTS, SAMPLINGS, write

from fusionroute import FusionRouteForCausalLM
from fusionroute.decoding.drafting import PromptLookup, RouterDraft
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.members import Members
from fusionroute.decoding.rows import Request

POLICIES: list[dict[str, Any]] = [
    {"routing": routing, "alpha": alpha, "expert": expert}
    for routing in ("token", "query", "uniform")
    for alpha in (0.0, 0.7)
    for expert in (None, "math")
]


@pytest.fixture(scope="module")
def expected(collection: Callable[[str], FusionRouteForCausalLM]) -> Callable[[str, int], list[Any]]:
    """What the reference writes under every policy, prompts and samplings in turn."""
    known: dict[str, list[Any]] = {}

    def get(shape: str) -> list[Any]:
        if shape not in known:
            model = collection(shape)
            known[shape] = [
                write(model, PROMPTS[i % len(PROMPTS)], SAMPLINGS[i % len(SAMPLINGS)], 12, **policy)
                for i, policy in enumerate(POLICIES)
            ]
        return known[shape]

    return get


@pytest.mark.parametrize("drafter", [None, PromptLookup(2, 1), RouterDraft()], ids=["none", "lookup", "router"])
@pytest.mark.parametrize("mode", ["lazy", "predicted", "all"])
@pytest.mark.parametrize(("shape", "separate"), [("adapters", False), ("adapters", True), ("llama", False)])
def test_policies_stand_beside_each_other(
    shape: str, separate: bool, mode: Any, drafter: Any, collection: Any, expected: Any
) -> None:
    model = collection(shape)
    engine = Engine(model, mode=mode, members=Members(model, separate=separate), drafter=drafter)
    requests = [
        Request(PROMPTS[i % len(PROMPTS)], 12, SAMPLINGS[i % len(SAMPLINGS)], **policy)
        for i, policy in enumerate(POLICIES)
    ]
    answers = engine.generate(requests)
    assert [[(t.id, t.expert) for t in answer.tokens] for answer in answers] == expected(shape)


def test_a_query_row_without_complement_leaves_the_router_after_the_prompt(collection: Any) -> None:
    engine = Engine(collection("llama"), mode="lazy")
    engine.generate([Request(PROMPTS[1], 8, routing="query", alpha=0.0)])
    assert engine.members.tokens[0] == len(PROMPTS[1])


@pytest.mark.parametrize("drafter", [None, PromptLookup(2, 1), RouterDraft()], ids=["none", "lookup", "router"])
def test_the_router_alone_writes_what_its_model_writes(collection: Any, drafter: Any) -> None:
    model = collection("adapters")
    (answer,) = Engine(model, drafter=drafter).generate([Request(PROMPTS[1], 10, expert="router")])
    ids = list(PROMPTS[1])
    for token in answer.tokens:
        with torch.no_grad():
            logits = model.router(input_ids=torch.tensor([ids])).logits[0, -1, : model.config.vocab_size]
        assert (token.id, token.expert) == (int(logits.argmax()), "router")
        ids.append(token.id)
