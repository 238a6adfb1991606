"""Answers edited by rule: lm-eval's checkers, which know nothing of the rules, find that they follow."""

import random
from typing import Any

import pytest

from fusionroute.evaluation import instructions, scoring
from fusionroute.evaluation.edits import EDITS, edited
from fusionroute.evaluation.fields import checked
from fusionroute.evaluation.instructions import KINDS, instructed

pytestmark = pytest.mark.usefixtures("punkt")

REQUEST = "Tell me about the sea."
ANSWER = (
    'Whales wander through cold oceans, and sailors call that "the old road". Nobody has counted them. '
    "Their songs reach distant harbours. Fishermen hear them in winter, when the nights are long. "
    "Some believe the oceans answer. Divers have looked for proof, and came home with empty hands."
)
# Amounts that a rule cannot raise a text to; of letters it cannot lower them either.
RAISED = ("keywords:frequency", "length_constraints:number_words", "length_constraints:number_sentences")


def drawn(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(instructions, "KINDS", {kind: KINDS[kind]})
    row = instructed(REQUEST, ANSWER, random.Random(seed), scoring.known_instructions(), most=1)
    assert row is not None
    return row


def follows(row: dict[str, Any], text: str) -> bool:
    fields, defect = checked("ifeval", row)
    assert not defect
    found = scoring.ifeval(fields, text)
    assert found.unscored is None
    return found.scores["strict"] == 1


@pytest.mark.parametrize("kind", [kind for kind in EDITS if kind != "keywords:letter_frequency"])
def test_an_edited_answer_follows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    for seed in range(12):
        row = drawn(kind, seed, monkeypatch)
        if kind in RAISED and "at least" in row["kwargs"][0].values():
            continue
        text = edited(REQUEST, ANSWER, row)
        if kind == "keywords:forbidden_words" and text is None:
            continue  # most sentences have such a word
        assert text is not None, row
        assert follows(row, text), (row, text)
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(EDITS)))
def test_what_no_rule_can_do_is_left_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert edited(REQUEST, ANSWER, drawn(kind, 0, monkeypatch)) is None


def test_rules_work_together_in_whatever_order_they_are_asked_for() -> None:
    kinds = ["startend:quotation", "detectable_format:title", "punctuation:no_comma"]
    row = {"prompt": REQUEST, "instruction_id_list": kinds, "kwargs": [{}, {}, {}]}
    text = edited(REQUEST, ANSWER, row)
    assert text is not None
    assert follows(row, text)
    backwards = {"prompt": REQUEST, "instruction_id_list": kinds[::-1], "kwargs": [{}, {}, {}]}
    assert edited(REQUEST, ANSWER, backwards) == text


def test_sentences_that_must_not_be_are_left_out_whole() -> None:
    row = {"instruction_id_list": ["keywords:forbidden_words"], "kwargs": [{"forbidden_words": ["songs", "divers"]}]}
    text = edited(REQUEST, ANSWER, row)
    assert text is not None
    assert "harbours" not in text
    assert text.startswith("Whales wander")


def test_what_would_lose_most_of_its_sentences_is_none() -> None:
    row = {"instruction_id_list": ["keywords:forbidden_words"], "kwargs": [{"forbidden_words": ["them", "oceans"]}]}
    assert edited(REQUEST, ANSWER, row) is None


def test_too_few_sentences_make_no_list() -> None:
    row = {"instruction_id_list": ["detectable_format:number_bullet_lists"], "kwargs": [{"num_bullets": 3}]}
    assert edited(REQUEST, "It is deep. It is wide.", row) is None


def test_a_number_before_a_point_ends_no_sentence() -> None:
    wanted = {"section_spliter": "Part", "num_sections": 2}
    row = {"instruction_id_list": ["detectable_format:multiple_sections"], "kwargs": [wanted]}
    assert edited(REQUEST, "1. It is deep. 2. It is wide.", row) == "Part 1\n1. It is deep.\n\nPart 2\n2. It is wide."
