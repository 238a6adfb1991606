import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusionroute import FusionRouteForCausalLM, load_tokenizer
from fusionroute.decoding import bench, bench_report
from fusionroute.decoding.bench_checks import agreement, step_times, weights_in_memory
from fusionroute.decoding.bench_turns import Turn, loops
from fusionroute.decoding.members import Members

Load = Callable[[], FusionRouteForCausalLM]


@pytest.fixture(scope="module")
def load(make_collection: Callable[[str], Path]) -> Load:
    """An engine moves weights, so each test that makes one takes its own."""
    return lambda: FusionRouteForCausalLM.from_pretrained(make_collection("adapters"))


@pytest.fixture(scope="module")
def document(load: Load, make_collection: Callable[[str], Path]) -> dict:
    return bench.decode(load(), load_tokenizer(make_collection("adapters")), quick=True)


def test_every_mode_and_drafter_is_measured(document: dict) -> None:
    measured = {(row["mode"], row["drafter"]) for row in document["results"]}
    assert {mode for mode, _ in measured} == {bench.YARDSTICK, *bench.MODES}
    assert ("adapter-rows-predicted", "prompt-lookup") in measured
    assert all(row["tokens_per_second"] > 0 for row in document["results"])


def test_the_yardstick_is_one(document: dict) -> None:
    assert next(row["ratio"] for row in document["results"] if row["mode"] == bench.YARDSTICK) == 1.0


def test_it_is_json_and_a_table(document: dict) -> None:
    assert json.loads(json.dumps(document)) == document
    assert "| separate-lazy | prompt-lookup |" in bench_report.render(document)


def test_it_can_be_drawn(document: dict, tmp_path: Path) -> None:
    bench_report.plot(document, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("ids", "looping"),
    [([], False), (list(range(60)), False), ([5] * 24, True), ([5] * 10, False), ([*range(30), *[1, 2, 3] * 8], True)],
)
def test_loops(ids: list[int], looping: bool) -> None:
    assert loops(ids) == looping


def test_turns_add_up_but_for_the_peak() -> None:
    a, b = Turn(tokens=3, answers=[[1]], kv_bytes=5), Turn(tokens=4, answers=[[2]], kv_bytes=2)
    assert vars(a + b) == vars(Turn(tokens=7, answers=[[1], [2]], kv_bytes=5))


def test_in_float32_an_engine_agrees_with_the_reference(load: Load) -> None:
    model = load()
    found = agreement(model, Members(model), "predicted", [[5, 6, 7], [9]], 12)
    assert (found["tokens"], found["routes"]) == (1.0, 1.0)
    assert found["largest_logit_difference"] < 1e-3


def test_a_wrong_engine_does_not_agree(load: Load) -> None:
    model = load()
    members = Members(model)
    members.pools[0].head.scale = -1.0
    found = agreement(model, members, "predicted", [[5, 6, 7]], 12)
    assert found["tokens"] < 1.0
    assert found["largest_logit_difference"] > 0.1


def test_shared_weights_count_once_and_layouts_beside_them(load: Load) -> None:
    model = load()
    own = sum(p.nbytes for p in {id(p): p for m in model.members for p in m.model.parameters()}.values())
    plain = weights_in_memory(model, Members(model, blocks=False))
    # The packed pass has copies of the low-rank factors.
    assert own <= plain < 1.5 * own
    assert 1.5 * own < weights_in_memory(model, Members(model, blocks=True)) < 2.5 * own


def test_a_step_is_timed_along_the_row(load: Load) -> None:
    model = load()
    found = step_times(model, Members(model), 24, 4)
    assert {name: len(times) for name, times in found.items()} == {"sticky": 4, "alternating": 4}
    assert isinstance(model.router.route_head, torch.nn.Linear)


def test_the_table_tells_what_was_measured_apart(document: dict) -> None:
    more = {
        "looping": document["results"][:1],
        "agreement": [{"mode": "separate-lazy", "tokens": 0.9951, "routes": 1.0, "largest_logit_difference": 0.52}],
        "step_milliseconds": {"sticky": [1.0, 2.0]},
    }
    text = bench_report.render({**document, "conditions": {**document["conditions"], "looping_prompts": 3}, **more})
    assert "3 prompts whose answer loops" in text
    assert "separate-lazy: 99.5% of tokens" in text
    assert "routes sticky, ms: 1.0 2.0" in text
