"""From sums per item to figures: ratios of sums in plain Python, on rows of no meaning."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fusionroute.evaluation import forced_figures
from fusionroute.evaluation.statistics import resamples
from fusionroute.evaluation.store import Store


def made_rows(generator: random.Random, count: int) -> dict[str, dict[str, Any]]:
    """Rows of two experts with figures of no meaning."""
    names = ["routed", "best per token", "router", "uniform", "expert a", "expert b", "alpha 0.0", "alpha 1.0"]
    rows = {}
    for number in range(count):
        tokens = generator.randint(3, 30)
        disagree = generator.randint(0, 3) if number else 2
        sums = [
            {name: size * generator.random() for name in [f"{m}/{n}" for m in ("nll", "top1") for n in names]}
            | {"accuracy": size * generator.random()}
            for size in (tokens, disagree)
        ]
        rows[f"k{generator.random()}"] = {
            "item": str(number),
            "error": None,
            "cut": number == 1,
            "tokens": tokens,
            "disagree": disagree,
            "sums": sums[0],
            "sums_disagree": sums[1],
        }
    return rows


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Figures of two benchmarks, and their rows."""
    generator, store = random.Random(1), Store(tmp_path_factory.mktemp("figures") / "forced.jsonl")
    rows = {"gsm8k": made_rows(generator, 12), "mbpp": made_rows(generator, 7)}
    for each in rows.values():
        store.rows |= each
    store.rows["bad"] = {"item": "7", "error": "its prompt is long"}
    tasks = {"gsm8k": [*rows["gsm8k"], None], "mbpp": [*rows["mbpp"], "bad", "absent"]}
    plan = {"tasks": tasks, "alphas": [0.0, 1.0], "alpha": 1.0, "max_tokens": 300, "without_references": ["ifeval"]}
    found = forced_figures.read(plan, ["a", "b"], store)
    assert found is not None
    return found, {task: list(each.values()) for task, each in rows.items()}


def ratio(rows: list[dict[str, Any]], name: str, kind: str = "") -> float:
    return sum(row[f"sums{kind}"][name] for row in rows) / sum(row["disagree" if kind else "tokens"] for row in rows)


def test_figures_are_ratios_of_sums(figures: Any) -> None:
    found, rows = figures
    for task, each in rows.items():
        section = found["benchmarks"][task]
        for measure_, (what, kind) in {
            "nll": ("nll", ""), "nll_disagree": ("nll", "_disagree"),
            "top1": ("top1", ""), "top1_disagree": ("top1", "_disagree"),
        }.items():  # fmt: skip
            of = {n: ratio(each, f"{what}/{n}", kind) for n in ("routed", "best per token", "expert a", "expert b")}
            best = (min if what == "nll" else max)(of["expert a"], of["expert b"])
            assert section[measure_]["chosen"]["value"] == pytest.approx(of["routed"])
            assert section[measure_]["best_expert"]["value"] == pytest.approx(best)
            assert section[measure_]["oracle"]["value"] == pytest.approx(of["best per token"])
            closed = (best - of["routed"]) / (best - of["best per token"])
            assert section["gap_closed"][measure_]["value"] == pytest.approx(closed)
        assert section["agreement"]["all"]["value"] == pytest.approx(ratio(each, "accuracy"))
        assert [row["alpha"] for row in section["alpha"]] == [0.0, 1.0]
        assert section["alpha"][1]["top1_disagree"] == section["top1_disagree"]["fused"]


def test_the_average_weighs_benchmarks_alike(figures: Any) -> None:
    found, rows = figures
    expected = sum(ratio(each, "nll/routed") for each in rows.values()) / 2
    assert found["average"]["nll"]["chosen"]["value"] == pytest.approx(expected)


def test_an_interval_is_the_bootstraps_over_items(figures: Any) -> None:
    found, rows = figures
    generator = random.Random(0)
    drawn = sorted(
        ratio(generator.choices(rows["gsm8k"], k=len(rows["gsm8k"])), "nll/routed", "_disagree") for _ in range(4000)
    )
    figure = found["benchmarks"]["gsm8k"]["nll_disagree"]["chosen"]
    width = drawn[3899] - drawn[100]
    assert figure["low"] == pytest.approx(drawn[100], abs=0.1 * width)
    assert figure["high"] == pytest.approx(drawn[3899], abs=0.1 * width)


def test_every_item_asked_for_is_counted(figures: Any) -> None:
    found, _ = figures
    assert [found["benchmarks"]["mbpp"][name] for name in ("items", "unmeasured", "cut")] == [9, 2, 1]
    assert found["benchmarks"]["mbpp"]["reasons"] == {"7": "its prompt is long"}
    assert [found["average"][name] for name in ("items", "unmeasured", "cut")] == [22, 3, 2]
    text = "\n".join(forced_figures.lines(found))
    assert "2 of 9 items of mbpp" in text
    assert "its prompt is long" in text
    assert "ifeval" in text


def test_where_experts_never_differ_there_is_no_figure(tmp_path: Path) -> None:
    store, rows = Store(tmp_path / "forced.jsonl"), made_rows(random.Random(2), 3)
    for row in rows.values():
        row["disagree"], row["sums_disagree"] = 0, dict.fromkeys(row["sums_disagree"], 0.0)
    store.rows |= rows
    plan = {"tasks": {"gsm8k": list(rows)}, "alphas": [0.0, 1.0], "alpha": 1.0, "max_tokens": 9}
    found = forced_figures.read({**plan, "without_references": []}, ["a", "b"], store)
    assert found is not None
    assert found["average"]["top1_disagree"]["chosen"] is None
    json.dumps(found, allow_nan=False)
    assert "| – |" in "\n".join(forced_figures.lines(found))


def test_resamples_begin_with_the_items_as_they_are() -> None:
    weights = resamples(5)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 5).all()
    assert len({tuple(draw) for draw in weights[1:50]}) > 20
