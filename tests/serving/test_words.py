"""Single ids as text and as bytes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute import load_tokenizer
from fusionroute.serving.words import Words


@pytest.fixture(scope="module")
def words(folder: Path) -> Words:
    return Words(load_tokenizer(folder))


@given(text=st.text(max_size=30))
def test_the_bytes_of_its_ids_are_the_texts(words: Words, text: str) -> None:
    ids = words.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(words.bytes(i) for i in ids) == text.encode()


def test_part_of_a_character(words: Words) -> None:
    first = words.tokenizer("€", add_special_tokens=False)["input_ids"][0]
    assert words.text(first) == r"bytes:\xe2"


def test_special_tokens_are_their_names(words: Words) -> None:
    assert words.text(words.tokenizer.eos_token_id) == words.tokenizer.eos_token
