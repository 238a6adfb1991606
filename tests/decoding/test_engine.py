"""Every mode ≡ every drafter ≡ rows joining and leaving ≡ the reference model, token for token (fp32)."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import SHAPES
from tests.decoding.conftest import LONGEST, PROMPTS, SAMPLINGS, alternating, write

from fusionroute import FusionRouteForCausalLM
from fusionroute.decoding import fused
from fusionroute.decoding.budget import KVBudget
from fusionroute.decoding.drafting import PromptLookup, RouterDraft
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.members import Members
from fusionroute.decoding.rows import Request
from fusionroute.decoding.sampling import Sampling

pytestmark = pytest.mark.usefixtures("always_drafting")


class Oracle:
    """Drafts what it was told to, right or wrong: acceptances of every length."""

    name = "oracle"

    def __init__(self, drafts: list[list[int]]) -> None:
        self.drafts = drafts

    def start(self) -> "Oracle":
        return Oracle(self.drafts)

    def extend(self, ids: Any) -> None:
        pass

    def propose(self, count: int) -> list[int]:
        return self.drafts.pop(0)[:count] if self.drafts else []


rows = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, len(PROMPTS) - 1),
        "sampling": st.integers(0, len(SAMPLINGS) - 1),
        "tokens": st.integers(1, LONGEST),
        "joins": st.integers(0, 6),
        "end": st.none() | st.integers(0, LONGEST - 1),
        "leaves": st.none() | st.integers(1, 5),
    }
)
engines = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["auto", "lazy", "predicted", "all"]),
        "separate": st.booleans(),
        "blocks": st.booleans(),
        "drafter": st.sampled_from([None, PromptLookup(2, 1), RouterDraft(), "right", "wrong"]),
        "draft_length": st.integers(1, 5),
        "most": st.sampled_from([1, 600, 10**9]),  # logits that are worked on at a time
    }
)


def run(engine: Engine, wanted: list[dict[str, Any]]) -> dict[int, list[tuple[int, str]]]:
    """Submit and cancel rows at their steps; what each wrote."""
    numbers: dict[int, int] = {}
    written: dict[int, list[tuple[int, str]]] = {i: [] for i in range(len(wanted))}
    step = 0
    while engine.active or engine.waiting or len(numbers) < len(wanted):
        for i, row in enumerate(wanted):
            if row["joins"] == step:
                numbers[i] = engine.submit(Request(PROMPTS[row["prompt"]], row["tokens"], SAMPLINGS[row["sampling"]]))
            if row["leaves"] is not None and row["joins"] + row["leaves"] == step:
                engine.cancel(numbers[i])
        owners = {number: i for i, number in numbers.items()}
        for event in engine.step():
            assert event.error is None
            written[owners[event.row]] += [(token.id, token.expert) for token in event.tokens]
        assert engine.members.allocated <= engine.budget.total
        step += 1
    return written


@pytest.mark.parametrize("shape", sorted(SHAPES))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(rows, min_size=1, max_size=4), how=engines, room=st.sampled_from([None, 2]))
def test_an_engine_writes_what_the_reference_writes(
    shape: str,
    wanted: list[dict[str, Any]],
    how: dict[str, Any],
    room: int | None,
    collection: Callable[[str], FusionRouteForCausalLM],
    reference: Callable[[str, int, int], list[tuple[int, str]]],
) -> None:
    model = collection(shape)
    expected = [reference(shape, row["prompt"], row["sampling"])[: row["tokens"]] for row in wanted]
    options = dict(how)
    most = options.pop("most")
    if options["drafter"] in ("right", "wrong"):
        ids = [token for token, _ in expected[0]] * 3
        drafts = [ids[i : i + 4] for i in range(1, 12, 2)]
        options["drafter"] = Oracle(drafts if options["drafter"] == "right" else [d[::-1] for d in drafts])
    members = Members(model, separate=options.pop("separate"), blocks=options.pop("blocks"))
    engine = Engine(model, members=members, **options)
    # An end id of one row is one of all of them.
    ends = {
        expected[i][row["end"]][0]
        for i, row in enumerate(wanted)
        if row["end"] is not None and row["end"] < row["tokens"]
    }
    engine.ends = frozenset(ends)
    for i, tokens in enumerate(expected):
        stop = next((at for at, (token, _) in enumerate(tokens) if token in ends), len(tokens))
        expected[i] = tokens[:stop]
    if room is not None:
        engine.budget = KVBudget(engine.members, engine.members.nbytes([48] * room))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "MOST_LOGITS", most)
        written = run(engine, wanted)
    for i, row in enumerate(wanted):
        if row["leaves"] is None:
            assert written[i] == expected[i]
        else:
            assert written[i] == expected[i][: len(written[i])]
    assert engine.members.allocated == 0


@pytest.mark.parametrize("drafter", [None, PromptLookup(2, 1), RouterDraft()], ids=["none", "lookup", "router"])
@pytest.mark.parametrize("mode", ["lazy", "predicted", "all"])
@pytest.mark.parametrize("head", ["stays", "alternates", "visits all"])
def test_adversarial_heads(head: str, mode: Any, drafter: Any, make_collection: Callable[[str], Any]) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("adapters"))
    model.generation_config.eos_token_id = None
    weight = model.router.route_head.weight.data
    if head == "stays":
        weight.zero_()
    elif head == "visits all":
        weight.normal_(generator=torch.Generator().manual_seed(1), std=20)
    sampling = Sampling()
    if head == "alternates":
        model.router.route_head = Alternating(model)
        sampling = Sampling(mask=alternating)
    prompt = [1, 40, 41, 42, 44]
    expected = write(model, prompt, sampling, 14)
    experts = [expert for _, expert in expected]
    changes = sum(a != b for a, b in itertools.pairwise(experts))
    assert {"stays": changes == 0, "alternates": changes == 13, "visits all": len(set(experts)) == 2}[head]
    engine = Engine(model, mode=mode, drafter=drafter, draft_length=3)
    (answer,) = engine.generate([Request(prompt, 14, sampling)])
    assert [(token.id, token.expert) for token in answer.tokens] == expected


class Alternating(torch.nn.Module):
    """A head that reads the token a hidden state belongs to: the router's blocks are switched off for it."""

    def __init__(self, model: FusionRouteForCausalLM) -> None:
        super().__init__()
        decoder = model.router.member.model.get_decoder()
        for layer in decoder.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.base_layer.weight.data.zero_()
                module.lora_B["router"].weight.data.zero_()
        table = decoder.norm(decoder.embed_tokens.weight).float()
        self.table = torch.nn.functional.normalize(table, dim=-1)
        self.experts = model.config.expert_names
        self.trained = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = (torch.nn.functional.normalize(hidden.float(), dim=-1) @ self.table.T).argmax(-1)
        return torch.nn.functional.one_hot(tokens % 2, 2).float()
