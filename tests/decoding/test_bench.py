import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fusionroute import FusionRouteForCausalLM, load_tokenizer
from fusionroute.decoding import bench, bench_report


@pytest.fixture(scope="module")
def document(make_collection: Callable[[str], Path]) -> dict:
    folder = make_collection("adapters")
    return bench.decode(FusionRouteForCausalLM.from_pretrained(folder), load_tokenizer(folder), quick=True)


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
    assert bench.loops(ids) == looping
