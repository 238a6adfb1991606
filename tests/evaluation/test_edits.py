"""Answers edited by rule: lm-eval's checkers, which know nothing of the rules, find that they follow."""

import random
from typing import Any

import pytest

from fusionroute.evaluation import instructions, scoring
from fusionroute.evaluation.edits import EDITED, edited
from fusionroute.evaluation.fields import checked
from fusionroute.evaluation.instructions import KINDS, instructed

pytestmark = pytest.mark.usefixtures("punkt")

REQUEST = "Tell me about the sea."
ANSWER = (
    'Whales wander through cold oceans, and sailors call that "the old road". Nobody has counted them. '
    "Their songs reach distant harbours. Fishermen hear them in winter, when the nights are long. "
    "Some believe the oceans answer. Divers have looked for proof, and came home with empty hands."
)
# Amounts that a rule cannot raise a text to. Words to use are the answer's already, and letters are as they are.
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


@pytest.mark.parametrize("kind", sorted(EDITED - {"keywords:existence", "keywords:letter_frequency"}))
def test_an_edited_answer_follows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    for seed in range(12):
        row = drawn(kind, seed, monkeypatch)
        if kind in RAISED and "at least" in row["kwargs"][0].values():
            continue
        text = edited(ANSWER, row)
        if kind == "keywords:forbidden_words" and text is None:
            continue  # most sentences have such a word
        assert text is not None, row
        assert follows(row, text), (row, text)
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("kind", sorted(set(KINDS) - EDITED))
def test_what_no_rule_can_do_is_left_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert edited(ANSWER, drawn(kind, 0, monkeypatch)) is None


def test_rules_work_together_in_whatever_order_they_are_asked_for() -> None:
    kinds = ["startend:quotation", "detectable_format:title", "punctuation:no_comma"]
    row = {"prompt": REQUEST, "instruction_id_list": kinds, "kwargs": [{}, {}, {}]}
    text = edited(ANSWER, row)
    assert text is not None
    assert follows(row, text)
    backwards = {"prompt": REQUEST, "instruction_id_list": kinds[::-1], "kwargs": [{}, {}, {}]}
    assert edited(ANSWER, backwards) == text


def asks(*kinds: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"instruction_id_list": [kind for kind, _ in kinds], "kwargs": [given for _, given in kinds]}


SECTIONS = ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2})
PARAGRAPHS = ("length_constraints:number_paragraphs", {"num_paragraphs": 2})
POSTSCRIPT = ("detectable_content:postscript", {"postscript_marker": "P.S."})


def test_a_postscript_leaves_the_lines_before_it() -> None:
    text = edited(ANSWER, asks(SECTIONS, POSTSCRIPT))
    assert text is not None
    lines = text.splitlines()
    assert [lines.index("Section 1"), text.count("\nSection 2\n")] == [0, 1]
    assert lines[-1].startswith("P.S. Divers have looked")
    assert "\n***\n" in (edited(ANSWER, asks(PARAGRAPHS, POSTSCRIPT)) or "")


def test_a_title_is_the_texts_and_not_a_heads() -> None:
    text = edited("I'm sure it's deep. Nobody knows.", asks(SECTIONS, ("detectable_format:title", {})))
    assert text == "<<I'm Sure It's Deep>>\n\nSection 1\nI'm sure it's deep.\n\nSection 2\nNobody knows."


def test_heads_are_no_blanks() -> None:
    text = edited(ANSWER, asks(SECTIONS, ("detectable_content:number_placeholders", {"num_placeholders": 4})))
    assert text is not None
    assert "Section 1\n" in text
    assert text.count("[") == 4


def test_a_word_within_another_counts_as_the_checker_counts() -> None:
    row = asks(("keywords:frequency", {"keyword": "ship", "frequency": 2, "relation": "less than"}))
    assert (
        edited("A ship came. Shipping is slow. All is well. So it goes.", row)
        == "A ship came. All is well. So it goes."
    )


def test_words_are_counted_as_the_checker_counts() -> None:
    row = asks(("length_constraints:number_words", {"num_words": 9, "relation": "less than"}))
    assert edited("It's a well-known sea. It's deep.", row) == "It's a well-known sea. It's deep."[:22]


def test_what_is_short_enough_stays_as_it_is() -> None:
    row = asks(("length_constraints:number_sentences", {"num_sentences": 4, "relation": "less than"}))
    assert edited("It is deep.\n\nIt is wide.", row) == "It is deep.\n\nIt is wide."


def test_a_doctor_ends_no_sentence() -> None:
    assert edited("It is deep. So says Dr. Brown.", asks(POSTSCRIPT)) == "It is deep.\n\nP.S. So says Dr. Brown."


def test_sentences_that_must_not_be_are_left_out_whole() -> None:
    row = {"instruction_id_list": ["keywords:forbidden_words"], "kwargs": [{"forbidden_words": ["songs", "divers"]}]}
    text = edited(ANSWER, row)
    assert text is not None
    assert "harbours" not in text
    assert text.startswith("Whales wander")


def test_what_would_lose_most_of_its_sentences_is_none() -> None:
    row = {"instruction_id_list": ["keywords:forbidden_words"], "kwargs": [{"forbidden_words": ["them", "oceans"]}]}
    assert edited(ANSWER, row) is None


def test_too_few_sentences_make_no_list() -> None:
    row = {"instruction_id_list": ["detectable_format:number_bullet_lists"], "kwargs": [{"num_bullets": 3}]}
    assert edited("It is deep. It is wide.", row) is None


def test_a_number_before_a_point_ends_no_sentence() -> None:
    wanted = {"section_spliter": "Part", "num_sections": 2}
    row = {"instruction_id_list": ["detectable_format:multiple_sections"], "kwargs": [wanted]}
    assert edited("1. It is deep. 2. It is wide.", row) == "Part 1\n1. It is deep.\n\nPart 2\n2. It is wide."
