"""The whole evaluation on a tiny random collection: what is computed, what is kept, and what the report says of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fusionroute.baselines.collab import CollabSettings
from fusionroute.collection import read_config
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation import page, report
from fusionroute.evaluation.evaluate import TASKS, Evaluation, evaluate
from fusionroute.evaluation.names import ORACLE
from fusionroute.evaluation.reward import RewardModel
from fusionroute.evaluation.store import Store
from fusionroute.evaluation.systems import every_name

DATA = Path(__file__).parent / "fixtures"
QUICK = CollabSettings(candidates=1, rollout=1)


@pytest.fixture(scope="module")
def folder(make_collection: Callable[[str], Path]) -> Path:
    return make_collection("adapters")


def reward_model(folder: Path, out: Path, seed: int) -> str:
    torch.manual_seed(seed)
    base = read_config(folder).router_spec.source
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.score.weight.data.normal_()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return str(out)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Every system on every benchmark, evaluated."""
    out = tmp_path_factory.mktemp("whole")
    reward, judge = (
        reward_model(folder, tmp_path_factory.mktemp(name), seed) for seed, name in enumerate(("reward", "judge"))
    )
    spec = next(spec for spec in read_config(folder).expert_specs if spec.name == "math")
    wanted = Evaluation(
        folder,
        out,
        data=DATA,
        limit=1,
        sft=folder,
        finetuned=f"{spec.source}+{folder / spec.module}",
        reward=reward,
        judge=judge,
        collab=QUICK,
    )
    evaluate(wanted)
    return wanted


def small(folder: Path, out: Path, **more: Any) -> Evaluation:
    settings = {"tasks": ["gsm8k"], "systems": ["fusionroute", "expert:math"], "data": DATA, "batch": 2, **more}
    return Evaluation(folder, out, **settings)


def answers_in(out: Path) -> dict[str, str]:
    return {key: row["text"] for key, row in Store(out / "answers.jsonl").rows.items()}


def test_every_system_has_a_figure_on_every_benchmark(whole: Evaluation) -> None:
    found = report.read(whole.out)
    assert set(found["systems"]) == {*every_name(read_config(whole.collection)), ORACLE}
    assert found["not_run"] == {}
    for name, entry in found["systems"].items():
        assert set(entry["benchmarks"]) == set(TASKS) - {"general"}
        assert all(figures["n"] == 1 for figures in entry["benchmarks"].values())
        if name not in (ORACLE, "finetuned"):
            assert (entry["win_rate"]["against"], entry["win_rate"]["n"]) == ("finetuned", 1)


def test_the_report_is_the_documented_json(whole: Evaluation) -> None:
    found = json.loads(report.as_json(report.read(whole.out)))
    entry = found["systems"]["expert:math"]
    assert {"accuracy", "low", "high", "n", "unscored"} <= set(entry["benchmarks"]["gsm8k"])
    assert {"accuracy", "low", "high", "n", "p"} <= set(entry["difference"])
    assert {"prompt", "shots", "max_new_tokens", "stop"} <= set(found["settings"]["tasks"]["gsm8k"])


def test_systems_that_are_one_and_the_same_answer_once(whole: Evaluation) -> None:
    # Here the collection stands in for the one after phase 1.
    plan = json.loads((whole.out / "plan.json").read_text())
    assert plan["systems"]["sft-only"]["tasks"] == plan["systems"]["fusionroute"]["tasks"]


def test_all_members_run_at_every_token_only_where_they_must(whole: Evaluation) -> None:
    systems = report.read(whole.out)["systems"]
    experts = len(read_config(whole.collection).expert_names)
    for name, passes in {"expert:math": 1, "router": 1, "fixed:math": 2, "uniform": experts, "merge:ties": 1}.items():
        # The prompt's pass gives the first token; the pass that gives the end gives no token.
        assert passes - 0.3 <= systems[name]["passes_per_token"] <= passes * 1.4, name


def test_selection_costs_what_the_experts_cost(whole: Evaluation) -> None:
    systems = report.read(whole.out)["systems"]
    assert systems["sequence-selection"]["passes_per_token"] > systems["expert:math"]["passes_per_token"]


def test_the_oracle_is_no_worse_than_any_expert(whole: Evaluation) -> None:
    systems = report.read(whole.out)["systems"]
    best = max(systems[f"expert:{name}"]["average"]["accuracy"] for name in read_config(whole.collection).expert_names)
    assert systems[ORACLE]["average"]["accuracy"] >= best


def test_markdown_has_a_row_for_each_system(whole: Evaluation) -> None:
    text = report.as_markdown(report.read(whole.out))
    for name in every_name(read_config(whole.collection)):
        assert f"| {name} |" in text or f"| **{name}** |" in text


def test_the_page_needs_nothing_else(whole: Evaluation) -> None:
    text = page.render(report.read(whole.out), whole.out)
    assert "<svg" in text
    assert "query-level-no-complement" in text
    assert not any(mark in text for mark in ("http://", "https://", "<script", "src="))


def test_a_second_run_computes_nothing(whole: Evaluation) -> None:
    before = {
        name: (whole.out / name).read_bytes()
        for name in ("answers.jsonl", "scores.jsonl", "verdicts.jsonl", "plan.json")
    }
    evaluate(whole)
    assert {name: (whole.out / name).read_bytes() for name in before} == before


def test_a_variant_stands_in_the_table(run: Callable, folder: Path, tmp_path: Path) -> None:
    words = ["-c", folder, "--data", DATA, "--tasks", "gsm8k", "--limit", "1", "--variant", f"again={folder}"]
    code, out, _ = run("evaluate", "--out", tmp_path / "out", *words, "--system", "fusionroute,variant:again", "--json")
    entry = json.loads(out)["systems"]["variant:again"]
    assert code == 0
    assert (entry["difference"]["accuracy"], len(answers_in(tmp_path / "out"))) == (0.0, 1)


@pytest.mark.parametrize("entries", [["plain"], ["=here"], ["a,b=here"], ["plain=HERE", "plain=HERE"]])
def test_variants_of_another_form_are_refused(entries: list[str], run: Callable, folder: Path, tmp_path: Path) -> None:
    given = [word for entry in entries for word in ("--variant", entry.replace("HERE", str(folder)))]
    code, _, err = run("evaluate", "--out", tmp_path / "out", "-c", folder, "--data", DATA, *given)
    assert code == 2
    assert "--variant" in err
    assert len(err.splitlines()) == 1


def test_stored_answers_score_the_same_again(whole: Evaluation, tmp_path: Path) -> None:
    shutil.copytree(whole.out, tmp_path / "again")
    (tmp_path / "again" / "scores.jsonl").unlink()
    evaluate(Evaluation(**{**vars(whole), "out": tmp_path / "again"}))
    assert Store(tmp_path / "again" / "scores.jsonl").rows == Store(whole.out / "scores.jsonl").rows


def test_regenerated_answers_are_the_same(folder: Path, tmp_path: Path) -> None:
    for name, batch in (("one", 1), ("two", 1), ("three", 4)):
        evaluate(small(folder, tmp_path / name, batch=batch))
    assert answers_in(tmp_path / "one") == answers_in(tmp_path / "two") == answers_in(tmp_path / "three")


@pytest.mark.parametrize(
    ("system", "kind", "more"), [("query-level", "fixed", 0), ("query-level-no-complement", "expert", 1)]
)
def test_one_decision_per_prompt_shares_the_chosen_experts_answer(
    system: str, kind: str, more: int, folder: Path, tmp_path: Path
) -> None:
    experts = [f"{kind}:{name}" for name in read_config(folder).expert_names]
    evaluate(small(folder, tmp_path / "alone", systems=[system], batch=1))
    evaluate(small(folder, tmp_path / "beside", systems=[system, *experts], batch=1))
    alone, rows = (Store(tmp_path / name / "answers.jsonl").rows for name in ("alone", "beside"))
    assert {key: rows[key]["pieces"] for key in alone} == {key: row["pieces"] for key, row in alone.items()}
    for key, row in alone.items():
        (twin,) = [
            each
            for each in rows.values()
            if each["system"] == f"{kind}:{row['pieces'][0][0]}" and each["item"] == row["item"]
        ]
        assert rows[key]["passes"] == twin["passes"] + more


def test_more_items_keep_those_that_are_there(folder: Path, tmp_path: Path) -> None:
    evaluate(small(folder, tmp_path, limit=1))
    before = (tmp_path / "answers.jsonl").read_text()
    evaluate(small(folder, tmp_path, limit=2))
    after = (tmp_path / "answers.jsonl").read_text()
    assert after.startswith(before)
    assert after.count("\n") == 2 * before.count("\n") == 4


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        words = ["evaluate", "--out", out, "-c", folder, "--data", DATA, "--tasks", "gsm8k", "--batch", "1"]
        return [sys.executable, "-m", "fusionroute", *map(str, words), "--system", "fusionroute,expert:math,uniform"]

    child = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, until = tmp_path / "killed" / "answers.jsonl", time.monotonic() + 120
    while time.monotonic() < until and (not path.exists() or path.read_text().count("\n") < 3):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    half = answers_in(tmp_path / "killed")
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True)
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    assert 3 <= len(half) < len(answers_in(tmp_path / "whole"))
    assert answers_in(tmp_path / "killed") == answers_in(tmp_path / "whole")


def defective(tmp_path: Path) -> Path:
    """The fixtures with a row that lacks its question."""
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    path = data / "gsm8k" / "test.jsonl"
    path.write_text(path.read_text() + json.dumps({"answer": "#### 3"}) + "\n")
    return data


def test_a_defective_row_counts_and_has_no_score(run: Callable, folder: Path, tmp_path: Path) -> None:
    words = ["--data", defective(tmp_path), "--tasks", "gsm8k", "--system", "expert:math", "-c", folder]
    code, out, _ = run("evaluate", "--out", tmp_path / "out", *words, "--json")
    figures = json.loads(out)["systems"]["expert:math"]["benchmarks"]["gsm8k"]
    assert code == 3
    assert figures["unscored"] == 1
    assert figures["n"] == sum(1 for _ in (DATA / "gsm8k" / "test.jsonl").open()) + 1


def test_an_answer_that_cannot_be_kept_is_told_and_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    keep, lost = Store.put, []

    def put(store: Store, key: str, row: dict[str, Any]) -> None:
        if store.path.name == "answers.jsonl" and not lost:
            lost.append(key)
            raise FusionRouteError("no space left")
        keep(store, key, row)

    monkeypatch.setattr(Store, "put", put)
    evaluate(small(folder, tmp_path))
    assert "no space left" in capsys.readouterr().err
    assert report.unscored(report.read(tmp_path)) == 1
    evaluate(small(folder, tmp_path))
    assert report.unscored(report.read(tmp_path)) == 0


def test_held_out_items_are_said_to_be_that(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    shutil.copy(DATA / "gsm8k" / "test.jsonl", tmp_path / "data" / "gsm8k" / "train.jsonl")
    kinds = {"held out": {"data": tmp_path / "data", "held_out": True}, "test": {}}
    for name, more in kinds.items():
        evaluate(small(folder, tmp_path / name, systems=["expert:math"], limit=1, **more))
        found = report.read(tmp_path / name)
        for text in (report.as_markdown(found), page.render(found, tmp_path / name)):
            assert ("rows held out of training" in text) == (name == "held out")


def test_what_cannot_be_run_is_said_when_all_is_asked_for(folder: Path, tmp_path: Path) -> None:
    evaluate(small(folder, tmp_path, systems=["all"], limit=1))
    missing = report.read(tmp_path)["not_run"]
    assert set(missing) == {"sft-only", "no-complement", "sequence-selection", "collab", "finetuned"}
    assert "--sft" in missing["sft-only"]
    assert "Not run: finetuned" in report.as_markdown(report.read(tmp_path))


def test_experts_that_do_not_merge_are_left_out_of_all_and_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise FusionRouteError("tensors that do not fit")

    monkeypatch.setattr("fusionroute.baselines.merging.merge_collection", refuse)
    evaluate(small(folder, tmp_path / "all", systems=["all"], limit=1))
    assert report.read(tmp_path / "all")["not_run"]["merge:ties"] == "tensors that do not fit"
    with pytest.raises(FusionRouteError, match="do not fit"):
        evaluate(small(folder, tmp_path / "named", systems=["all", "merge:ties"], limit=1))


@pytest.mark.parametrize("system", ["sequence-selection", "collab"])
def test_what_cannot_be_run_is_refused_when_it_is_named(system: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{system} needs a reward model: give --reward"):
        evaluate(small(folder, tmp_path, systems=[system]))


@pytest.fixture(scope="module")
def with_collab(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Two items, of which Collab answers one."""
    reward = reward_model(folder, tmp_path_factory.mktemp("reward"), 0)
    out = tmp_path_factory.mktemp("collab")
    wanted = small(folder, out, systems=["fusionroute", "collab"], reward=reward, limit=2, collab=QUICK, collab_limit=1)
    evaluate(wanted)
    return wanted


def test_collab_answers_its_own_number_of_items(with_collab: Evaluation) -> None:
    found = report.read(with_collab.out)
    systems = found["systems"]
    assert [systems[name]["average"]["n"] for name in ("fusionroute", "collab")] == [2, 1]
    assert systems["collab"]["difference"]["n"] == 1
    assert found["settings"]["collab"]["limit"] == 1
    assert "the first 1 items" in report.as_markdown(found)


def test_what_collab_costs_is_told_beside_what_fusionroute_costs(with_collab: Evaluation) -> None:
    found = report.read(with_collab.out)
    cost = found["settings"]["collab"]["cost"]
    assert cost["passes"] > 1
    assert "times the passes" in report.as_markdown(found)


def test_collab_with_other_knobs_is_another_system(with_collab: Evaluation) -> None:
    before = answers_in(with_collab.out)
    evaluate(replace(with_collab, collab=CollabSettings(candidates=1, rollout=2)))
    assert len(answers_in(with_collab.out)) == len(before) + 1


def test_a_folder_without_an_evaluation_has_no_report(run: Callable, tmp_path: Path) -> None:
    code, _, error = run("report", tmp_path)
    assert code == 1
    assert "fusionroute evaluate" in error


def test_collab_alone_needs_no_answers_of_the_experts(folder: Path, tmp_path: Path) -> None:
    reward = reward_model(folder, tmp_path / "reward", 0)
    evaluate(small(folder, tmp_path / "out", systems=["collab"], reward=reward, collab=QUICK, collab_limit=1))
    assert len(answers_in(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"collab": CollabSettings(reference="nobody")}, "nobody"),
        ({"tasks": ["nothing"]}, "nothing"),
        (
            {"tasks": ["gsm8k", "general"], "systems": ["fusionroute", "collab"], "against": "collab"},
            "--against collab",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    wrong: dict[str, Any], told: str, folder: Path, tmp_path: Path
) -> None:
    reward = reward_model(folder, tmp_path / "reward", 0)
    with pytest.raises(UsageError, match=told):
        evaluate(small(folder, tmp_path / "out", **{"reward": reward, "judge": reward, **wrong}))
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_an_answer_to_a_general_prompt_that_is_missing_is_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "put", lambda store, key, row: None)
    evaluate(small(folder, tmp_path, tasks=["general"], systems=["expert:math"], limit=1))
    found = report.read(tmp_path)
    assert report.unscored(found) == 1
    assert "expert:math has no answer to 1 items of general" in report.as_markdown(found)


def test_a_reward_that_is_no_number_selects_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = reward_model(folder, tmp_path / "reward", 0)
    monkeypatch.setattr(RewardModel, "score", lambda model, pairs: [float("nan")] * len(pairs))
    wanted = small(folder, tmp_path / "out", systems=["sequence-selection"], reward=reward, limit=1)
    evaluate(wanted)
    assert report.unscored(report.read(wanted.out)) == 1
    monkeypatch.undo()
    evaluate(wanted)
    assert report.unscored(report.read(wanted.out)) == 0
