"""Masks of response formats: what is allowed is what the format can go on with."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionroute import load_tokenizer
from fusionroute.errors import UsageError
from fusionroute.serving.errors import ApiError
from fusionroute.serving.grammar import GrammarMask, Grammars

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    tokenizer = load_tokenizer(folder)
    return Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


@pytest.fixture
def mask(grammars: Grammars) -> GrammarMask:
    return grammars.mask(grammars.of_schema(SCHEMA), len(PROMPT))


def walk(mask: GrammarMask, generator: random.Random, decode: Callable[[list[int]], str]) -> str:
    """A random text that the mask allows, to an end id."""
    ids = list(PROMPT)
    for _ in range(300):
        token = generator.choice(mask(ids).tolist())
        if token in mask.grammars.ends:
            return decode(ids[len(PROMPT) :])
        ids.append(token)
    raise AssertionError("no end in 300 tokens")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_it_allows_fits_the_schema(mask: GrammarMask, folder: Path, seed: int) -> None:
    found = json.loads(walk(mask, random.Random(seed), load_tokenizer(folder).decode))
    assert set(found) == {"name", "age"}
    assert isinstance(found["name"], str)
    assert 0 <= found["age"] <= 99


def test_ids_may_be_asked_about_in_any_order(grammars: Grammars, mask: GrammarMask) -> None:
    ids = [*PROMPT, *grammars.tokenizer.tokenize_str('{"name": "Al", "age": 7}')]
    fresh = {
        n: grammars.mask(grammars.of_schema(SCHEMA), len(PROMPT))(ids[:n]).tolist() for n in range(3, len(ids) + 1)
    }
    generator = random.Random(0)
    for n in generator.choices(list(fresh), k=40):
        assert mask(ids[:n]).tolist() == fresh[n]


def test_what_does_not_fit_is_said(mask: GrammarMask, grammars: Grammars) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        mask([*PROMPT, *grammars.tokenizer.tokenize_str("[1]")])


def test_complete_text_may_only_end(mask: GrammarMask, grammars: Grammars) -> None:
    ids = [*PROMPT, *grammars.tokenizer.tokenize_str('{"name": "Al", "age": 7}')]
    assert mask(ids).tolist() == grammars.ends


@pytest.mark.parametrize(
    "schema", [{"type": "number", "minimum": "x"}, {"type": "nothing"}, {"$ref": "#/definitions/no"}]
)
def test_schemas_that_are_none(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refusal:
        grammars.of_schema(schema)
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_schema")


def test_a_forced_call_with_definitions(grammars: Grammars, folder: Path) -> None:
    one = {
        "type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "required": ["x"], "additionalProperties": False,
        "$defs": {"X": {"enum": ["a", "b"]}},
    }  # fmt: skip
    grammar = grammars.of_calls(
        [("one", one), ("two", {"type": "object", "additionalProperties": False})], "<tool_call>\n", "\n</tool_call>"
    )
    for seed in range(6):
        text = walk(grammars.mask(grammar, len(PROMPT)), random.Random(seed), load_tokenizer(folder).decode)
        inner = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        assert inner["name"] == "two" or inner["arguments"]["x"] in ("a", "b")


def test_a_forced_call(grammars: Grammars, folder: Path) -> None:
    schema = {
        "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False
    }  # fmt: skip
    grammar = grammars.of_calls([("add", schema)], "<tool_call>\n", "\n</tool_call>")
    text = walk(grammars.mask(grammar, len(PROMPT)), random.Random(1), load_tokenizer(folder).decode)
    inner = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert inner["name"] == "add"
    assert inner["arguments"]["a"] in (1, 2)
