"""Calls of functions in the text of an answer, however it is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.serving.tools import Calls, known

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
DEEP = f"<tool_call>{'[' * 100_000}</tool_call>"


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    calls = Calls()
    text = "".join(calls.push(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces))
    return text, [(call["function"]["name"], call["function"]["arguments"]) for call in calls.calls]


@pytest.mark.parametrize(
    ("text", "rest", "count"),
    [
        ("Hello", "Hello", 0),
        (CALL, "", 1),
        ("Let me see. " + CALL, "Let me see. ", 1),
        (CALL + "\n" + CALL, "", 2),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", 0),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', 0),
        ('<tool_call>\n{"name": "add", "arguments": {}}', "", 1),
        ("a < b <tool", "a < b <tool", 0),
        pytest.param(DEEP, DEEP, 0, id="deep"),
    ],
)
def test_calls_and_the_rest(text: str, rest: str, count: int) -> None:
    found = read([text])
    assert found[0] == rest
    assert len(found[1]) == count


@given(st.text(alphabet="ab<>/tool_call\n ", max_size=40), st.lists(st.integers(0, 120), max_size=6), st.booleans())
def test_where_the_text_is_cut_makes_no_difference(text: str, cuts: list[int], called: bool) -> None:
    whole = text + CALL if called else text
    places = sorted({min(cut, len(whole)) for cut in cuts})
    pieces = [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]
    assert read(pieces) == read([whole])


def test_arguments_are_json() -> None:
    _, [(name, arguments)] = read([CALL])
    assert (name, json.loads(arguments)) == ("add", {"a": 1})


@pytest.mark.parametrize(
    ("template", "expected"),
    [(None, False), ("{{ messages }}", False), ("{{ tools }}", False), ("{% if tools %}<tool_call>{% endif %}", True)],
)
def test_templates_that_are_known(template: str | None, expected: bool) -> None:
    assert known(template) is expected
