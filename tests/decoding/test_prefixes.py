"""Rows that begin alike read that beginning once, and write what they would have written."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.decoding.conftest import SAMPLINGS, write

from fusionroute import FusionRouteForCausalLM
from fusionroute.decoding.drafting import PromptLookup
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.prefixes import LEAST, shared
from fusionroute.decoding.rows import Request
from fusionroute.errors import UsageError

Collection = Callable[[str], FusionRouteForCausalLM]
# Packed and row by row, one pool and several, sliding windows.
KINDS = ["llama", "qwen2", "adapters", "mixed", "gemma2", "two_bases"]
FIRST = [(7 * i + 3) % 200 + 10 for i in range(40)]


def engine_of(collection: Collection, kind: str, **settings: object) -> Engine:
    return Engine(collection(kind), reuse=True, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafter", [None, PromptLookup])
def test_a_next_turn_is_what_it_would_be_alone(collection: Collection, kind: str, drafter: Callable | None) -> None:
    engine = engine_of(collection, kind, drafter=drafter and drafter())
    (first,) = engine.generate([Request(FIRST, 12)])
    prompt = [*FIRST, *first.ids, 30, 31, 32]
    (second,) = engine.generate([Request(prompt, 8)])
    assert engine.prefixes is not None
    assert engine.prefixes.spared >= len(FIRST)
    assert second.ids == [token for token, _ in write(collection(kind), prompt, SAMPLINGS[0], 8)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 10), st.integers(0, 3)), min_size=2, max_size=6))
def test_whatever_was_written_before_changes_nothing(collection: Collection, rows: list[tuple[int, int, int]]) -> None:
    engine = engine_of(collection, "adapters")
    for common, new, branch in rows:
        prompt = [*FIRST[:common], *(100 + branch * 7 + i for i in range(5))]
        (answer,) = engine.generate([Request(prompt, new)])
        assert answer.ids == [token for token, _ in _alone(collection, tuple(prompt))][:new]


def test_the_same_prompt_under_other_policies_is_one_prompt(collection: Collection) -> None:
    """Entries of equal ids stand beside each other, since each has an expert that is ahead of the other's."""
    engine = engine_of(collection, "adapters")
    for expert in ("math", "code", "math", "math"):
        (answer,) = engine.generate([Request(FIRST, 1, expert=expert, ignore_end=True)])
        alone = Engine(collection("adapters")).generate([Request(FIRST, 1, expert=expert, ignore_end=True)])
        assert answer.ids == alone[0].ids
    engine = engine_of(collection, "adapters")
    for expert in (None, "math", "code", None, "code", "math", None):
        (answer,) = engine.generate([Request(FIRST, 6, expert=expert)])
        assert answer.ids == Engine(collection("adapters")).generate([Request(FIRST, 6, expert=expert)])[0].ids


_KNOWN: dict[tuple[int, ...], list[tuple[int, str]]] = {}


def _alone(collection: Collection, prompt: tuple[int, ...]) -> list[tuple[int, str]]:
    if prompt not in _KNOWN:
        _KNOWN[prompt] = write(collection("adapters"), prompt, SAMPLINGS[0], 10)
    return _KNOWN[prompt]


def test_rows_side_by_side_take_from_one_entry(collection: Collection) -> None:
    engine = engine_of(collection, "adapters")
    engine.generate([Request(FIRST, 4)])
    prompts = [[*FIRST, 20 + i] for i in range(3)]
    answers = engine.generate([Request(prompt, 6) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == [token for token, _ in write(collection("adapters"), prompt, SAMPLINGS[0], 6)]
    assert engine.prefixes is not None
    assert engine.prefixes.spared == 3 * len(FIRST)


def test_an_expert_takes_what_that_expert_had_read(collection: Collection) -> None:
    """After one expert alone, another has read nothing."""
    engine = engine_of(collection, "adapters")
    engine.generate([Request(FIRST, 4, expert="math", alpha=0.0)])
    (entry,) = engine.prefixes.entries  # type: ignore[union-attr]
    assert set(entry.kept) == {1}
    before = list(engine.members.tokens)
    engine.generate([Request([*FIRST, 9], 1, expert="code", alpha=0.0)])
    after = engine.members.tokens
    assert after[2] - before[2] == len(FIRST) + 1


def test_a_longer_entry_replaces_the_one_it_holds(collection: Collection) -> None:
    engine = engine_of(collection, "adapters", mode="all")
    (first,) = engine.generate([Request(FIRST, 6)])
    engine.generate([Request([*FIRST, *first.ids, 5], 6)])
    engine.generate([Request(FIRST[::-1], 6)])
    assert engine.prefixes is not None
    assert len(engine.prefixes.entries) == 2


def test_the_least_recently_used_goes_first(collection: Collection) -> None:
    engine = engine_of(collection, "adapters", mode="all")
    prompts = [[100 + k, *FIRST] for k in range(3)]
    for prompt in prompts:
        engine.generate([Request(prompt, 2)])
    engine.generate([Request(prompts[0], 2)])  # used again
    store = engine.prefixes
    assert store is not None
    store.shrink(store.nbytes - 1)
    assert [entry.ids[0] for entry in store.entries] == [102, 100]
    store.shrink(0)
    assert store.entries == []
    assert store.nbytes == 0


def test_what_is_kept_makes_way_for_rows(collection: Collection) -> None:
    model = collection("adapters")
    room = Engine(model).members.nbytes([len(FIRST) + 30])
    engine = Engine(model, reuse=True, kv_budget=room)
    for k in range(4):
        engine.submit(Request([100 + k, *FIRST], 20))
        assert engine.prefixes is not None
        while engine.waiting or engine.active:
            engine.step()
            assert engine.members.allocated + engine.prefixes.nbytes <= room
    assert engine.prefixes is not None
    assert engine.prefixes.entries


def test_bytes_are_those_of_the_copies(collection: Collection) -> None:
    engine = engine_of(collection, "adapters", mode="all")
    engine.generate([Request(FIRST, 6)])
    (entry,) = engine.prefixes.entries  # type: ignore[union-attr]
    tensors = [t for _, saved in entry.kept.values() for pair in saved for t in pair]
    assert entry.nbytes == sum(t.nbytes for t in tensors)
    assert all(isinstance(t, torch.Tensor) for t in tensors)


def test_the_entry_that_saves_most_is_taken(collection: Collection) -> None:
    """Of two that begin alike, the one that both members have read, not the one that an expert alone has."""
    engine = engine_of(collection, "adapters", mode="all")
    engine.generate([Request([*FIRST, 7], 2)])
    engine.generate([Request([*FIRST, 8], 2, expert="math", alpha=0.0)])
    assert engine.prefixes is not None
    before = engine.prefixes.spared
    engine.generate([Request([*FIRST, 9], 2)])
    assert engine.prefixes.spared - before == len(FIRST)


def test_after_a_failure_nothing_is_kept(collection: Collection) -> None:
    engine = engine_of(collection, "adapters")
    engine.generate([Request(FIRST, 4)])
    engine.submit(Request([*FIRST, 7], 8))
    engine.step()
    engine.abandon()
    assert engine.prefixes is not None
    assert (engine.active, engine.prefixes.entries, engine.members.allocated) == ([], [], 0)
    (answer,) = engine.generate([Request([*FIRST, 7], 6)])
    assert answer.ids == [token for token, _ in write(collection("adapters"), [*FIRST, 7], SAMPLINGS[0], 6)]


def test_short_beginnings_are_not_worth_it(collection: Collection) -> None:
    engine = engine_of(collection, "adapters")
    engine.generate([Request(FIRST, 2)])
    engine.generate([Request([*FIRST[: LEAST - 1], 1, 2, 3], 2)])
    assert engine.prefixes is not None
    assert engine.prefixes.spared == 0


def test_a_cancelled_row_is_of_use_too(collection: Collection) -> None:
    engine = engine_of(collection, "adapters")
    number = engine.submit(Request(FIRST, 30))
    for _ in range(5):
        engine.step()
    engine.cancel(number)
    prompt = [*FIRST, 3]
    (answer,) = engine.generate([Request(prompt, 6)])
    assert engine.prefixes is not None
    assert engine.prefixes.spared > 0
    assert answer.ids == [token for token, _ in write(collection("adapters"), prompt, SAMPLINGS[0], 6)]


def test_members_that_cannot_go_back_refuse(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionroute.decoding.members import Members

    monkeypatch.setattr(Members, "rewindable", property(lambda self: False))
    with pytest.raises(UsageError, match="reuse"):
        Engine(collection("llama"), reuse=True)


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_shared_is_the_longest_common_beginning(a: list[int], b: list[int]) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert shared(a, b) == expected
