"""Raw rows become trl's rows, bad files become one-line errors, slices are deterministic."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fusionroute.errors import FusionRouteError
from fusionroute.training import formats
from fusionroute.training.rows import DataSpec, load_counted, load_rows, parse_spec


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def convert(tmp_path: Path, format: str, *raw: dict[str, Any], **options: Any) -> tuple[list[dict[str, Any]], int]:
    path = write(tmp_path / "raw.jsonl", list(raw))
    return load_counted(parse_spec({"format": format, "path": str(path), "domain": "d", **options}), None)


def one(tmp_path: Path, format: str, raw: dict[str, Any], **options: Any) -> dict[str, Any]:
    rows, dropped = convert(tmp_path, format, raw, **options)
    assert (len(rows), dropped) == (1, 0)
    return rows[0]


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


KEPT = {"messages": chat("keep", "me")}


def is_dropped(tmp_path: Path, format: str, raw: dict[str, Any], kept: dict[str, Any]) -> bool:
    rows, dropped = convert(tmp_path, format, raw, kept)
    return (len(rows), dropped) == (1, 1)


# Chat formats


def test_gsm8k_loses_its_calculator_marks_and_keeps_the_last_line(tmp_path: Path) -> None:
    raw = {"question": "Two and two pears?", "answer": "2+2=<<2+2=4>>4 pears\n#### 4"}
    expected = {"messages": chat("Two and two pears?", "2+2=4 pears\n#### 4"), "domain": "d"}
    assert one(tmp_path, "gsm8k", raw) == expected


def test_mbpp_shows_the_tests_and_answers_with_a_fenced_block(tmp_path: Path) -> None:
    raw = {
        "text": "Add one.",
        "code": "def f(x):\r\n\treturn x + 1 \r\n ",
        "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
    }
    user = "Add one.\nYour code should pass these tests:\nassert f(1) == 2\nassert f(2) == 3"
    answer = "```python\ndef f(x):\n\treturn x + 1\n```"
    assert one(tmp_path, "mbpp", raw)["messages"] == chat(user, answer)


def test_mbpp_without_code_is_dropped(tmp_path: Path) -> None:
    kept = {"text": "t", "code": "pass", "test_list": []}
    assert is_dropped(tmp_path, "mbpp", kept | {"code": " \r\n"}, kept)


def test_gpteacher_puts_the_input_under_the_instruction(tmp_path: Path) -> None:
    raw = {"instruction": "Greet.", "input": "Ada", "response": "Good day, Ada."}
    assert one(tmp_path, "gpteacher", raw)["messages"] == chat("Greet.\n\nAda", "Good day, Ada.")


@pytest.mark.parametrize(
    ("response", "answer"),
    [("print('hi')\n", "```python\nprint('hi')\n```"), ("So:\n```\nprint('hi')\n```", "So:\n```\nprint('hi')\n```")],
    ids=["bare", "fenced"],
)
def test_gpteacher_python_has_one_fence(tmp_path: Path, response: str, answer: str) -> None:
    raw = {"instruction": "Say hi in Python.", "response": response}
    assert one(tmp_path, "gpteacher", raw, python_only=True)["messages"][1]["content"] == answer


def test_gpteacher_python_counts_the_others_as_dropped(tmp_path: Path) -> None:
    python = {"instruction": "Say hi in Python.", "response": "print('hi')"}
    java = {"instruction": "Say hi in Java.", "response": 'System.out.println("hi");'}
    rows, dropped = convert(tmp_path, "gpteacher", java, python, python_only=True)
    assert (len(rows), dropped) == (1, 1)


def test_instruct_without_an_input(tmp_path: Path) -> None:
    raw = {"instruction": "Name a colour.\n", "input": "", "output": "Red."}
    assert one(tmp_path, "instruct", raw)["messages"] == chat("Name a colour.", "Red.")


def test_self_instruct_takes_the_first_instance(tmp_path: Path) -> None:
    instances = [{"input": "cold", "output": "warm"}, {"input": "up", "output": "down"}]
    row = one(tmp_path, "self_instruct", {"instruction": "Opposite?", "instances": instances})
    assert row["messages"] == chat("Opposite?\n\ncold", "warm")


@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_perfectblend_is_sharegpt_and_an_empty_system_turn_none(tmp_path: Path, system: str) -> None:
    turns = [("system", system), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "So long")]
    row = one(tmp_path, "perfectblend", {"conversations": [{"from": who, "value": text} for who, text in turns]})
    assert row["messages"] == chat("Hi", "Hello", "Bye", "So long", system=system)


def test_messages_lose_other_keys(tmp_path: Path) -> None:
    raw = {"messages": [message | {"tool_calls": None} for message in chat("Hi", "Hello")]}
    assert one(tmp_path, "messages", raw)["messages"] == chat("Hi", "Hello")


@pytest.mark.parametrize(
    "messages",
    [
        *([], ["q", "a"], chat("q"), chat("q", "  "), chat("", "a"), chat("q", "a", "q"), chat("q", "a")[::-1]),
        chat("q", "a") + chat("x", system="late"),
        [{"role": "user", "content": "q"}, {"role": "tool", "content": "a"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}],
    ],
    ids=lambda messages: json.dumps(messages)[:60],
)
def test_messages_that_no_template_takes_are_dropped(tmp_path: Path, messages: list[Any]) -> None:
    assert is_dropped(tmp_path, "messages", {"messages": messages}, KEPT)


# Preference formats

PAIR = {
    "prompt": chat("Which?"),
    "chosen": [{"role": "assistant", "content": "This."}],
    "rejected": [{"role": "assistant", "content": "That."}],
    "domain": "d",
}


@pytest.mark.parametrize("format", ["ultrafeedback", "openhermes_preferences", "preference"])
@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Which?", "chosen": "This.", "rejected": "That."},
        {"prompt": "Which?", "chosen": chat("Which?", "This."), "rejected": chat("Which?", "That.")},
        {"chosen": chat("Which?", "This."), "rejected": chat("Which?", "That.")},
        {"prompt": PAIR["prompt"], "chosen": PAIR["chosen"], "rejected": PAIR["rejected"]},
        {"prompt": PAIR["prompt"], "chosen": "This.", "rejected": "That."},
    ],
    ids=["strings", "conversations", "conversations alone", "messages", "messages and strings"],
)
def test_every_shape_of_a_pair(tmp_path: Path, format: str, raw: dict[str, Any]) -> None:
    assert one(tmp_path, format, raw) == PAIR


@pytest.mark.parametrize("format", ["ultrafeedback", "preference"])
def test_the_better_answer_alone_is_a_chat_row(tmp_path: Path, format: str) -> None:
    raw = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}
    assert one(tmp_path, format, raw, chosen_only=True) == {"messages": chat("Which?", "This."), "domain": "d"}


def test_a_conversation_before_the_pair_stays_in_the_prompt(tmp_path: Path) -> None:
    before = ("Hi", "Hello", "Which?")
    raw = {"chosen": chat(*before, "This.", system="s"), "rejected": chat(*before, "That.", system="s")}
    assert one(tmp_path, "preference", raw)["prompt"] == chat(*before, system="s")


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Which?", "chosen": "This.", "rejected": "This."},
        {"prompt": "Which?", "chosen": "This.", "rejected": " "},
        {"prompt": "", "chosen": "This.", "rejected": "That."},
        {"prompt": [], "chosen": "This.", "rejected": "That."},
        {"chosen": chat("Which?", "This."), "rejected": chat("What?", "That.")},
        {"prompt": "Which?", "chosen": [], "rejected": "That."},
    ],
    ids=["equal", "empty answer", "empty prompt", "no prompt", "two prompts", "no answer"],
)
def test_pairs_that_prefer_nothing_are_dropped(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert is_dropped(tmp_path, "preference", raw, {k: v for k, v in PAIR.items() if k != "domain"})


def hh(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


def test_hh_rlhf_splits_the_transcript_at_the_last_turn(tmp_path: Path) -> None:
    before = ("Hi", "Hello", "Which?\n\nNow.")
    row = one(tmp_path, "hh_rlhf", {"chosen": hh(*before, "This."), "rejected": hh(*before, "That.")})
    assert row == PAIR | {"prompt": chat(*before)}


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (hh("q", "a"), hh("r", "b")),
        (hh("q", "a"), hh("q", "")),
        (hh("q", "a"), hh("q", "a")),
        (hh("q", "a"), hh("q", "a", "q", "b")),
        (hh("q", "a", "q"), hh("q", "a", "r")),
        ("no turns", "at all"),
    ],
    ids=["other prefix", "empty turn", "equal", "other length", "human last", "no transcript"],
)
def test_hh_rlhf_drops_what_is_no_pair(tmp_path: Path, chosen: str, rejected: str) -> None:
    kept = {"chosen": hh("q", "a"), "rejected": hh("q", "b")}
    assert is_dropped(tmp_path, "hh_rlhf", {"chosen": chosen, "rejected": rejected}, kept)


# Is it Python?


PYTHON = ["import os", "x = 1", "def f(): pass", "print(1)", "```\nprint(1)\n```", "So:\n```py\nx = 1\n```\nDone."]
OTHER = ["", "42", "average", "[1]", "ls -lS", "Output: 'NaN'", "int x = 1;", "It is 3.", "```js\nf()\n```", "x\0y"]


@pytest.mark.parametrize(("text", "expected"), [(text, True) for text in PYTHON] + [(text, False) for text in OTHER])
def test_python_is_told_from_other_text(text: str, expected: bool) -> None:
    assert formats.is_python(text) is expected


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Translate this Python code to Java.", True),
        ("Convert the following Python code into its equivalent C++ code.", True),
        ("Write the Python function f in R:", True),
        ("Write a JavaScript alert.", True),
        ("Design a SQL query.", True),
        ("How do I check the Python version using shell commands?", True),
        ("Translate this Java code to Python.", False),
        ("Translate the C++ code that reads a file into an equivalent Python function.", False),
        ("Write a Python script that connects to a MySQL database.", False),
        ("What is the area of a triangle with sides a, b and c?", False),
    ],
)
def test_the_language_asked_for(instruction: str, expected: bool) -> None:
    assert formats.asks_for_another_language(instruction) is expected


# Files, slices and errors


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A data folder with the questions 0 to 29, of which every third has no answer."""
    write(tmp_path / "n.jsonl", [{"question": str(i), "answer": "" if i % 3 == 0 else "a"} for i in range(30)])
    return tmp_path


def questions(folder: Path, **options: Any) -> list[str]:
    spec = DataSpec(format="gsm8k", path="n.jsonl", domain="math", **options)
    return [row["messages"][0]["content"] for row in load_rows(spec, folder)]


def test_rows_keep_the_order_of_the_file(numbered: Path) -> None:
    assert questions(numbered) == [str(i) for i in range(30) if i % 3]


def test_a_slice_counts_kept_rows(numbered: Path) -> None:
    assert questions(numbered, start=2, stop=4) == ["4", "5"]


def test_a_stop_beyond_the_end_takes_all(numbered: Path) -> None:
    assert len(questions(numbered, stop=1000)) == 20


@pytest.mark.parametrize(("seed", "same"), [(3, True), (4, False)])
def test_the_order_depends_on_the_seed_alone(numbered: Path, seed: int, same: bool) -> None:
    assert (questions(numbered, shuffle_seed=seed) == questions(numbered, shuffle_seed=3)) is same


def test_slices_of_one_seed_make_up_the_whole(numbered: Path) -> None:
    bounds = [(0, 7), (7, 8), (8, None)]
    joined = [q for a, b in bounds for q in questions(numbered, shuffle_seed=3, start=a, stop=b)]
    assert joined == questions(numbered, shuffle_seed=3)


def test_rows_beyond_the_slice_are_not_counted(numbered: Path) -> None:
    spec = DataSpec(format="gsm8k", path="n.jsonl", domain="math", stop=2)
    assert load_counted(spec, numbered)[1] == 1


ROW = {"question": "q", "answer": "a"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    text = json.dumps([ROW]) if ".jsonl" not in name else f"\ufeff{json.dumps(ROW)}\n\n"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert len(load_rows(DataSpec(format="gsm8k", path=name, domain="math"), tmp_path)) == 1


def message_of(entry: dict[str, Any], folder: Path | None) -> str:
    with pytest.raises(FusionRouteError) as caught:
        load_rows(parse_spec({"format": "gsm8k", "domain": "math", **entry}), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_named_in_full(tmp_path: Path) -> None:
    message = message_of({"path": "sub/none.jsonl"}, tmp_path)
    assert message.startswith(str(tmp_path / "sub" / "none.jsonl"))
    assert "--data DIR" in message


def test_a_relative_path_needs_a_data_folder() -> None:
    assert "--data DIR" in message_of({"path": "sub/none.jsonl"}, None)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", b'{}\n{"question": "q"', ":2: not JSON"),
        ("a.jsonl", b"{}\n[1, 2]", ":2: not a JSON object but [1, 2]"),
        ("a.jsonl", b'"\xff"', " cannot be read"),
        ("a.jsonl.gz", b"{}", " cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}")[:-3], " cannot be read"),
        ("a.json", b"[{", " cannot be read"),
        ("a.json", b"{}", " is not a list"),
        ("a.csv", b"question,answer", ": only .jsonl and .json"),
    ],
    ids=["line", "list", "not UTF-8", "not gzip", "half a gzip file", "half a list", "no list", "csv"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert message_of({"path": name}, tmp_path).startswith(f"{tmp_path / name}{problem}")


@pytest.mark.parametrize(
    ("format", "raw", "problem"),
    [
        ("gsm8k", {"question": "q"}, "field 'answer' is missing"),
        ("gsm8k", {"question": "q", "answer": 5}, "field 'answer' is not a str but 5"),
        ("mbpp", {"text": "t", "code": "c"}, "field 'test_list' is missing"),
        ("self_instruct", {"instruction": "i", "instances": []}, "field 'instances' holds no instance"),
        ("messages", {"messages": "q"}, "field 'messages' is not a list but 'q'"),
        ("perfectblend", {}, "field 'conversations' is missing"),
        ("preference", {"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ("ultrafeedback", {"prompt": "q", "chosen": "a"}, "field 'rejected' is missing"),
        ("hh_rlhf", {"chosen": hh("q", "a")}, "field 'rejected' is missing"),
    ],
)
def test_a_row_without_a_field_is_named(tmp_path: Path, format: str, raw: dict[str, Any], problem: str) -> None:
    path = write(tmp_path / "a.jsonl", [raw])
    message = message_of({"path": "a.jsonl", "format": format}, tmp_path)
    assert message == f"{path}:1: {problem}; format {format!r} needs it"


@pytest.mark.parametrize(("start", "answer", "counts"), [(0, "", "1 dropped, 0 left"), (1, "a", "0 dropped, 1 left")])
def test_nothing_to_take_is_an_error(tmp_path: Path, start: int, answer: str, counts: str) -> None:
    path = write(tmp_path / "a.jsonl", [ROW | {"answer": answer}])
    expected = f"{path}: no rows from {start} on: 1 read as 'gsm8k', {counts}"
    assert message_of({"path": "a.jsonl", "start": start}, tmp_path) == expected


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"format": "alpaca"}, "format: Input should be 'gsm8k'"),
        ({"format": "alpaca"}, "(given: 'alpaca')"),
        ({"stopp": 5}, "stopp: Extra inputs are not permitted"),
        ({"start": -1}, "start: Input should be greater"),
        ({"start": 5, "stop": 5}, "stop (5) must be greater than start (5)"),
        ({"python_only": True}, "python_only goes with format gpteacher"),
        ({"chosen_only": True}, "chosen_only goes with preference formats, not gsm8k"),
        ({"revision": "main"}, "name its split"),
    ],
)
def test_an_entry_that_cannot_be_meant_is_refused(entry: dict[str, Any], part: str) -> None:
    assert part in message_of({"path": "a.jsonl", **entry}, None)


# Data sets through `datasets`; a folder stands for a Hub id


@pytest.fixture
def hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"messages": chat(str(i), "a")} for i in range(5)])
    return folder


def test_a_data_set_is_read_by_its_split(hub_set: Path) -> None:
    spec = DataSpec(format="messages", path=str(hub_set), split="train[:4]", domain="general", start=1)
    assert [row["messages"][0]["content"] for row in load_rows(spec, None)] == ["1", "2", "3"]


def test_a_split_that_is_not_there_is_one_line(hub_set: Path) -> None:
    message = message_of({"format": "messages", "path": str(hub_set), "split": "none"}, None)
    assert message.startswith(f"cannot load data set {hub_set}, split none:")


def test_a_field_that_a_data_set_lacks_is_named(hub_set: Path) -> None:
    message = message_of({"path": str(hub_set), "split": "train"}, None)
    assert message.startswith(f"{hub_set}[train]:0: field 'question' is missing")
