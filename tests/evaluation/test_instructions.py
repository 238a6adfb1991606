"""Requests with instructions: lm-eval's checkers can check each, and what the words ask for is what they check."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.evaluation import instructions, scoring
from fusionroute.evaluation.fields import checked
from fusionroute.evaluation.instructions import KINDS, instructed

pytestmark = pytest.mark.usefixtures("punkt")

REQUEST = "Tell me about the sea."
ANSWER = "Whales wander through cold oceans while sailors sing about distant harbours."

# An answer that does what the words ask for, by kind.
OBEYED: dict[str, Callable[[dict[str, Any]], str]] = {
    "punctuation:no_comma": lambda k: "It is deep and wide.",
    "change_case:english_lowercase": lambda k: "it is deep and it is very wide, and nobody has seen all of it.",
    "change_case:english_capital": lambda k: "THE SEA IS DEEP AND IT IS VERY WIDE AND NOBODY HAS SEEN ALL OF IT.",
    "change_case:capital_word_frequency": lambda k: "sea " + "DEEP " * (k["capital_frequency"] - less(k)),
    "length_constraints:number_words": lambda k: "deep " * (k["num_words"] - less(k)),
    "length_constraints:number_sentences": lambda k: "It is deep. " * (k["num_sentences"] - less(k)),
    "length_constraints:number_paragraphs": lambda k: "\n***\n".join(["It is deep."] * k["num_paragraphs"]),
    "length_constraints:nth_paragraph_first_word": lambda k: "\n\n".join(
        f"{k['first_word'] if n == k['nth_paragraph'] else 'And'} it is deep."
        for n in range(1, k["num_paragraphs"] + 1)
    ),
    "detectable_content:number_placeholders": lambda k: "[name] " * k["num_placeholders"],
    "detectable_content:postscript": lambda k: f"It is deep.\n{k['postscript_marker']} And wide.",
    "detectable_format:number_bullet_lists": lambda k: "It is:\n" + "* deep\n" * k["num_bullets"],
    "detectable_format:number_highlighted_sections": lambda k: "It is *very deep* " * k["num_highlights"],
    "detectable_format:multiple_sections": lambda k: "".join(
        f"{k['section_spliter']} {n}\nIt is deep.\n" for n in range(1, k["num_sections"] + 1)
    ),
    "detectable_format:json_format": lambda k: json.dumps({"depth": "great"}),
    "detectable_format:title": lambda k: "<<The sea>>\nIt is deep.",
    "combination:two_responses": lambda k: "It is deep.\n******\nNobody knows.",
    "combination:repeat_prompt": lambda k: f"{REQUEST}\nIt is deep.",
    "startend:end_checker": lambda k: f"It is deep. {k['end_phrase']}",
    "startend:quotation": lambda k: '"It is deep."',
    "keywords:existence": lambda k: " ".join(k["keywords"]),
    "keywords:forbidden_words": lambda k: "It is.",
    "keywords:frequency": lambda k: "So: " + f"{k['keyword']} " * (k["frequency"] - less(k)),
    "keywords:letter_frequency": lambda k: "-" + k["letter"] * (k["let_frequency"] - less(k)),
    "language:response_language": lambda k: {
        "de": "Das Meer ist sehr tief und niemand hat es ganz gesehen.",
        "fr": "La mer est très profonde et personne ne l'a vue tout entière.",
        "es": "El mar es muy profundo y nadie lo ha visto por completo todavía.",
        "it": "Il mare è molto profondo e nessuno lo ha mai visto tutto intero.",
        "pt": "O mar é muito profundo e ninguém ainda o viu por inteiro, não é?",
    }[k["language"]],
}


def less(arguments: dict[str, Any]) -> bool:
    return "less than" in arguments.values()


def drawn(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(instructions, "KINDS", {kind: KINDS[kind]})
    row = instructed(REQUEST, ANSWER, random.Random(seed), scoring.known_instructions(), most=1)
    assert row is not None
    fields, defect = checked("ifeval", row)
    assert not defect
    return fields


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_who_does_as_the_words_say_is_right(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = drawn(kind, seed, monkeypatch)
    found = scoring.ifeval(row, OBEYED[kind](row["kwargs"][0]))
    assert (found.unscored, found.scores["strict"]) == (None, 1.0), (row, OBEYED[kind](row["kwargs"][0]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_name_every_threshold(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(8):
        row = drawn(kind, seed, monkeypatch)
        said = row["prompt"].removeprefix(REQUEST)
        for name, value in row["kwargs"][0].items():
            if name.endswith("relation"):
                assert {"at least": "at least", "less than": "fewer than"}[value] in said
            elif name not in ("language", "prompt_to_repeat"):
                assert all(str(part) in said for part in (value if isinstance(value, list) else [value]))


@given(seed=st.integers(0, 10**6), most=st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_kinds_that_stand_together_may(seed: int, most: int) -> None:
    conflicts = scoring.known_instructions()
    row = instructed(REQUEST, ANSWER, random.Random(seed), conflicts, most=most)
    assert row is not None
    kinds = row["instruction_id_list"]
    assert 1 <= len(kinds) == len(set(kinds)) == len(row["kwargs"]) <= most
    assert not any(b in conflicts[a] for a in kinds for b in kinds if a != b)
    assert row["prompt"].startswith(f"{REQUEST}\n\n")


@given(seed=st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_what_is_asked_together_can_be_done_together(seed: int) -> None:
    """Pairs that lm-eval's table of conflicts allows and no answer can follow."""
    row = instructed("Write, if you like, about it.", ANSWER, random.Random(seed), scoring.known_instructions(), most=3)
    assert row is not None
    kinds = set(row["instruction_id_list"])
    cased = {"change_case:english_lowercase", "change_case:english_capital"}
    assert not (kinds & cased and "detectable_format:multiple_sections" in kinds)
    assert not {"punctuation:no_comma", "combination:repeat_prompt"} <= kinds
    named = [word for given in row["kwargs"] for word in words_of(given)]
    assert len(named) == len(set(named))


def words_of(arguments: dict[str, Any]) -> list[str]:
    lists = [arguments.get("keywords", []), arguments.get("forbidden_words", [])]
    return [*lists[0], *lists[1], *(arguments[name] for name in ("keyword", "first_word") if name in arguments)]


def test_the_same_seed_asks_for_the_same() -> None:
    conflicts = scoring.known_instructions()
    first, second = (instructed(REQUEST, ANSWER, random.Random(3), conflicts) for _ in range(2))
    assert first == second


def test_an_answer_without_words_to_use_makes_none() -> None:
    assert instructed(REQUEST, "Yes.", random.Random(0), scoring.known_instructions()) is None


def test_a_long_request_is_not_to_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "combination:repeat_prompt"
    monkeypatch.setattr(instructions, "KINDS", {kind: KINDS[kind], "startend:quotation": KINDS["startend:quotation"]})
    long = "word " * 100
    for seed in range(10):
        row = instructed(long, ANSWER, random.Random(seed), scoring.known_instructions(), most=1)
        assert row is not None
        assert row["instruction_id_list"] == ["startend:quotation"]
