"""Prompt lookup against a search from the end, written as it is said."""

import functools
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.decoding.drafting import PromptLookup
from fusionroute.errors import UsageError

few = st.lists(st.integers(0, 2), max_size=24)  # three tokens: they recur
counts = st.integers(0, 9)


def propose(ids: list[int], count: int, longest: int = 4, shortest: int = 2) -> list[int]:
    draft = PromptLookup(longest, shortest).start()
    draft.extend(ids)
    return draft.propose(count)


def search(ids: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """The longest last n-gram that occurred before: what followed its last earlier occurrence."""
    for length in range(longest, shortest - 1, -1):
        for start in range(len(ids) - length - 1, -1, -1):
            if len(ids) > length and ids[start : start + length] == ids[len(ids) - length :]:
                return ids[start + length :][:count]
    return []


@given(few, counts, st.integers(1, 4), st.integers(0, 3))
def test_it_is_what_the_search_finds(ids: list[int], count: int, shortest: int, more: int) -> None:
    assert propose(ids, count, shortest + more, shortest) == search(ids, count, shortest + more, shortest)


@given(few, counts)
def test_the_default_agrees_on_four_to_two_tokens(ids: list[int], count: int) -> None:
    draft = PromptLookup().start()
    draft.extend(ids)
    assert draft.propose(count) == search(ids, count, 4, 2)


def test_longer_agreement_goes_first() -> None:
    # [2, 3] was last followed by 8, [1, 2, 3] by 7.
    assert propose([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], 1) == [7]


def test_the_last_occurrence_counts() -> None:
    assert propose([1, 2, 7, 1, 2, 8, 1, 2], 1) == [8]


def test_the_end_itself_is_no_earlier_occurrence() -> None:
    assert propose([5, 6, 1, 2], 3) == []


def test_an_occurrence_that_overlaps_the_end_counts() -> None:
    assert propose([4, 4, 4], 3, 2, 2) == [4]


def test_no_agreement_shorter_than_the_shortest() -> None:
    assert propose([1, 7, 1], 3, 4, 2) == []


def test_no_agreement_longer_than_the_longest() -> None:
    # [1, 2, 3] agrees but is too long; [2, 3] was last followed by 8.
    assert propose([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 1, 2, 2) == [8]


def test_a_draft_that_is_short_of_tokens_ends_with_them() -> None:
    assert propose([1, 2, 7, 1, 2], 9) == [7, 1, 2]


def test_nothing_is_proposed_before_there_is_a_token() -> None:
    assert PromptLookup().start().propose(4) == []


@given(few, counts)
def test_count_is_never_exceeded(ids: list[int], count: int) -> None:
    assert len(propose(ids, count, 2, 1)) <= count


@given(st.lists(few, max_size=6), counts)
def test_tokens_in_parts_are_tokens_at_once(parts: list[list[int]], count: int) -> None:
    draft = PromptLookup().start()
    for part in parts:
        draft.extend(part)
    assert draft.propose(count) == propose(functools.reduce(operator.iadd, parts, []), count)


@given(few, few, counts)
def test_proposing_changes_nothing(before: list[int], after: list[int], count: int) -> None:
    draft = PromptLookup().start()
    draft.extend(before)
    draft.propose(count).append(99)
    draft.extend(after)
    assert draft.propose(count) == propose(before + after, count)


def test_rows_know_nothing_of_each_other() -> None:
    lookup = PromptLookup()
    lookup.start().extend([1, 2, 3, 1, 2])
    draft = lookup.start()
    draft.extend([1, 2])
    assert draft.propose(4) == []


def test_the_ids_given_are_left_alone() -> None:
    ids = [1, 2, 3]
    draft = PromptLookup().start()
    draft.extend(ids)
    draft.extend([4])
    assert ids == [1, 2, 3]


@pytest.mark.parametrize(("longest", "shortest"), [(1, 2), (4, 0), (0, 0)])
def test_lengths_that_can_find_nothing_are_refused(longest: int, shortest: int) -> None:
    with pytest.raises(UsageError, match=f"not shortest {shortest}, longest {longest}"):
        PromptLookup(longest, shortest)
