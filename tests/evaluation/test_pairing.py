"""Which answers are right or wrong, and which make a pair."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.evaluation.pairing import RIGHT, WRONG, Candidate, distinct, pair_up, unfit, verdict
from fusionroute.training.overlap import BenchmarkIndex

NO_ITEMS = BenchmarkIndex([])
ITEM = "a farmer has twelve cows and buys three more so how many has he now"


def answers(texts: list[str], kind: str = RIGHT) -> list[Candidate]:
    return [Candidate(text, kind, {}, number, 0) for number, text in enumerate(texts)]


def pairs(rights: list[str], wrongs: list[str], most: int = 1) -> list[tuple[str, str]]:
    return [(r.text, w.text) for r, w in pair_up(answers(rights), answers(wrongs, WRONG), most)]


def test_the_closest_in_length_make_the_pair() -> None:
    assert pairs(["r" * 9, "r" * 4], ["w" * 20, "w" * 5]) == [("rrrr", "wwwww")]


def test_of_equal_distances_the_first_drawn_counts() -> None:
    assert pairs(["rr", "r2"], ["w", "www"]) == [("rr", "w")]


def test_no_answer_is_used_twice() -> None:
    assert pairs(["rr", "rrrrrr"], ["ww", "www"], most=4) == [("rr", "ww"), ("rrrrrr", "www")]


def test_a_text_drawn_twice_is_one() -> None:
    assert pairs(["r", "r"], ["w", "v", "w"], most=4) == [("r", "w")]


def test_of_a_text_drawn_twice_the_first_is_named() -> None:
    ((_, wrong),) = pair_up(answers(["r"]), answers(["long", "w", "w"], WRONG), 1)
    assert wrong.sample == 1


def test_of_answers_that_are_alike_the_first_drawn_stays() -> None:
    assert [answer.sample for answer in distinct(answers(["w", "v", "w", "v", "u"]))] == [0, 1, 4]


@pytest.mark.parametrize(("rights", "wrongs"), [([], ["w"]), (["r"], []), ([], [])])
def test_one_kind_alone_makes_no_pair(rights: list[str], wrongs: list[str]) -> None:
    assert pairs(rights, wrongs, most=3) == []


@given(st.lists(st.text("ab", max_size=6)), st.lists(st.text("cd", max_size=6)), st.integers(1, 5))
def test_as_many_pairs_as_there_are_texts(rights: list[str], wrongs: list[str], most: int) -> None:
    found = pairs(rights, wrongs, most)
    assert len(found) == min(most, len(set(rights)), len(set(wrongs)))
    for side in zip(*found, strict=True):
        assert len(set(side)) == len(side)


@pytest.mark.parametrize(
    ("task", "text", "finish", "reason"),
    [
        ("gsm8k", "It is 3.", "stop", None),
        ("gsm8k", "It is 3.", "length", "cut off"),
        ("gsm8k", " \n", "stop", "empty"),
        ("gsm8k", "", "stop", "empty"),
        ("gsm8k", f"As in: {ITEM}", "stop", "overlapping"),
        ("ifeval", "word " * 14, "stop", "too short"),
        ("ifeval", "As an AI language model, I have no feelings. " + "word " * 20, "stop", "refusal"),
        ("ifeval", "I'M SORRY, BUT I CAN'T ASSIST WITH THAT. " + "WORD " * 20, "stop", "refusal"),
        ("ifeval", "Oh Romeo, I cannot love you. " + "word " * 20, "stop", None),
        ("gsm8k", "As an AI language model, I find 4.", "stop", None),
        ("ifeval", "word " * 15, "stop", None),
    ],
)
def test_what_is_not_worth_checking(task: str, text: str, finish: str, reason: str | None) -> None:
    assert unfit(task, text, finish, BenchmarkIndex([("gsm8k/test.jsonl:1", ITEM)])) == reason


@pytest.mark.parametrize(
    ("strict", "flexible", "expected"),
    [(1.0, 1.0, "right"), (0.0, 1.0, "right"), (0.0, 0.0, "wrong"), (1.0, 0.0, "unclear")],
)
def test_right_is_the_primary_metric_and_wrong_every_metric(strict: float, flexible: float, expected: str) -> None:
    assert verdict("gsm8k", {"strict": strict, "flexible": flexible}, None) == expected


def test_of_instructions_strict_is_the_primary_metric() -> None:
    part = {"instruction_strict": 0.5, "instruction_loose": 0.5}
    assert verdict("ifeval", {"strict": 1.0, "loose": 1.0, **part}, None) == "right"
    assert verdict("ifeval", {"strict": 0.0, "loose": 1.0, **part}, None) == "unclear"
    assert verdict("ifeval", {"strict": 0.0, "loose": 0.0, **part}, None) == "wrong"


def test_what_could_not_be_scored_is_not_wrong() -> None:
    assert verdict("mbpp", {"strict": 0.0, "flexible": 0.0}, "no sandbox") == "unscored"
