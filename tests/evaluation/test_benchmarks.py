"""Task files, rows and prompts; rows that lack something; the same tasks under lm-eval."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation import benchmarks, scoring
from fusionroute.evaluation.benchmarks import NAMES, load_task
from fusionroute.evaluation.problems import ROWS, find_problems
from fusionroute.training.overlap import BenchmarkIndex
from fusionroute.training.rows import load_rows, parse_spec

FIXTURES = Path(__file__).parent / "fixtures"
FILES = {name: f"{name}/test.jsonl" for name in NAMES} | {"general": "general/prompts.jsonl"}
COUNTS = {"gsm8k": 4, "math500": 5, "mbpp": 4, "humaneval": 4, "ifeval": 5, "general": 3}
SCORED = tuple(name for name in NAMES if name != "general")
FOLLOWING = {
    str(row["key"]): row["answer"]
    for row in map(json.loads, (FIXTURES / "ifeval" / "answers.jsonl").read_text("utf-8").splitlines())
}


def raw_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / FILES[name]).read_text("utf-8").splitlines()]


def data_folder(folder: Path, name: str, rows: Sequence[Any]) -> Path:
    path = folder / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def reference(name: str, item_id: str, row: dict[str, Any]) -> str:
    if name == "mbpp":
        return f"```python\n{row['code']}\n```"
    if name == "ifeval":
        return FOLLOWING[item_id]
    return row[{"gsm8k": "answer", "math500": "solution", "humaneval": "canonical_solution"}[name]]


# Items and prompts


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_an_item_in_file_order(name: str) -> None:
    task = load_task(name, FIXTURES)
    assert (len(task.items), len({item.id for item in task.items})) == (COUNTS[name], COUNTS[name])
    assert all(item.prompt and not item.defect for item in task.items)
    assert {item.max_new_tokens for item in task.items} == {300 if name == "general" else 400}
    assert (task.name, task.source) == (name, str(FIXTURES / FILES[name]))


def test_items_are_named_as_their_rows_are() -> None:
    assert [item.id for item in load_task("mbpp", FIXTURES).items] == ["518", "519", "593", "601"]
    assert [item.id for item in load_task("gsm8k", FIXTURES).items] == ["0", "1", "2", "3"]


def test_two_rows_of_one_name_are_two_items(tmp_path: Path) -> None:
    first, second = raw_rows("mbpp")[:2]
    task = load_task("mbpp", data_folder(tmp_path, "mbpp", [first, second, first]))
    assert [item.id for item in task.items] == ["518", "519", "518@2"]


@pytest.mark.parametrize("name", ["gsm8k", "mbpp", "general"])
def test_prompts_are_those_of_the_training_rows(name: str) -> None:
    form = "self_instruct" if name == "general" else name
    trained = load_rows(parse_spec({"format": form, "path": FILES[name], "domain": "any"}), FIXTURES)
    asked = [item.prompt for item in load_task(name, FIXTURES).items]
    assert asked == [row["messages"][0]["content"] for row in trained]


def test_prompts_of_the_other_tasks_hold_the_problem() -> None:
    for name, field in (("math500", "problem"), ("humaneval", "prompt"), ("ifeval", "prompt")):
        for item, raw in zip(load_task(name, FIXTURES).items, raw_rows(name), strict=True):
            assert raw[field].strip() in item.prompt


def test_a_limit_takes_the_first() -> None:
    every, some = load_task("math500", FIXTURES), load_task("math500", FIXTURES, limit=2)
    assert some.items == every.items[:2]
    assert load_task("math500", FIXTURES, limit=99).items == every.items


# Rows that lack something

BROKEN: dict[str, list[tuple[dict[str, Any], str]]] = {
    "gsm8k": [
        ({"question": None}, "question"),
        ({"question": " "}, "question"),
        ({"question": 5}, "question"),
        ({"answer": "no mark"}, "####"),
        ({"question": "\ud800"}, "question"),
    ],
    "math500": [({"answer": None}, "answer"), ({"problem": ["x"]}, "problem")],
    "mbpp": [({"test_list": []}, "test_list"), ({"test_list": "assert f()"}, "test_list"), ({"text": ""}, "text")],
    "humaneval": [({"entry_point": "f()"}, "entry_point"), ({"test": None}, "test")],
    "ifeval": [
        ({"kwargs": []}, "kwargs"),
        ({"kwargs": [{"end_phrase": "\ud800"}, {}]}, "surrogate"),
        ({"instruction_id_list": [1]}, "instruction_id_list"),
        ({"prompt": {}}, "prompt"),
    ],
    "general": [
        ({"instances": []}, "instances"),
        ({"instances": [{"input": 1}]}, "input"),
        ({"instruction": ""}, "instruction"),
    ],
}


def broken_rows(name: str) -> list[dict[str, Any]]:
    first, *_ = raw_rows(name)
    changed = [{k: v for k, v in {**first, **change}.items() if v is not None} for change, _ in BROKEN[name]]
    return [*changed, {}, first]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_lacks_something_is_an_item_that_says_what(name: str, tmp_path: Path) -> None:
    task = load_task(name, data_folder(tmp_path, name, broken_rows(name)))
    *broken, empty, whole = task.items
    for item, (_, what) in zip(broken, BROKEN[name], strict=True):
        assert (what in item.defect, item.prompt) == (True, "")
    assert (empty.defect != "", whole.defect) == (True, "")


@pytest.mark.parametrize("name", NAMES)
def test_an_item_with_a_defect_has_no_score(name: str, tmp_path: Path) -> None:
    task = load_task(name, data_folder(tmp_path, name, [{}]))
    score = task.score(task.items[0], "42")
    assert "defective row" in (score.unscored or "")
    assert score.scores == dict.fromkeys(scoring.METRICS[name], 0.0)


def test_the_hubs_empty_columns_of_ifeval_are_dropped(tmp_path: Path) -> None:
    rows = raw_rows("ifeval")
    padded = [{**row, "kwargs": [{"num_words": None, **given} for given in row["kwargs"]]} for row in rows]
    assert load_task("ifeval", data_folder(tmp_path, "ifeval", padded)).items == load_task("ifeval", FIXTURES).items


# Errors for people


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no rows"), ("{]\n", "not JSON"), ("5\n", "not a JSON object"), (None, "missing")],
)
def test_a_file_that_cannot_be_read_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.parent.mkdir()
    if content is not None:
        path.write_text(content)
    with pytest.raises(FusionRouteError, match=message) as error:
        load_task("gsm8k", tmp_path)
    assert str(path) in str(error.value)


def test_without_data_and_hub_the_error_says_what_to_do() -> None:
    hub = {"path": "nobody/nothing", "split": "test"}
    with pytest.raises(FusionRouteError, match=r"nobody/nothing.*--data DIR"):
        benchmarks.load_rows(rows={"task": "gsm8k", "file": "gsm8k/test.jsonl", "hub": hub})


@pytest.mark.parametrize(("name", "limit"), [("gsm9k", None), ("gsm8k", 0), ("gsm8k", -1)])
def test_nonsense_is_refused(name: str, limit: int | None) -> None:
    with pytest.raises(UsageError):
        load_task(name, FIXTURES, limit=limit)


# Settings


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_plain_and_name_what_matters(name: str) -> None:
    settings = load_task(name, FIXTURES).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert {
        "prompt",
        "shots",
        "chat_template",
        "max_new_tokens",
        "stop",
        "rules",
        "primary",
        "sha256",
    } <= settings.keys()
    assert set(settings["rules"]) == set(scoring.METRICS[name])
    assert settings["primary"] in (*scoring.METRICS[name], None)


def test_settings_know_the_rows_but_neither_folder_nor_limit(tmp_path: Path) -> None:
    rows = raw_rows("gsm8k")
    here = load_task("gsm8k", FIXTURES).settings()
    assert load_task("gsm8k", data_folder(tmp_path / "a", "gsm8k", rows), limit=1).settings() == here
    assert load_task("gsm8k", data_folder(tmp_path / "b", "gsm8k", rows[:-1])).settings() != here


def test_the_hubs_rows_are_read_as_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data_folder(tmp_path, "humaneval", raw_rows("humaneval"))
    # A local folder of that layout is loaded by the same call as a data set of the Hub.
    rows = {"task": "humaneval", "file": "none", "hub": {"path": str(tmp_path / "humaneval"), "split": "test"}}
    found = benchmarks.load_rows(rows=rows)["test"]
    wanted = benchmarks.load_rows(rows={**rows, "file": FILES["humaneval"]}, data=str(FIXTURES))["test"]
    assert found.to_list() == wanted.to_list()


# Under lm-eval


@pytest.fixture(scope="module")
def run_lm_eval() -> Callable[..., dict[str, Any]]:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Answering(LM):
        """A model that knows the references."""

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            self.asked = [request.args for request in requests]
            return [self.answer(request.doc) for request in requests]

        def answer(self, doc: dict[str, Any]) -> str:
            # A row that came twice is named by its place too.
            name, _, _ = doc["id"].partition("@")
            return "?" if doc["defect"] else reference(doc["task"], name, json.loads(doc["row"]))

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: Any) -> Any:
            raise NotImplementedError

    def run(data: Path, names: Sequence[str], **settings: Any) -> dict[str, Any]:
        metadata = {"data": str(data), "collection": "what the model's own arguments add"}
        manager = TaskManager(include_path=str(benchmarks.TASK_FILES), include_defaults=False, metadata=metadata)
        model = Answering()
        tasks = [f"fusionroute_{name}" for name in names]
        found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings)
        return {**found, "asked": model.asked}

    return run


def test_lm_eval_gives_references_everything(run_lm_eval: Callable[..., dict[str, Any]]) -> None:
    results = run_lm_eval(FIXTURES, SCORED)["results"]
    for name in SCORED:
        found = results[f"fusionroute_{name}"]
        assert {found[f"{metric},none"] for metric in scoring.METRICS[name]} == {1.0}
        assert (found["unscored,none"], found["sample_len"]) == (0.0, COUNTS[name])


def test_lm_eval_asks_what_we_ask(run_lm_eval: Callable[..., dict[str, Any]]) -> None:
    asked = run_lm_eval(FIXTURES, ["mbpp"], limit=2)["asked"]
    task = load_task("mbpp", FIXTURES, limit=2)
    assert [prompt for prompt, _ in asked] == [item.prompt for item in task.items]
    assert [(how["max_gen_toks"], how["until"], how["do_sample"]) for _, how in asked] == [(400, [], False)] * 2


@pytest.mark.parametrize("name", ["gsm8k", "mbpp", "ifeval"])
def test_broken_rows_do_not_stop_lm_eval(name: str, tmp_path: Path, run_lm_eval: Callable[..., dict[str, Any]]) -> None:
    rows = broken_rows(name)
    found = run_lm_eval(data_folder(tmp_path, name, rows), [name])
    results = found["results"][f"fusionroute_{name}"]
    share = 1 / len(rows)
    assert (results["sample_len"], results["unscored,none"]) == (len(rows), pytest.approx(1 - share))
    assert results[f"{load_task(name, FIXTURES).primary},none"] == pytest.approx(share)
    assert all(prompt.strip() for prompt, _ in found["asked"])


# Whole files, where somebody has them: FUSIONROUTE_DATA=DIR


@pytest.mark.skipif("FUSIONROUTE_DATA" not in os.environ, reason="FUSIONROUTE_DATA names no folder of whole files")
@pytest.mark.parametrize("name", SCORED)
def test_references_of_whole_files(name: str) -> None:
    task = load_task(name, Path(os.environ["FUSIONROUTE_DATA"]))
    answers = {item.id: "" if name == "ifeval" else reference(name, item.id, item.raw) for item in task.items}
    scores = {item.id: task.score(item, answers[item.id]) for item in task.items}
    expected = {0.0 if name == "ifeval" else 1.0}  # nobody has written answers to all of IFEval
    assert {i: s for i, s in scores.items() if s.unscored or set(s.scores.values()) != expected} == {}


# Rows held out of training


def test_held_out_problems_are_those_that_the_recipes_hold_out(tmp_path: Path) -> None:
    raw = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(600)]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    spec = {"format": "gsm8k", "path": "gsm8k/train.jsonl", "domain": "math", "shuffle_seed": 0, "stop": 500}
    recipes = [row["messages"][0]["content"] for row in load_rows(parse_spec(spec), tmp_path)]
    task = load_task("gsm8k", tmp_path, held_out=True)
    assert [item.prompt for item in task.items] == recipes
    assert task.source == str(tmp_path / "gsm8k" / "train.jsonl")


def test_held_out_requests_have_instructions_and_are_no_training_problems(tmp_path: Path) -> None:
    said = "Ahoy there, sailor! Welcome aboard, and mind the anchor while we cross the harbour."
    rows = [{"instruction": f"Greet guest {number}.", "input": "", "response": said} for number in range(160)]
    (tmp_path / "gpteacher").mkdir()
    (tmp_path / "gpteacher" / "roleplay.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("ifeval", tmp_path, held_out=True)
    asked = {item.prompt.split("\n")[0] for item in task.items}
    trained = find_problems("ifeval", ROWS["ifeval"], tmp_path, BenchmarkIndex([]), seed=0)[0]
    assert len(asked) == 150
    assert asked.isdisjoint(problem.prompt[-1]["content"].split("\n")[0] for problem in trained)
    assert len(trained) == 10
    assert all(item.raw["instruction_id_list"] for item in task.items)
    with pytest.raises(FusionRouteError, match="--data DIR"):
        load_task("ifeval", None, held_out=True)


def test_held_out_items_have_keys_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "mbpp").mkdir()
    for name in ("test", "validation"):
        rows = (FIXTURES / "mbpp" / "test.jsonl").read_text("utf-8")
        (tmp_path / "mbpp" / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    here, there = load_task("mbpp", tmp_path), load_task("mbpp", tmp_path, held_out=True)
    assert there.items == here.items
    assert there.settings() != here.settings()


def test_where_nothing_is_held_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"humaneval has no rows held out of training: .* gsm8k, mbpp, ifeval"):
        load_task("humaneval", FIXTURES, held_out=True)
