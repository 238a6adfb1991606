"""Scores: references and blanks, forms of answers, agreement with lm-eval, hostile answers."""

import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionroute.evaluation import scoring
from fusionroute.evaluation.benchmarks import Benchmark, Item, load_task

FIXTURES = Path(__file__).parent / "fixtures"
SCORED = ("gsm8k", "math500", "mbpp", "humaneval", "ifeval")
NAMED_ANSWERS = [json.loads(line) for line in (FIXTURES / "ifeval" / "answers.jsonl").read_text("utf-8").splitlines()]
FOLLOWING = {str(row["key"]): row["answer"] for row in NAMED_ANSWERS}

REFERENCES: dict[str, Callable[[Item], str]] = {
    "gsm8k": lambda item: item.raw["answer"],
    "math500": lambda item: item.raw["solution"],
    "mbpp": lambda item: f"```python\n{item.raw['code']}\n```",
    "humaneval": lambda item: item.raw["canonical_solution"],
    "ifeval": lambda item: FOLLOWING[item.id],
}


@pytest.fixture(scope="module")
def benchmark() -> Callable[[str], Benchmark]:
    loaded: dict[str, Benchmark] = {}

    def load(name: str) -> Benchmark:
        return loaded.setdefault(name, loaded.get(name) or load_task(name, FIXTURES))

    return load


@pytest.fixture(scope="module")
def humaneval_rows(benchmark: Callable[[str], Benchmark]) -> dict[str, dict[str, Any]]:
    return {item.id: item.raw for item in benchmark("humaneval").items}


@pytest.mark.parametrize("name", SCORED)
def test_references_get_everything(name: str, benchmark: Callable[[str], Benchmark]) -> None:
    task = benchmark(name)
    for item in task.items:
        score = task.score(item, REFERENCES[name](item))
        assert (item.id, set(score.scores.values()), score.unscored) == (item.id, {1.0}, None)


@pytest.mark.parametrize("blank", ["", " \n\t ", "```python\n```"])
@pytest.mark.parametrize("name", SCORED)
def test_blanks_get_nothing_and_are_scored(name: str, blank: str, benchmark: Callable[[str], Benchmark]) -> None:
    task = benchmark(name)
    for item in task.items:
        score = task.score(item, blank)
        assert (item.id, score.scores[task.primary or ""], score.unscored) == (item.id, 0.0, None)


@pytest.mark.parametrize("name", SCORED)
def test_scoring_twice_is_the_same(name: str, benchmark: Callable[[str], Benchmark]) -> None:
    task = benchmark(name)
    for item in task.items[:2]:
        for answer in (REFERENCES[name](item), "C'est la vie, 12 \\boxed{(1,2)} ok", "def f(x): return {*'abc'}"):
            assert task.score(item, answer) == task.score(item, answer)


def test_general_prompts_only_need_an_answer(benchmark: Callable[[str], Benchmark]) -> None:
    task = benchmark("general")
    assert [task.score(task.items[0], answer).scores["answered"] for answer in ("C.", " \n")] == [1.0, 0.0]


# What lm-eval's own filters of gsm8k say of an answer to a problem whose answer is 1800: (strict, flexible).
BOTH_AGREE = [
    "He earns 2 * 900 = 1800.\n#### 1800",
    "#### 1,800",
    "#### 1800.",
    "The answer is 1800",
    "The answer is $1,800.",
    "It is 18 hundred",
    "#### 1700",
    "#### -1800",
    "no idea",
    "",
    "1800 - or was it 12?",
    "**1800**",
    "#### 1800\n\nQuestion: he has 7",
]
# lm-eval's verdict, ours, and why they differ.
WE_DIFFER = [
    ("#### $1800", (0.0, 1.0), (1.0, 1.0), "a currency sign after the marks"),
    ("#### 1800.00", (0.0, 0.0), (1.0, 1.0), "lm-eval compares digits, not numbers"),
    ("####1800", (0.0, 1.0), (1.0, 1.0), "no space after the marks"),
    ("The answer is 1800...", (0.0, 0.0), (0.0, 1.0), "lm-eval takes the dots with it"),
    ("It is 1800, ...", (0.0, 0.0), (0.0, 1.0), "lm-eval reads the dots as a number"),
    ("It is 1800 m2", (0.0, 0.0), (0.0, 1.0), "lm-eval reads the 2 of m2"),
    ("It is 36000/20", (0.0, 0.0), (0.0, 1.0), "fractions are numbers"),
    ("It is 10/1800", (0.0, 1.0), (0.0, 0.0), "fractions are numbers"),
    ("2000-1800", (0.0, 0.0), (0.0, 1.0), "lm-eval reads the hyphen as a sign"),
]


@pytest.fixture(scope="module")
def lm_eval_gsm8k() -> Callable[[str], tuple[float, float]]:
    import lm_eval
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.tasks._yaml_loader import load_yaml

    task = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml")
    known = ("ignore_case", "ignore_punctuation", "regexes_to_ignore")
    metric = {key: task["metric_list"][0][key] for key in known}

    def score(answer: str) -> tuple[float, float]:
        verdicts = []
        for filtering in task["filter_list"]:
            step = {key: value for key, value in filtering["filter"][0].items() if key != "function"}
            [taken] = RegexFilter(**step).apply([[answer]], [{}])
            found = exact_match_hf_evaluate(predictions=taken, references=["so\n#### 1800"], **metric)
            verdicts.append(float(found["exact_match"]))
        return verdicts[0], verdicts[1]

    return score


def gsm8k_verdict(answer: str) -> tuple[float, float]:
    scores = scoring.gsm8k({"question": "?", "answer": "so\n#### 1800"}, answer).scores
    return scores["strict"], scores["flexible"]


@pytest.mark.parametrize("answer", BOTH_AGREE)
def test_gsm8k_agrees_with_lm_eval(answer: str, lm_eval_gsm8k: Callable[[str], tuple[float, float]]) -> None:
    assert gsm8k_verdict(answer) == lm_eval_gsm8k(answer)


@pytest.mark.parametrize(("answer", "theirs", "ours", "why"), WE_DIFFER)
def test_gsm8k_differs_from_lm_eval_where_we_say(
    answer: str,
    theirs: tuple[float, float],
    ours: tuple[float, float],
    why: str,
    lm_eval_gsm8k: Callable[[str], tuple[float, float]],
) -> None:
    assert (lm_eval_gsm8k(answer), gsm8k_verdict(answer)) == (theirs, ours), why


# Expressions


def math_verdict(wanted: str, answer: str) -> tuple[float, float]:
    scores = scoring.math500({"problem": "?", "answer": wanted}, answer).scores
    return scores["strict"], scores["flexible"]


@pytest.mark.parametrize(
    ("wanted", "answer", "verdict"),
    [
        (r"\frac{1}{2}", r"\boxed{0.5}", (1.0, 1.0)),
        (r"\frac{1}{2}", "The answer is 1/2.", (0.0, 1.0)),
        (r"\frac{1}{2}", r"The final answer is $\frac{2}{4}$.", (0.0, 1.0)),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\pi/2)}", (1.0, 1.0)),
        ("2", r"\boxed{x=2}", (1.0, 1.0)),
        (r"\text{east}", r"\boxed{\text{ East }}", (1.0, 1.0)),
        (r"\text{east}", r"\boxed{west}", (0.0, 0.0)),
        ("12", r"\boxed{13}, not 12", (0.0, 0.0)),
        ("12", r"\boxed{}", (0.0, 0.0)),
        (r"2\sqrt{5}", "So 2 and 5.\n#### 2\\sqrt{5}", (0.0, 1.0)),
        (r"2\sqrt{5}", "So:\n#### $2\\sqrt{5}$", (0.0, 1.0)),
        (r"2\sqrt{5}", "So:\n#### 2\\sqrt{6}", (0.0, 0.0)),
        ("(3,4)", "So:\n#### (3, 4)\nDone.", (0.0, 1.0)),
        ("12", "\\boxed{13}\n#### 12", (0.0, 0.0)),
    ],
)
def test_expressions_are_compared_by_meaning(wanted: str, answer: str, verdict: tuple[float, float]) -> None:
    assert math_verdict(wanted, answer) == verdict


# What lm-eval's hendrycks_math says of two strings, what we say, and why they differ.
@pytest.mark.parametrize(
    ("wanted", "boxed", "theirs", "ours", "why"),
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True, True, ""),
        (r"\frac{1}{2}", "0.5", True, True, ""),
        ("12", "13", False, False, ""),
        ("10", r"\$10", True, True, ""),
        ("36", r"36^\circ", True, True, ""),
        (r"\sqrt{2}", r"\sqrt2", True, True, ""),
        ("5", "x=5", True, True, ""),
        (r"\frac{3}{4}", "0.75", False, True, "lm-eval knows 0.5 alone among decimals"),
        ("x^2+1", "1+x^2", False, True, "lm-eval compares letters"),
        ("26000", "26,000", False, True, "lm-eval leaves thousands' commas"),
        ("2", "2.0", False, True, "lm-eval compares letters"),
        (r"2\sqrt{3}", r"\sqrt{12}", False, True, "lm-eval does not compute"),
        (r"\text{east}", r"\textbf{east}", False, True, "lm-eval compares the commands too"),
    ],
)
def test_boxes_against_lm_eval(wanted: str, boxed: str, theirs: bool, ours: bool, why: str) -> None:
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    assert (is_equiv(boxed, wanted), math_verdict(wanted, f"\\boxed{{{boxed}}}")[0] == 1.0) == (theirs, ours), why


def test_expressions_are_compared_in_any_thread() -> None:
    found: list[tuple[float, float]] = []
    thread = threading.Thread(target=lambda: found.append(math_verdict("2", r"\boxed{1+1}")))
    thread.start()
    thread.join()
    assert found == [(1.0, 1.0)]


def test_an_expression_that_cannot_be_computed_is_wrong_and_the_next_is_not() -> None:
    process = scoring._MathProcess(seconds=1)
    begun = time.monotonic()
    assert process.equal("2", r"\boxed{9^{9^{9^9}}}") == (False, None)
    assert time.monotonic() - begun < 60
    assert process.equal("2", r"\boxed{1+1}") == (True, "1+1")
    process.close()


def test_a_process_that_was_killed_is_replaced() -> None:
    math_verdict("2", r"\boxed{1+1}")
    process = scoring._math._process
    assert process is not None
    process.kill()
    process.wait()
    assert math_verdict("2", r"\boxed{1+1}") == (1.0, 1.0)


# Programs

CODE = "def f(x):\n    return x + 1"


def python_block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nIt works."


WHOLE_OR_BODY: dict[str, Callable[[dict[str, Any]], str]] = {
    "whole, fenced": lambda row: python_block(row["prompt"] + row["canonical_solution"]),
    "whole, bare": lambda row: row["prompt"] + row["canonical_solution"],
    "whole without the prompt's imports and helpers": lambda row: python_block(
        row["prompt"][row["prompt"].index(f"def {row['entry_point']}") :] + row["canonical_solution"]
    ),
    "body, bare": lambda row: row["canonical_solution"],
    "body, fenced": lambda row: python_block(row["canonical_solution"]),
}
ONLY_MEANT: dict[str, Callable[[dict[str, Any]], str]] = {
    "body, stripped": lambda row: row["canonical_solution"].strip(),
    "body, dedented": lambda row: python_block(re.sub("^    ", "", row["canonical_solution"], flags=re.MULTILINE)),
    "body, then text": lambda row: row["canonical_solution"] + "\nThis is how it works: one by one.",
    "whole, fence left open": lambda row: f"```python\n{row['prompt']}{row['canonical_solution']}",
}


@pytest.mark.parametrize("number", [4, 10, 32, 34])
@pytest.mark.parametrize("form", WHOLE_OR_BODY)
def test_humaneval_takes_whole_functions_and_bodies(
    form: str, number: int, humaneval_rows: dict[str, dict[str, Any]]
) -> None:
    row = humaneval_rows[f"HumanEval/{number}"]
    assert scoring.humaneval(row, WHOLE_OR_BODY[form](row)).scores == {"strict": 1.0, "flexible": 1.0}


@pytest.mark.parametrize("number", [4, 10, 32, 34])
@pytest.mark.parametrize("form", ONLY_MEANT)
def test_humaneval_takes_what_is_meant(form: str, number: int, humaneval_rows: dict[str, dict[str, Any]]) -> None:
    row = humaneval_rows[f"HumanEval/{number}"]
    assert scoring.humaneval(row, ONLY_MEANT[form](row)).scores["flexible"] == 1.0


@pytest.mark.parametrize("answer", ["pass", "    return 0", "def other(): ...", "I cannot.", "raise SystemExit(0)"])
def test_humaneval_refuses_what_is_wrong(answer: str, humaneval_rows: dict[str, dict[str, Any]]) -> None:
    score = scoring.humaneval(humaneval_rows["HumanEval/4"], answer)
    assert (score.scores, score.unscored) == ({"strict": 0.0, "flexible": 0.0}, None)


MBPP = {"text": "Add one.", "test_list": ["assert f(1) == 2"], "test_setup_code": ""}


@pytest.mark.parametrize(
    "body",
    [
        "    while True: pass",
        "    import os\n    while True: os.fork()",
        "    import os\n    os._exit(0)",
        "    return [0] * 10**11",
        "    while True: print('x' * 10**6)",
    ],
)
def test_hostile_answers_are_wrong_in_bounded_time(body: str) -> None:
    begun = time.monotonic()
    score = scoring.mbpp(MBPP, python_block(f"def f(x):\n{body}"))
    assert (score.scores["flexible"], score.unscored) == (0.0, None)
    assert time.monotonic() - begun < 60


def test_tests_that_are_no_python_leave_the_item_unscored() -> None:
    score = scoring.mbpp({**MBPP, "test_list": ["assert f(1) =="]}, python_block(CODE))
    assert (score.scores, score.unscored is not None) == ({"strict": 0.0, "flexible": 0.0}, True)


# Instructions


def ifeval_row(name: str, **given: Any) -> dict[str, Any]:
    return {"key": 1, "prompt": "Say something.", "instruction_id_list": [name], "kwargs": [given]}


ANSWERS = [
    "Hello there",
    "HELLO THERE, MY FRIEND",
    "hello *there*",
    '"quoted"',
    '{"a": 1}',
    "one\n\n******\n\ntwo",
    "* a\n* b\n\nP.S. no",
    "<<Title>>\nSection 1 a\nSection 2 b",
]


def test_ifeval_agrees_with_lm_eval(benchmark: Callable[[str], Benchmark]) -> None:
    checkers = scoring._checkers()
    for item in benchmark("ifeval").items:
        for answer in [*ANSWERS, *FOLLOWING.values()]:
            ours, theirs = scoring.ifeval(item.raw, answer), checkers.process_results(item.raw, [answer])
            assert ours.scores["strict"] == theirs["prompt_level_strict_acc"]
            assert ours.scores["loose"] == theirs["prompt_level_loose_acc"]
            for ways in ("strict", "loose"):
                share, weight = ours.scores[f"instruction_{ways}"], ours.weights[f"instruction_{ways}"]
                assert share * weight == pytest.approx(sum(theirs[f"inst_level_{ways}_acc"]))


def test_ifeval_says_the_same_of_a_text_in_no_clear_language() -> None:
    row = ifeval_row("language:response_language", language="it")
    # Without a seed it is Welsh one time in eight.
    scores = {scoring.ifeval(row, "hello na").scores["strict"] for _ in range(60)}
    assert len(scores) == 1


def test_ifeval_leaves_the_random_numbers_alone() -> None:
    random.seed(7)
    expected = [random.random() for _ in range(2)]
    random.seed(7)
    first = random.random()
    scoring.ifeval(ifeval_row("punctuation:no_comma"), "Hello")
    assert [first, random.random()] == expected


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("length_constraints:number_words", {"relation": "at least"}, "lacks num_words"),
        ("no:such", {}, "knows no instruction"),
        ("length_constraints:number_words", {"relation": "roughly", "num_words": 3}, "checker failed"),
    ],
)
def test_ifeval_does_not_make_up_what_a_row_lacks(name: str, given: dict[str, Any], reason: str) -> None:
    score = scoring.ifeval(ifeval_row(name, **given), "Hello there.")
    assert reason in (score.unscored or "")
    assert set(score.scores.values()) == {0.0}


WITHOUT_NLTK_DATA = """
import json, sys
import nltk
from pathlib import Path
nltk.data.path[:] = []
nltk.download = None  # would fail loudly
from fusionroute.evaluation import scoring
if len(sys.argv) > 1:
    scoring.find_nltk_data(Path(sys.argv[1]))
row = lambda name, **given: {"key": 1, "prompt": "?", "instruction_id_list": [name], "kwargs": [given]}
two = row("length_constraints:number_sentences", num_sentences=2, relation="at least")
capital = row("change_case:capital_word_frequency", capital_frequency=1, capital_relation="at least")
counting = scoring.ifeval(two, "It often rains. We stay here.")
capitals = scoring.ifeval(capital, "We STAY here.")
other = scoring.ifeval(row("punctuation:no_comma"), "Hello")
blank = scoring.ifeval(two, " ")
print(json.dumps([[s.scores["strict"], s.unscored] for s in (counting, capitals, other, blank)]))
"""


def run_without_nltk_data(*arguments: str) -> list[list[Any]]:
    command = [sys.executable, "-c", WITHOUT_NLTK_DATA, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def test_without_nltk_data_only_what_needs_it_is_unscored() -> None:
    counting, capitals, other, blank = run_without_nltk_data()
    assert "punkt_tab is missing" in counting[1]
    assert "punkt_tab is missing" in capitals[1]
    assert (other, blank) == ([1.0, None], [0.0, None])


def test_nltk_data_is_found_in_the_data_folder(tmp_path: Path) -> None:
    english = tmp_path / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    (english / "abbrev_types.txt").write_text("dr\n")
    (english / "collocations.tab").write_text("")
    (english / "sent_starters.txt").write_text("")
    (english / "ortho_context.tab").write_text("the\t46\n")
    counting, capitals, other, blank = run_without_nltk_data(str(tmp_path))
    assert (counting, capitals, other, blank) == ([1.0, None], [1.0, None], [1.0, None], [0.0, None])


def test_weighted_mean() -> None:
    assert scoring.weighted_mean([(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)]) == 0.5
    assert scoring.weighted_mean([]) == 0.0
