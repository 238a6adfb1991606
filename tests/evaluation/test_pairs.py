"""Pairs from checkers on a tiny random collection: its own words are made the right answers."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nltk
import pytest
import yaml

from fusionroute import collection as collections
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.rows import Request
from fusionroute.decoding.sampling import Sampling
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation.answering import load_engine
from fusionroute.evaluation.benchmarks import TASK_FILES
from fusionroute.evaluation.extraction import last_number
from fusionroute.evaluation.pair_settings import PairSettings
from fusionroute.evaluation.pairing import WHOLE, Candidate
from fusionroute.evaluation.pairs import _Maker, describe, make_pairs
from fusionroute.evaluation.problems import HINTED, ROWS, Problem, find_problems
from fusionroute.evaluation.scoring import ifeval
from fusionroute.recipe import load_recipe
from fusionroute.training.overlap import BenchmarkIndex
from fusionroute.training.rows import find_rows, load_rows, parse_spec

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
QUESTIONS = [f"How many cows has farmer {number}?" for number in range(8)]
MBPP = {
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"],
    "test_setup_code": "",
    "task_id": 601,
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def stored(wanted: PairSettings) -> list[dict[str, Any]]:
    """The answers beside the pairs, verdicts left out."""
    return [row for row in read(wanted.out.with_suffix(".samples.jsonl")) if "text" in row]


def answers_of(questions: list[str], answer: str = "So #### 123456789") -> list[dict[str, Any]]:
    return [{"question": question, "answer": answer} for question in questions]


def settings(folder: Path, out: Path, **more: Any) -> PairSettings:
    """Hot enough that a random model comes to an end now and then, and says a number now and then."""
    given: dict[str, Any] = {"tasks": ["gsm8k"], "rows": {"start": 0, "stop": 8}, "samples": 12, "temperature": 1.5}
    given |= {"max_new_tokens": 60, "all_rows": True}
    return PairSettings(folder, out / "pairs.jsonl", out / "data", **{**given, **more})


@pytest.fixture(scope="module")
def folder(make_collection: Callable[[str], Path]) -> Path:
    return make_collection("adapters")


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PairSettings, dict[str, Any]]:
    """Pairs of eight problems, one of which has an answer that was given to it, and their summary."""
    out = tmp_path_factory.mktemp("pairs")
    wanted = settings(folder, out)
    write(out / "data" / "gsm8k" / "train.jsonl", answers_of(QUESTIONS))
    with pytest.raises(FusionRouteError, match="no pair"):
        make_pairs(wanted)
    said: dict[int, set[Any]] = {}
    for row in stored(wanted):
        if row["finish"] == "stop" and row["text"].strip():
            said.setdefault(int(row["problem"].rpartition(":")[2]), set()).add(last_number(row["text"]))
    line, number = next((n, max(v - {None})) for n, v in said.items() if len(v) > 1 and v != {None})
    rows = answers_of(QUESTIONS)
    rows[line - 1]["answer"] = f"Counted. #### {number}"
    write(out / "data" / "gsm8k" / "train.jsonl", rows)
    return wanted, make_pairs(wanted)


def test_a_pair_is_a_right_and_a_wrong_answer_of_one_problem(made: tuple[PairSettings, dict[str, Any]]) -> None:
    wanted, _ = made
    (pair,) = read(wanted.out)
    right = last_number(read(wanted.data / "gsm8k" / "train.jsonl")[pair["provenance"]["line"] - 1]["answer"])
    assert last_number(pair["chosen"][0]["content"]) == right
    assert last_number(pair["rejected"][0]["content"]) != right


def test_the_prompt_is_that_of_the_training_rows(made: tuple[PairSettings, dict[str, Any]]) -> None:
    wanted, _ = made
    (pair,) = read(wanted.out)
    spec = ROWS["gsm8k"].model_copy(update=dict(wanted.rows))
    rows = {found.number: found.row for found in find_rows(spec, wanted.data)[0]}
    assert pair["prompt"] == rows[pair["provenance"]["line"]]["messages"][:-1]


def test_provenance_names_the_samples(made: tuple[PairSettings, dict[str, Any]]) -> None:
    wanted, _ = made
    (pair,) = read(wanted.out)
    by_seed = {row["seed"]: row for row in stored(wanted)}
    for side in ("chosen", "rejected"):
        drawn = pair["provenance"][side]
        assert by_seed[drawn["seed"]]["text"] == pair[side][0]["content"]
        assert by_seed[drawn["seed"]]["problem"] == f"gsm8k/train.jsonl:{pair['provenance']['line']}"
        assert pair["provenance"]["verdicts"][drawn["sample"]] == {"chosen": "right", "rejected": "wrong"}[side]


def test_provenance_names_weights_and_settings(made: tuple[PairSettings, dict[str, Any]]) -> None:
    (pair,) = read(made[0].out)
    assert set(pair["provenance"]["identity"]["weights"]) == {"router", "math", "code", "route_head"}
    assert pair["provenance"]["sampling"] == {
        "temperature": 1.5, "top_p": 1.0, "max_new_tokens": 60, "dtype": None, "seed": 0, "samples": 12
    }  # fmt: skip
    assert pair["domain"] == "math"


def test_every_problem_and_answer_is_in_the_summary(made: tuple[PairSettings, dict[str, Any]]) -> None:
    found = made[1]["tasks"]["gsm8k"]
    assert made[1]["pairs"] == found["pairs"] == found["both"] == 1
    assert found["both"] + found["only_right"] + found["only_wrong"] + found["neither"] == found["problems"] == 8
    assert sum(found["answers"].values()) == 8 * 12
    assert "gsm8k: 1 pairs of 8 problems (1 answered right and wrong" in describe(made[1])[0]


def test_solutions_are_the_right_answers_as_rows(made: tuple[PairSettings, dict[str, Any]], tmp_path: Path) -> None:
    wanted, summary = made
    (pair,) = read(wanted.out)
    again = dataclasses.replace(wanted, solutions=tmp_path / "solutions.jsonl", most=100)
    found = make_pairs(again)["tasks"]["gsm8k"]["solutions"]
    rows = read(tmp_path / "solutions.jsonl")
    assert len(rows) == found >= summary["tasks"]["gsm8k"]["solutions"] == 1
    texts = [row["messages"][-1]["content"] for row in rows]
    right = last_number(pair["chosen"][0]["content"])
    assert pair["chosen"][0]["content"] in texts
    assert ({last_number(text) for text in texts}, len(set(texts))) == ({right}, len(texts))
    spec = parse_spec({"format": "messages", "path": str(tmp_path / "solutions.jsonl"), "domain": "math"})
    assert [row["messages"] for row in load_rows(spec, None)] == [row["messages"] for row in rows]
    make_pairs(wanted)  # as it was


def test_solutions_without_a_pair_are_kept(folder: Path, tmp_path: Path) -> None:
    """Every answer of the one problem is right: nothing to prefer, something to learn from."""
    question = QUESTIONS[0]
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of([question]))
    wanted = settings(folder, tmp_path, rows={"start": 0, "stop": 1}, samples=1, solutions=tmp_path / "solved.jsonl")
    for seed in range(200):
        wanted = dataclasses.replace(wanted, seed=seed)
        with pytest.raises(FusionRouteError, match="no pair"):
            make_pairs(wanted)
        row = stored(wanted)[-1]
        if row["finish"] == "stop" and last_number(row["text"]) is not None:
            break
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of([question], f"#### {last_number(row['text'])}"))
    assert make_pairs(wanted)["pairs"] == 0
    assert [each["messages"][-1]["content"] for each in read(tmp_path / "solved.jsonl")] == [row["text"]]
    assert not wanted.out.exists()


def test_no_answer_is_written_twice(made: tuple[PairSettings, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, summary = made
    before = {path: path.read_bytes() for path in wanted.out.parent.glob("*.jsonl")}
    monkeypatch.delattr(Engine, "step")
    assert make_pairs(wanted) == summary
    assert {path: path.read_bytes() for path in before} == before


def test_answers_do_not_depend_on_batch_or_on_other_problems(
    made: tuple[PairSettings, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of(QUESTIONS[2:4]))
    alone = settings(folder, tmp_path, rows={"start": 0}, batch=3, samples=3)
    with pytest.raises(FusionRouteError, match="no pair"):
        make_pairs(alone)
    texts = {row["seed"]: row["text"] for row in stored(made[0])}
    assert len(stored(alone)) == 6
    assert all(texts[row["seed"]] == row["text"] for row in stored(alone))


def test_a_killed_run_goes_on(made: tuple[PairSettings, dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    wanted = dataclasses.replace(made[0], out=tmp_path / "pairs.jsonl")
    command = [sys.executable, "-m", "fusionroute", "pairs", "-c", folder, "--data", wanted.data, "--out", wanted.out]
    options = ["--tasks", "gsm8k", "--start", 0, "--stop", 8, "--samples", 12, "--temperature", 1.5, "--all-rows"]
    words = [*map(str, [*command, *options, "--max-new-tokens", 60, "--batch", 1])]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, until = tmp_path / "pairs.samples.jsonl", time.monotonic() + 120
    while time.monotonic() < until and child.poll() is None and (not path.exists() or len(stored(wanted)) < 3):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not wanted.out.exists()
    half = path.read_bytes().rpartition(b"\n")[0]
    assert make_pairs(wanted) == made[1]
    assert path.read_bytes().startswith(half)
    assert len(stored(wanted)) == len(stored(made[0]))
    assert wanted.out.read_bytes() == made[0].out.read_bytes()


def test_the_reference_stands_in_where_no_answer_is_right(
    made: tuple[PairSettings, dict[str, Any]], tmp_path: Path
) -> None:
    wanted = dataclasses.replace(made[0], out=tmp_path / "pairs.jsonl", reference=True)
    (tmp_path / "pairs.samples.jsonl").write_bytes(made[0].out.with_suffix(".samples.jsonl").read_bytes())
    found = make_pairs(wanted)["tasks"]["gsm8k"]
    pairs = [pair for pair in read(wanted.out) if pair["provenance"]["chosen"]["from"] == "reference"]
    assert found["with_reference"] == len(pairs) == found["only_wrong"] > 0
    assert found["pairs"] == found["with_reference"] + 1
    assert all(pair["chosen"][0]["content"] == "So #### 123456789" for pair in pairs)
    assert all(pair["provenance"]["rejected"]["from"] == "sample" for pair in pairs)


def test_programs_are_run(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / "mbpp" / "train.jsonl", [MBPP, MBPP | {"text": "Add.", "code": "def add(a, b): pass"}])
    found = make_pairs(settings(folder, tmp_path, tasks=["mbpp"], rows={}, samples=24, reference=True))
    (pair,) = read(tmp_path / "pairs.jsonl")
    assert found["tasks"]["mbpp"]["unusable"] == 1
    assert pair["chosen"][0]["content"] == f"```python\n{MBPP['code']}\n```"
    assert pair["provenance"]["chosen"] == {"from": "reference", "scores": {"strict": 1.0, "flexible": 1.0}}
    assert pair["provenance"]["rejected"]["scores"] == {"strict": 0.0, "flexible": 0.0}
    assert pair["prompt"][0]["content"].endswith("pass these tests:\nassert add(1, 2) == 3\nassert add(2, 2) == 4")


def test_a_problem_that_cannot_be_checked_is_not_asked(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of(QUESTIONS, "Nobody knows."))
    with pytest.raises(FusionRouteError, match="8 problems that cannot be checked"):
        make_pairs(settings(folder, tmp_path))
    assert not (tmp_path / "pairs.samples.jsonl").exists()


def test_a_problem_that_shows_a_test_item_is_not_asked(folder: Path, tmp_path: Path) -> None:
    shared = "A farmer has twelve cows and buys three more, so how many cows has he got now?"
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of([shared, QUESTIONS[0]]))
    write(tmp_path / "data" / "gsm8k" / "test.jsonl", answers_of([shared]))
    with pytest.raises(FusionRouteError, match=r"of 1 problems.* 1 rows that share 13 words"):
        make_pairs(settings(folder, tmp_path, samples=1))


def test_a_problem_that_does_not_fit_the_context_is_told_and_the_others_are_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of(["cows " * 600, QUESTIONS[0]]))
    with pytest.raises(FusionRouteError, match="1 failed"):
        make_pairs(settings(folder, tmp_path, samples=1))
    assert "gsm8k/train.jsonl:1: " in capsys.readouterr().err
    assert len(stored(settings(folder, tmp_path))) == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_first_row_is_none_that_a_recipe_holds_out(recipe: Path) -> None:
    held = [spec for spec in load_recipe(recipe).heldout if spec.path in {each.path for each in ROWS.values()}]
    for spec in held:
        mine = next(each for each in ROWS.values() if each.path == spec.path)
        assert spec.stop is not None
        assert (mine.format, mine.shuffle_seed) == (spec.format, spec.shuffle_seed)
        assert mine.start >= spec.stop


@pytest.mark.parametrize("rows", [{"start": 150}, {"shuffle_seed": 1}, {"start": 0, "shuffle_seed": 7}])
def test_held_out_problems_are_asked_by_nobody(rows: dict[str, int], tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", answers_of([f"What is {n}?" for n in range(600)]))
    spec, index = ROWS["gsm8k"].model_copy(update=rows), BenchmarkIndex([])
    problems, left_out = find_problems("gsm8k", spec, tmp_path, index, seed=0)
    held = {each.number for each in find_rows(ROWS["gsm8k"].model_copy(update={"start": 0, "stop": 500}), tmp_path)[0]}
    assert problems
    assert not held & {problem.line for problem in problems}
    everything = find_problems("gsm8k", spec, tmp_path, index, seed=0, all_rows=True)[0]
    assert len(everything) == len(problems) + left_out["held_out"]


def test_limit_and_start_choose_the_problems(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of(QUESTIONS))
    with pytest.raises(FusionRouteError, match="no pair"):
        make_pairs(settings(folder, tmp_path, rows={"start": 3, "shuffle_seed": 5}, limit=2, samples=1))
    order = list(range(8))
    random.Random(5).shuffle(order)
    assert {row["problem"] for row in stored(settings(folder, tmp_path))} == {
        f"gsm8k/train.jsonl:{index + 1}" for index in order[3:5]
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tasks": ["math500"]}, "no pairs of math500"),
        ({"tasks": []}, "no pairs of nothing"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"samples": -1}, "samples must be at least 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(more: dict[str, Any], words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        make_pairs(settings(folder, tmp_path, **more))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.samples.jsonl", "."])
def test_solutions_go_to_a_file_of_their_own(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--solutions"):
        make_pairs(settings(folder, tmp_path, solutions=tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_phase_two_trains_on_the_pairs(
    made: tuple[PairSettings, dict[str, Any]], folder: Path, tmp_path: Path, run: Callable
) -> None:
    wanted, _ = made
    lines = wanted.out.read_text() + json.dumps({"prompt": "Which?", "chosen": "This.", "rejected": " "}) + "\n"
    (tmp_path / "pairs.jsonl").write_text(lines)
    entry = {"format": "preference", "path": "pairs.jsonl", "domain": "math"}
    training = {"max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 0.005}
    recipe = {
        "name": "pairs", "base": "unused", "dtype": "float32", "experts": [{"name": "math"}], "benchmarks": [],
        "sft": {"data": []}, "cdpo": {"data": [entry], "training": training},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--recipe", tmp_path / "recipe.yaml", "--data", tmp_path, "--out", tmp_path / "trained"]
    code, _, error = run("train", "cdpo", folder, *words, "--annotations", tmp_path / "annotations")
    assert code == 0, error
    assert "1 rows; left out: 1 ill-formed" in error
    before, after = (path / "router" / "adapter_model.safetensors" for path in (folder, tmp_path / "trained"))
    assert before.read_bytes() != after.read_bytes()


def test_the_command_says_what_came_of_it(made: tuple[PairSettings, dict[str, Any]], run: Callable) -> None:
    wanted, summary = made
    words = ["-c", wanted.collection, "--data", wanted.data, "--out", wanted.out, "--tasks", "gsm8k", "--start", 0]
    options = ["--all-rows", "--stop", 8, "--samples", 12, "--temperature", 1.5, "--max-new-tokens", 60, "--json"]
    code, out, error = run("pairs", *words, *options)
    assert code == 0
    assert json.loads(out) == summary
    assert describe(summary)[0] in error


@pytest.mark.usefixtures("punkt")
def test_instructions_are_asked_for_and_checked(folder: Path, tmp_path: Path) -> None:
    said = "Ahoy there, sailor! Welcome aboard, and mind the anchor while we cross the harbour."
    rows = [{"instruction": f"Greet guest {number}.", "input": "", "response": said} for number in range(12)]
    write(tmp_path / "data" / "gpteacher" / "roleplay.jsonl", rows)
    solutions = tmp_path / "solutions.jsonl"
    more = {"rows": {"start": 0, "stop": 12}, "samples": 1, "reference": False, "solutions": solutions}
    wanted = settings(folder, tmp_path, tasks=["ifeval"], **more)
    maker = _Maker(wanted)
    problems = maker.problems("ifeval", Counter())
    answer = "the bell rang twice and nobody came down to the harbour " * 2
    for problem in problems:
        maker.store.put(maker._draw(problem, 0)[0], {"problem": problem.name, "text": answer, "finish": "stop"})
    found = make_pairs(wanted)["tasks"]["ifeval"]
    assert (found["problems"], found["unusable"], found["with_reference"]) == (12, 0, 0)
    followed = [problem.prompt for problem in problems if ifeval(problem.fields, answer).scores["strict"] == 1]
    assert 0 < len(followed) < 12
    assert [row["messages"][:-1] for row in read(solutions)] == followed
    for row in read(solutions):
        request, given = row["messages"]
        asked = rows[row["provenance"]["line"] - 1]["instruction"]
        assert request["content"].startswith(f"{asked}\n\n")
        assert given["content"] == answer
        assert row["provenance"]["instructions"]["prompt"] == request["content"]


@pytest.mark.usefixtures("punkt")
def test_without_samples_answers_are_edited_to_follow(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusionroute.evaluation.answering.load_engine", lambda *_: pytest.fail("a model is loaded"))
    said = "Ahoy there, sailor! Welcome aboard, and mind the anchor. We cross the harbour at dawn. Bring a warm coat."
    rows = [{"instruction": f"Greet guest {number}.", "input": "", "response": said} for number in range(20)]
    write(tmp_path / "data" / "gpteacher" / "roleplay.jsonl", rows)
    more = {"rows": {"start": 0, "stop": 20}, "samples": 0, "reference": True, "solutions": tmp_path / "s.jsonl"}
    found = make_pairs(settings(folder, tmp_path, tasks=["ifeval"], **more))["tasks"]["ifeval"]
    solutions = read(tmp_path / "s.jsonl")
    # Those that no rule makes follow are not written, and are no fault of the checker's.
    assert (found["pairs"], found["unusable"], found["solutions"]) == (0, 0, len(solutions))
    assert 5 < len(solutions) < 20
    for row in solutions:
        scores = ifeval(row["provenance"]["instructions"], row["messages"][-1]["content"]).scores
        assert (scores["strict"], row["provenance"]["answer"]["from"]) == (1, "reference")


@pytest.mark.usefixtures("punkt")
def test_samples_are_edited_to_follow_what_was_not_asked(folder: Path, tmp_path: Path) -> None:
    said = "Ahoy there, sailor! Welcome aboard, and mind the anchor. We cross the harbour at dawn. Bring a warm coat."
    rows = [{"instruction": f"Greet guest {number}.", "input": "", "response": said} for number in range(20)]
    write(tmp_path / "data" / "gpteacher" / "roleplay.jsonl", rows)
    more = {"rows": {"start": 0, "stop": 20}, "samples": 1, "edit": True, "solutions": tmp_path / "s.jsonl"}
    wanted = settings(folder, tmp_path, tasks=["ifeval"], **more)
    maker = _Maker(wanted)
    problems = maker.problems("ifeval", Counter())
    assert maker._asked(problems[0])[-1]["content"].startswith("Greet guest ")
    assert "at most six sentences" in maker._asked(problems[0])[-1]["content"]
    assert problems[0].fields["prompt"] not in maker._asked(problems[0])[-1]["content"]
    answer = "A ship lies below. Nobody came down to meet it. The bell rang twice. Come aboard whenever you like."
    for problem in problems:
        maker.store.put(maker._draw(problem, 0)[0], {"problem": problem.name, "text": answer, "finish": "stop"})
    found = make_pairs(wanted)["tasks"]["ifeval"]
    solutions = read(tmp_path / "s.jsonl")
    assert 5 < len(solutions) == found["answers"]["right"]
    assert found["answers"]["not edited"] > 0
    for row in solutions:
        fields, given = row["provenance"]["instructions"], row["messages"][-1]["content"]
        assert row["messages"][0]["content"] == fields["prompt"]
        assert ifeval(fields, given).scores["strict"] == 1
        assert row["provenance"]["sampling"]["edit"] is True
    assert sum(row["messages"][-1]["content"] != answer for row in solutions) > 3


@pytest.mark.usefixtures("punkt")
def test_one_answer_is_edited_for_every_draw_of_instructions(folder: Path, tmp_path: Path) -> None:
    said = "Ahoy there, sailor! Welcome aboard, and mind the anchor. We cross the harbour at dawn. Bring a warm coat."
    rows = [{"instruction": f"Greet guest {number}.", "input": "", "response": said} for number in range(4)]
    write(tmp_path / "data" / "gpteacher" / "roleplay.jsonl", rows)
    more = {"rows": {"start": 0, "stop": 4}, "samples": 1, "draws": 5, "edit": True}
    maker = _Maker(settings(folder, tmp_path, tasks=["ifeval"], **more))
    count: Counter[str] = Counter()
    problems = maker.problems("ifeval", count)
    assert count["problems"] == len(problems) == len({problem.prompt[-1]["content"] for problem in problems})
    assert 12 < len(problems) <= 20
    assert len({maker._draw(problem, 0) for problem in problems}) == 4


@pytest.mark.usefixtures("punkt")
def test_a_refusal_is_none_however_it_is_edited(folder: Path, tmp_path: Path) -> None:
    said = "Ahoy there, sailor! Welcome aboard, and mind the anchor. We cross the harbour at dawn. Bring a warm coat."
    rows = [{"instruction": f"Greet guest {number}.", "input": "", "response": said} for number in range(20)]
    write(tmp_path / "data" / "gpteacher" / "roleplay.jsonl", rows)
    maker = _Maker(settings(folder, tmp_path, tasks=["ifeval"], rows={"start": 0, "stop": 20}, edit=True))
    refusal = (
        "I'm sorry, but as an AI language model I greet nobody. " + "I have no feelings about anybody at all. " * 3
    )
    found = [maker._sampled(problem, refusal, "stop") for problem in maker.problems("ifeval", Counter())]
    assert {answer.verdict for answer in found} == {"refusal"}
    cut = [maker._sampled(problem, said, "length") for problem in maker.problems("ifeval", Counter())]
    assert {answer.verdict for answer in cut} == {"cut off"}


def test_nobody_is_asked_what_nobody_answers(folder: Path, tmp_path: Path) -> None:
    more = {"samples": 0, "reference": True, "solutions": tmp_path / "s.jsonl", "edit": True}
    with pytest.raises(UsageError, match="asks nobody: drop --edit"):
        make_pairs(settings(folder, tmp_path, tasks=["ifeval"], **more))


def test_a_hint_and_its_reference_are_not_both_solutions(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="drop it or --hint"):
        make_pairs(settings(folder, tmp_path, reference=True, hint=True, solutions=tmp_path / "s.jsonl"))


def test_draws_are_of_instructions(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--draws 2 is for ifeval's instructions"):
        make_pairs(settings(folder, tmp_path, tasks=["gsm8k"], draws=2))


def test_only_answers_to_instructions_can_be_edited(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="answers to gsm8k cannot be edited"):
        make_pairs(settings(folder, tmp_path, tasks=["gsm8k"], edit=True))


def test_no_samples_are_for_solutions_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="add --reference and --solutions"):
        make_pairs(settings(folder, tmp_path, samples=0, reference=True))


def test_an_expert_alone_answers(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of(QUESTIONS[:1]))
    wanted = settings(folder, tmp_path, rows={"start": 0, "stop": 1}, samples=2, expert="math")
    with pytest.raises(FusionRouteError, match="no pair"):
        make_pairs(wanted)
    engine, tokenizer = load_engine(folder, None, None)
    prompt = collections.encode_chat(tokenizer, [{"role": "user", "content": QUESTIONS[0]}])
    for row in stored(wanted):
        sampling = Sampling(1.5, seed=row["seed"])
        (alone,) = engine.generate([Request(prompt, 60, sampling, expert="math", alpha=0.0)])
        assert row["text"] == alone.text


def test_the_hint_is_shown_and_not_written(folder: Path, tmp_path: Path, made: tuple[PairSettings, Any]) -> None:
    rows = read(made[0].data / "gsm8k" / "train.jsonl")
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", rows)
    wanted = settings(folder, tmp_path, hint=True, solutions=tmp_path / "solved.jsonl", samples=2)
    with pytest.raises(FusionRouteError, match="no pair"):
        make_pairs(wanted)
    engine, tokenizer = load_engine(folder, None, None)
    for row in stored(wanted):
        at = int(row["problem"].rpartition(":")[2]) - 1
        shown = HINTED.format(problem=QUESTIONS[at], solution=rows[at]["answer"])
        prompt = collections.encode_chat(tokenizer, [{"role": "user", "content": shown}])
        (alone,) = engine.generate([Request(prompt, 60, Sampling(1.5, seed=row["seed"]))])
        assert row["text"] == alone.text
    problem = Problem("gsm8k", "a.jsonl", 1, "math", [{"role": "user", "content": QUESTIONS[0]}], "It is 4.", {})
    solution = {"role": "assistant", "content": "It is 3."}
    found = _Maker(wanted).solution(problem, Candidate(solution["content"], "right", {}, 0, 0))
    assert found["messages"] == [{"role": "user", "content": QUESTIONS[0]}, solution]
    assert found["provenance"]["sampling"]["hint"] is True
    assert found["provenance"]["hint"] == HINTED


def test_a_copied_reference_is_no_solution(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of(QUESTIONS[:1], "He counts 4. #### 4"))
    more = {"hint": True, "solutions": tmp_path / "s.jsonl", "samples": 2}
    wanted = settings(folder, tmp_path, rows={"start": 0, "stop": 1}, **more)
    maker = _Maker(wanted)
    (problem,) = maker.problems("gsm8k", Counter())
    for number, text in enumerate(["He counts: 4.\n\n#### 4", "There are 4."]):
        maker.store.put(maker._draw(problem, number)[0], {"problem": problem.name, "text": text, "finish": "stop"})
    assert [answer.verdict for answer in maker.answers(problem)] == ["copied", "right"]


def test_no_file_of_an_earlier_run_is_left(folder: Path, tmp_path: Path) -> None:
    """Solutions without a pair: pairs that stand there are another run's."""
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of(QUESTIONS[:1], "He counts 4. #### 4"))
    wanted = settings(folder, tmp_path, rows={"start": 0, "stop": 1}, solutions=tmp_path / "s.jsonl", samples=1)
    maker = _Maker(wanted)
    (problem,) = maker.problems("gsm8k", Counter())
    maker.store.put(maker._draw(problem, 0)[0], {"problem": problem.name, "text": "There are 4.", "finish": "stop"})
    wanted.out.write_text("{}\n")
    assert make_pairs(wanted)["pairs"] == 0
    assert (wanted.out.exists(), len(read(tmp_path / "s.jsonl"))) == (False, 1)


def test_without_punkt_nothing_is_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    (tmp_path / "data").mkdir()
    with pytest.raises(FusionRouteError, match=r"punkt_tab: have it in .*nltk_data"):
        make_pairs(settings(folder, tmp_path, tasks=["ifeval"]))


def test_rows_that_are_all_held_out_are_said_to_be_that(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", answers_of(QUESTIONS))
    with pytest.raises(FusionRouteError, match=r"8 rows that the recipes hold out: .* or --all-rows"):
        make_pairs(settings(folder, tmp_path, all_rows=False))


@pytest.mark.usefixtures("punkt")
def test_a_defective_request_is_not_asked(folder: Path, tmp_path: Path) -> None:
    said = "Ahoy there, sailor! Welcome aboard, and mind the anchor while we cross the harbour."
    rows = [{"instruction": f"Greet {half}guests.", "input": "", "response": said} for half in ("\ud800", "")]
    write(tmp_path / "data" / "gpteacher" / "roleplay.jsonl", rows)
    more = {"samples": 1, "solutions": tmp_path / "s.jsonl"}
    wanted = settings(folder, tmp_path, tasks=["ifeval"], rows={"start": 0, "stop": 2}, **more)
    with contextlib.suppress(FusionRouteError):
        make_pairs(wanted)
    assert len(stored(wanted)) == 1


def test_metrics_are_those_of_the_task_files() -> None:
    for task, metrics in WHOLE.items():
        told = yaml.load((TASK_FILES / f"{task}.yaml").read_text(), _Loader)
        assert metrics[0] == told["metadata"]["primary"]
        assert set(metrics) <= {each["metric"] for each in told["metric_list"]}


class _Loader(yaml.SafeLoader):
    """lm-eval's task files name functions."""


_Loader.add_constructor("!function", lambda loader, node: node.value)


def test_instructions_have_nothing_to_hint_at(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to hint at"):
        make_pairs(settings(folder, tmp_path, tasks=["ifeval"], hint=True))
