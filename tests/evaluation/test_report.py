"""The figures of a folder written by hand, against figures worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusionroute.evaluation import page, report
from fusionroute.evaluation.names import ORACLE
from fusionroute.evaluation.statistics import difference_of, mean_of
from fusionroute.evaluation.store import Store

# Of two benchmarks with four items each, what every system scores; None has no score.
SCORES: dict[str, dict[str, list[float | None]]] = {
    "fusionroute": {"gsm8k": [1, 1, 0, 1], "mbpp": [1, 0, 0, 0]},
    "expert:math": {"gsm8k": [1, 0, 0, 0], "mbpp": [0, 0, 0, 0]},
    "expert:code": {"gsm8k": [0, 0, 1, 0], "mbpp": [1, 1, None, 0]},
    "collab": {"gsm8k": [0, 1], "mbpp": [1, 0]},
}
TOKENS, SECONDS, PASSES = 10, 2.0, 30.0  # of every answer; Collab takes five times the seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    answers, scores = Store(tmp_path / "answers.jsonl"), Store(tmp_path / "scores.jsonl")
    systems: dict[str, Any] = {}
    for name, tasks in SCORES.items():
        cells: dict[str, Any] = {}
        for task, values in tasks.items():
            keys = [f"{name} {task} {i}" for i in range(len(values))]
            for i, (key, value) in enumerate(zip(keys, values, strict=True)):
                lost = value is None
                answers.put(key, {
                    "system": name, "item": str(i), "prompt": "p", "text": "t", "tokens": TOKENS, "overruled": 2,
                    "seconds": SECONDS * (5 if name == "collab" else 1), "passes": PASSES, "error": None,
                    "finish": "length" if i == 0 else "stop", "pieces": [["math", "t", 6], ["code", "t", 4]],
                })  # fmt: skip
                scores.put(key, {
                    "scores": {"flexible": value or 0.0, "strict": 0.0}, "unscored": "no sandbox" if lost else None,
                    "extracted": None, "weights": {},
                })  # fmt: skip
            cells[task] = {"answers": keys, "scores": keys}
        identity = {"policy": {"alpha": 1.0}}
        systems[name] = {"identity": identity, "routed": name == "fusionroute", "tasks": cells}
    tasks = {
        task: {"settings": {"primary": "flexible"}, "primary": "flexible", "items": list("0123"), "defects": {}}
        for task in ("gsm8k", "mbpp")
    }
    plan = {
        "collection": "tiny", "limit": 4, "dtype": None, "base": None, "batch": 8, "experts": ["math", "code"],
        "reward": None, "judge": None, "collab": {"limit": 2, "rows": 4}, "tasks": tasks, "systems": systems,
        "not_run": {"finetuned": "it was not given"}, "teacher_forced": None,
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


@pytest.fixture
def found(folder: Path) -> dict[str, Any]:
    return report.read(folder)["systems"]


def test_accuracies_and_their_average(found: dict[str, Any]) -> None:
    ours = found["fusionroute"]
    assert [ours["benchmarks"][task]["accuracy"] for task in ("gsm8k", "mbpp")] == [0.75, 0.25]
    assert ours["average"]["accuracy"] == 0.5
    assert (ours["average"]["low"], ours["average"]["high"]) == pytest.approx(
        (mean_of([[1, 1, 0, 1], [1, 0, 0, 0]]).low, mean_of([[1, 1, 0, 1], [1, 0, 0, 0]]).high)
    )


def test_the_difference_is_theirs_less_ours(found: dict[str, Any]) -> None:
    expected = difference_of([[1, 0, 0, 0], [0, 0, 0, 0]], [[1, 1, 0, 1], [1, 0, 0, 0]])
    assert found["expert:math"]["difference"]["accuracy"] == -0.375 == expected.mean
    assert found["expert:math"]["difference"]["p"] == expected.p
    assert "difference" not in found["fusionroute"]


def test_an_item_without_a_score_counts_as_wrong_and_is_named(found: dict[str, Any]) -> None:
    code = found["expert:code"]["benchmarks"]["mbpp"]
    assert (code["accuracy"], code["n"], code["unscored"]) == (0.5, 4, 1)
    assert code["reasons"] == {"2": "no sandbox"}


def test_the_oracle_takes_the_better_expert_of_each_item(found: dict[str, Any]) -> None:
    assert found[ORACLE]["benchmarks"]["gsm8k"]["accuracy"] == 0.5
    assert found[ORACLE]["benchmarks"]["mbpp"]["accuracy"] == 0.5


def test_collab_is_compared_on_its_own_items(found: dict[str, Any]) -> None:
    # Ours on these: 1, 1 and 1, 0.
    assert found["collab"]["average"]["accuracy"] == 0.5
    assert found["collab"]["difference"]["accuracy"] == -0.25


def test_weights_are_those_of_the_collection_that_take_part(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    del plan["systems"]["fusionroute"]
    plan["systems"]["expert:math"]["identity"]["weights"] = {"math": "m"}
    plan["systems"]["expert:code"]["identity"]["weights"] = {"code": "c"}
    plan["systems"]["collab"]["identity"]["weights"] = {"math": "another"}
    (folder / "plan.json").write_text(json.dumps(plan))
    assert report.read(folder)["settings"]["weights"] == {"math": "m", "code": "c"}


def test_costs(folder: Path, found: dict[str, Any]) -> None:
    assert found["fusionroute"]["tokens_per_second"] == 5
    assert found["fusionroute"]["passes_per_token"] == 3
    assert (found["fusionroute"]["mean_tokens"], found["fusionroute"]["cut_off"]) == (10, 0.25)
    assert report.read(folder)["settings"]["collab"]["cost"] == {"seconds": 5, "passes": 1}


def test_who_writes(found: dict[str, Any]) -> None:
    routing = found["fusionroute"]["routing"]["gsm8k"]
    assert routing["shares"] == {"math": 0.6, "code": 0.4}
    assert routing["switch_rate"] == pytest.approx(1 / 9)
    assert routing["overruled_rate"] == 0.2
    assert found["collab"]["routing"] == {}


def test_none_right_is_not_certainly_none(found: dict[str, Any]) -> None:
    none = found["expert:math"]["benchmarks"]["mbpp"]
    assert (none["accuracy"], none["low"]) == (0, 0)
    assert none["high"] == pytest.approx(0.4899, abs=1e-4)  # Wilson's, of 0 in 4


@pytest.mark.parametrize("show", [report.as_markdown, None])
def test_what_is_shown_names_what_has_no_score(folder: Path, show: Any) -> None:
    read = report.read(folder)
    text = page.render(read, folder) if show is None else show(read)
    assert "No score for expert:code on mbpp, items 2: no sandbox." in text
    assert "Not run: finetuned: it was not given." in text
    assert "gsm8k strict" in text
    assert report.unscored(read) == 1


def test_a_share_of_instructions_weighs_as_many_as_there_are(folder: Path) -> None:
    scores = Store(folder / "scores.jsonl")
    for i, (share, count) in enumerate([(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 4.0)]):
        row = {"scores": {"flexible": 1.0, "strict": share}, "unscored": None, "weights": {"strict": count}}
        scores.put(f"fusionroute gsm8k {i}", row)
    # Six of eight, where the mean of the shares is 0.625.
    assert report.read(folder)["systems"]["fusionroute"]["benchmarks"]["gsm8k"]["other"] == {"strict": 0.75}


def test_an_answer_of_no_token_does_not_change_how_often_others_switch(folder: Path) -> None:
    answers = Store(folder / "answers.jsonl")
    row = answers.get("fusionroute gsm8k 0")
    answers.put("fusionroute gsm8k 0", {**(row or {}), "text": "", "tokens": 0, "overruled": 0, "pieces": []})
    routing = report.read(folder)["systems"]["fusionroute"]["routing"]["gsm8k"]
    assert routing["switch_rate"] == pytest.approx(1 / 9)
