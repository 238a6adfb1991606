"""Reports that differ in one thing each."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fusionroute.cli import app
from fusionroute.errors import FusionRouteError
from fusionroute.evaluation import comparison, report


def estimate(value: float) -> dict[str, Any]:
    return {"accuracy": value, "low": value - 0.1, "high": value + 0.1, "n": 50, "unscored": 0}


@pytest.fixture
def published() -> dict[str, Any]:
    judge = {"identity": {"reward": "a"}, "against": "finetuned"}
    task = {"sha256": "1", "prompt": "{{question}}", "packages": {"lm-eval": "1"}}
    tasks = {"gsm8k": copy.deepcopy(task), "mbpp": copy.deepcopy(task)}
    systems = {
        name: {
            "benchmarks": {"gsm8k": estimate(value), "mbpp": estimate(value)},
            "average": estimate(value),
            "win_rate": {"rate": value, "low": value - 0.1, "high": value + 0.1, "n": 20, "unscored": 0},
        }
        for name, value in (("fusionroute", 0.5), ("router", 0.3))
    }
    settings = {"tasks": tasks, "weights": {"router": "r", "math": "m"}, "judge": judge, "limit": 50, "dtype": None}
    return {"systems": systems, "settings": settings}


@pytest.fixture
def found(published: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(published)


def figures(comparison: dict[str, Any]) -> set[tuple[str, str]]:
    return {(each["system"], each["figure"]) for each in comparison["figures"]}


def test_every_figure_of_the_same_report_is_inside(published: dict[str, Any], found: dict[str, Any]) -> None:
    compared = comparison.compare(published, found)
    kinds = ("gsm8k", "mbpp", "average", "win rate")
    assert figures(compared) == {(name, kind) for name in ("fusionroute", "router") for kind in kinds}
    assert (comparison.outside(compared), compared["notes"]) == (0, [])
    assert "8 of 8 figures" in comparison.as_markdown(compared)


@pytest.mark.parametrize(("value", "outside"), [(0.4, 0), (0.6, 0), (0.39, 1), (0.61, 1)])
def test_a_figure_is_inside_up_to_the_ends_of_the_published_interval(
    published: dict[str, Any], found: dict[str, Any], value: float, outside: int
) -> None:
    # Its own interval does not count, however wide it is.
    found["systems"]["fusionroute"]["benchmarks"]["mbpp"] = estimate(value) | {"low": 0.0, "high": 1.0, "n": 2}
    published["systems"]["fusionroute"]["benchmarks"]["mbpp"] |= {"low": 0.4, "high": 0.6}
    assert comparison.outside(comparison.compare(published, found)) == outside


def test_one_row_is_enough(published: dict[str, Any], found: dict[str, Any]) -> None:
    del found["systems"]["fusionroute"]
    assert {system for system, _ in figures(comparison.compare(published, found))} == {"router"}


def test_other_items_are_not_compared_and_no_average_over_them(
    published: dict[str, Any], found: dict[str, Any]
) -> None:
    found["settings"]["tasks"]["gsm8k"]["sha256"] = "2"
    compared = comparison.compare(published, found)
    assert {figure for _, figure in figures(compared)} == {"mbpp", "win rate"}
    assert compared["notes"] == ["gsm8k is not compared, since it was not asked alike: sha256"]


def test_another_version_of_a_package_is_compared(published: dict[str, Any], found: dict[str, Any]) -> None:
    found["settings"]["tasks"]["gsm8k"]["packages"] = {"lm-eval": "2"}
    assert comparison.compare(published, found)["notes"] == []


def test_an_average_over_fewer_benchmarks_is_not_compared(published: dict[str, Any], found: dict[str, Any]) -> None:
    for system in found["systems"].values():
        del system["benchmarks"]["mbpp"]
    assert {figure for _, figure in figures(comparison.compare(published, found))} == {"gsm8k", "win rate"}


def test_win_rates_of_another_judge_are_not_compared(published: dict[str, Any], found: dict[str, Any]) -> None:
    found["settings"]["judge"]["identity"] = {"reward": "b"}
    assert "win rate" not in {figure for _, figure in figures(comparison.compare(published, found))}


def test_other_weights_and_another_limit_are_said(published: dict[str, Any], found: dict[str, Any]) -> None:
    found["settings"] |= {"weights": {"router": "r", "math": "other"}, "limit": 20}
    notes = comparison.compare(published, found)["notes"]
    assert notes == ["the weights are others: math", "limit is 20 here and 50 in the published report"]


def test_weights_that_take_no_part_are_not_said_to_be_others(published: dict[str, Any], found: dict[str, Any]) -> None:
    found["settings"]["weights"] = {"math": "m"}
    assert comparison.compare(published, found)["notes"] == []


def test_items_without_a_score_are_said(published: dict[str, Any], found: dict[str, Any]) -> None:
    found["systems"]["router"]["benchmarks"]["mbpp"]["unscored"] = 3
    (note,) = comparison.compare(published, found)["notes"]
    assert note.startswith("3 items have no score")


def test_nothing_in_common_is_an_error(published: dict[str, Any], found: dict[str, Any]) -> None:
    found["systems"] = {"uniform": found["systems"]["router"]}
    with pytest.raises(FusionRouteError, match=r"nothing to compare.*fusionroute, router"):
        comparison.compare(published, found)


@pytest.mark.parametrize("text", ["[]", "{}", '{"systems": {}, "settings": {}}', '{"systems": {}, "settings": null}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(FusionRouteError, match="is no report"):
        comparison.read(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("spoil", "code"), [(lambda average: None, 0), (lambda average: average.update(low=2, high=3), 1)]
)
def test_the_command_says_by_its_exit_code_whether_all_agree(
    tmp_path: Path,
    published: dict[str, Any],
    found: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[dict[str, Any]], None],
    code: int,
) -> None:
    spoil(published["systems"]["router"]["average"])
    (tmp_path / "published.json").write_text(json.dumps(published))
    monkeypatch.setattr(report, "read", lambda folder: found)
    ran = CliRunner().invoke(app, ["report", "results", "--against", str(tmp_path / "published.json"), "--json"])
    assert ran.exit_code == code
    assert len(json.loads(ran.stdout)["figures"]) == 8
