"""Thirteen words in a row are found wherever they stand; twelve are not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.errors import FusionRouteError
from fusionroute.training.overlap import (
    SHORTEST,
    WINDOW,
    BenchmarkIndex,
    benchmark_files,
    drop_overlapping,
    words,
)

# Test items use these letters, rows the others: what is shared is shared by construction.
item_words = st.text("abcdef", min_size=1, max_size=6)
row_words = st.text("uvwxyz", min_size=1, max_size=6)
separators = st.sampled_from([" ", ", ", "\n", " — ", "_", "\t(", ") . "])


def row(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts], "domain": "math"}


def sentence(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


@st.composite
def item_and_window(draw: st.DrawFn, size: int, extra: int) -> tuple[list[str], list[str]]:
    """A test item of at least `size` + `extra` different words, and `size` of them in a row."""
    item = draw(st.lists(item_words, min_size=size + extra, max_size=40, unique=True))
    start = draw(st.integers(0, len(item) - size))
    return item, item[start : start + size]


@given(
    item_and_window(WINDOW, 0),
    st.lists(row_words, max_size=20),
    st.lists(row_words, max_size=20),
    separators,
    st.booleans(),
)
def test_any_thirteen_words_are_found(
    drawn: tuple[list[str], list[str]], before: list[str], after: list[str], separator: str, upper: bool
) -> None:
    item, window = drawn
    text = separator.join([*before, *window, *after])
    index = BenchmarkIndex([("set/test.jsonl:1", " ".join(item))])
    assert index.overlaps(row("something else", text.upper() if upper else text)) == "set/test.jsonl:1"


@given(item_and_window(WINDOW - 1, 1), st.lists(row_words, max_size=20), st.lists(row_words, max_size=20))
def test_twelve_words_are_not(drawn: tuple[list[str], list[str]], before: list[str], after: list[str]) -> None:
    item, window = drawn
    index = BenchmarkIndex([("item", " ".join(item))])
    assert index.overlaps(row(" ".join([*before, *window, *after]))) is None


@given(
    st.lists(item_words, min_size=SHORTEST, max_size=WINDOW - 1),
    st.lists(row_words, max_size=9),
    st.lists(row_words, max_size=9),
)
def test_a_short_item_is_found_as_a_whole(item: list[str], before: list[str], after: list[str]) -> None:
    index = BenchmarkIndex([("item", " ".join(item))])
    assert index.overlaps(row(" ".join([*before, *item, *after]))) == "item"


@given(st.lists(item_words, min_size=SHORTEST + 1, max_size=WINDOW - 1, unique=True))
def test_a_part_of_a_short_item_is_not(item: list[str]) -> None:
    assert BenchmarkIndex([("item", " ".join(item))]).overlaps(row(" ".join(item[:-1]))) is None


def test_an_item_of_five_words_is_ignored() -> None:
    assert BenchmarkIndex([("item", sentence(5))]).overlaps(row(sentence(5))) is None


def test_words_of_two_texts_do_not_add_up() -> None:
    index = BenchmarkIndex([("item", sentence(13))])
    assert index.overlaps(row(sentence(6), " ".join(f"w{i}" for i in range(6, 13)))) is None


def test_every_text_of_a_preference_row_is_read() -> None:
    pair = {"prompt": [], "chosen": [{"content": "no"}], "rejected": [{"content": sentence(13)}]}
    assert BenchmarkIndex([("item", sentence(13))]).overlaps(pair) == "item"


def test_a_gsm8k_answer_is_found_without_its_calculator_marks() -> None:
    answer = "He has 2+3=<<2+3=5>>5 pears. He eats 5-1=<<5-1=4>>4 of them.\n#### 4"
    without = "He has 2+3=5 pears. He eats 5-1=4 of them.\n#### 4"
    assert BenchmarkIndex([("item", answer)]).overlaps(row(without)) == "item"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Janet’s DUCKS, 16!", ["janet", "s", "ducks", "16"]),
        ("def find_Min(x1):\r\n\treturn 3.5", ["def", "find", "min", "x1", "return", "3", "5"]),
        ("Où est l’Été ?", ["où", "est", "l", "été"]),
        ("e\u0301te\u0301", ["été"]),
        ("x² ５", ["x2", "5"]),
        ("привет, мир", ["привет", "мир"]),
        ("$\\frac{\\pi}{2}$", ["frac", "pi", "2"]),
        (" \n—_", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder: two test files, prompts, few-shot examples, and files that are not tests."""
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k/test.jsonl": [{"question": "short"}, {"question": "x", "answer": "first " + sentence(13)}],
        "humaneval/test.jsonl": [{"task_id": "a/1", "test": "second " + sentence(12)}],
        "general/prompts.jsonl": [{"instruction": "x", "instances": [{"input": "third " + sentence(12)}]}],
        "mbpp/prompt.jsonl": [{"test_list": ["x", "assert f one two three four"]}],
        "gsm8k/train.jsonl": [{"question": "fourth " + sentence(12)}],
        "general/other.jsonl": [],
    }
    for name, items in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path


def test_benchmark_files_are_the_test_files(data: Path) -> None:
    found = [path.relative_to(data).as_posix() for path in benchmark_files(data)]
    assert found == ["general/prompts.jsonl", "gsm8k/test.jsonl", "humaneval/test.jsonl", "mbpp/prompt.jsonl"]


def test_a_folder_without_tests_has_none(tmp_path: Path) -> None:
    assert benchmark_files(tmp_path) == []


def test_a_missing_data_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match="none is not a folder"):
        benchmark_files(tmp_path / "none")


def test_a_missing_test_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match=r"test\.jsonl is missing"):
        BenchmarkIndex.from_files([tmp_path / "test.jsonl"])


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("first " + sentence(12), "gsm8k/test.jsonl:2"),
        ("second " + sentence(12), "humaneval/test.jsonl:1"),
        ("third " + sentence(12), "general/prompts.jsonl:1"),
        ("assert f(one, two) == three, four", "mbpp/prompt.jsonl:1"),
        ("fourth " + sentence(12), None),
    ],
)
def test_every_string_of_a_test_file_is_indexed(data: Path, text: str, item: str | None) -> None:
    assert BenchmarkIndex.from_files(benchmark_files(data)).overlaps(row(text)) == item


def test_rows_are_parted_in_order() -> None:
    index = BenchmarkIndex([("one", "1 " + sentence(12)), ("two", "2 " + sentence(12))])
    rows = [row("a"), row("2 " + sentence(12)), row("b"), row("1 " + sentence(12))]
    assert drop_overlapping(rows, index) == ([rows[0], rows[2]], [(1, "two"), (3, "one")])
