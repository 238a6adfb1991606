"""Costs, acceptance and modes against what they are made to measure."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusionroute.decoding.pace import Acceptance, Average, CostModel, FastestMode

steps = st.lists(st.tuples(st.integers(1, 16), st.integers(0, 40)), min_size=3, max_size=60)


def told(steps: list[tuple[int, int]], base: float, row: float, draft: float, **how: float) -> CostModel:
    cost = CostModel(**how)
    for rows, drafted in steps:
        cost.add(rows, drafted, base + row * rows + draft * drafted)
    return cost


@given(steps, st.floats(0.01, 10), st.floats(0.001, 1), st.floats(0.001, 1), st.integers(1, 16))
def test_the_price_is_what_the_steps_say(
    steps: list[tuple[int, int]], base: float, row: float, draft: float, rows: int
) -> None:
    varied = [(1, 0), (16, 0), (1, 40), *steps]  # so that all three can be told apart
    cost = told(varied, base, row, draft, decay=1.0, trust=1e-9)
    assert cost.price(rows) == pytest.approx(rows * draft / max(base + row * rows, 0.1 * cost.mean), rel=1e-3)


@given(st.floats(0.5, 1))
def test_decay_does_not_bend_a_line(decay: float) -> None:
    cost = told([(1, 0), (8, 3), (4, 9), (2, 1)] * 3, 2, 0.5, 0.25, decay=decay, trust=1e-9)
    assert cost.price(4) == pytest.approx(4 * 0.25 / (2 + 0.5 * 4), rel=1e-3)


def test_a_draft_is_not_priced_as_a_row() -> None:
    # Rows that end make steps cheaper by little; a draft makes them ragged.
    cost = told([(8, 0), (8, 4), (4, 0), (2, 0), (2, 2)] * 10, 1.0, 0.01, 0.3)
    assert cost.price(1) == pytest.approx(0.3 / 1.01, rel=0.05)


def test_the_drafter_is_paid_for_too() -> None:
    cost = told([(1, 0), (9, 3), (4, 0), (2, 7)] * 20, 10, 0, 0, guess=0.0)
    assert cost.price(2, drafting=3.0) == pytest.approx(2 * 3 / 10, rel=1e-3)


def test_a_row_s_own_part_of_a_step() -> None:
    cost = told([(1, 0), (9, 3), (4, 0), (2, 7)] * 20, 10, 0.5, 0.1, guess=0.0, trust=1e-9)
    assert cost.share(4) == pytest.approx(4 * 0.5 / (10 + 4 * 0.5), rel=1e-3)


def test_a_part_is_no_more_than_the_whole() -> None:
    cost = told([(1, 0), (9, 3), (4, 0), (2, 7)] * 20, 0, 0.5, 0.1)
    assert cost.share(12) == pytest.approx(1, abs=0.05)
    assert CostModel().share(1000) == 1


def test_the_unit_of_time_does_not_matter() -> None:
    varied = [(1, 0), (9, 3), (4, 0), (2, 7)]
    seconds, milliseconds = told(varied, 0.1, 0.01, 0.02), told(varied, 100, 10, 20)
    assert seconds.price(3, 0.01) == pytest.approx(milliseconds.price(3, 10))


def test_recent_steps_count_more() -> None:
    cost = CostModel(decay=0.9)
    for draft in (1.0, 0.0):
        for drafted in [0, 8] * 60:
            cost.add(2, drafted, 10 + draft * drafted)
    assert cost.price(1) < 0.02


@given(st.integers(1, 64))
def test_before_data_it_is_a_guess(rows: int) -> None:
    assert CostModel(guess=0.03).price(rows) == pytest.approx(0.03 * rows)


@given(st.integers(1, 16), st.lists(st.floats(0.001, 10), min_size=1, max_size=50))
def test_steps_without_drafts_leave_the_guess(rows: int, seconds: list[float]) -> None:
    cost = CostModel(decay=1.0, guess=0.03)
    for second in seconds:
        cost.add(rows, 0, second)
    assert cost.price(rows) == pytest.approx(0.03 * rows, rel=1e-3)


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 60), st.floats(0, 10)), max_size=30), st.integers(1, 16))
def test_no_token_is_ever_below_free(steps: list[tuple[int, int, float]], rows: int) -> None:
    cost = CostModel()
    for step in steps:
        cost.add(*step)
    assert cost.price(rows) >= 0


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30))
def test_an_average_is_one(values: list[float]) -> None:
    average = Average(decay=1.0)
    assert average.mean == 0
    for value in values:
        average.add(value)
    assert average.mean == pytest.approx(sum(values) / len(values))


# ---------------------------------------------------------------------------------------------------- acceptance


def until_off(acceptance: Acceptance, price: float) -> None:
    """Drafts of which nothing is kept, until no more are asked for."""
    for _ in range(200):
        count = acceptance.count(price)
        if not count:
            return
        acceptance.add(0, count)
    raise AssertionError("it never stopped")


def test_a_new_row_drafts() -> None:
    assert 1 < Acceptance(8).count(0.01) <= 8


@given(st.floats(0.01, 0.99), st.floats(0, 2), st.integers(1, 12))
def test_it_asks_for_the_most_tokens_a_second(probability: float, price: float, longest: int) -> None:
    acceptance = Acceptance(longest)
    acceptance.kept, acceptance.failed = probability, 1 - probability
    speeds = [sum(probability**k for k in range(n + 1)) / (1 + n * price) for n in range(longest + 1)]
    count = acceptance.count(price)
    if max(speeds) <= 1.15:  # not worth it
        assert count == 0
    else:
        assert speeds[count] == pytest.approx(max(speeds))


def test_a_new_row_is_like_those_before_it() -> None:
    pool = Acceptance(8, decay=0.98)
    for _ in range(100):
        pool.add(0, 4)
    assert Acceptance(8, pool).count(0.2) == 0
    for _ in range(400):
        pool.add(8, 8)
    assert Acceptance(8, pool).count(0.2) == 8


@pytest.mark.parametrize("price", [0.02, 0.2, 0.9])
def test_a_row_of_which_nothing_is_kept_stops(price: float) -> None:
    until_off(Acceptance(8), price)


@given(st.integers(1, 16), st.floats(0, 0.6), st.integers(1, 60))
def test_a_row_of_which_all_is_kept_goes_on(longest: int, price: float, drafts: int) -> None:
    acceptance = Acceptance(longest)
    for _ in range(drafts + 10):
        acceptance.add(longest, longest)
    assert acceptance.count(price) == longest


def test_a_token_that_saves_little_is_not_drafted_for() -> None:
    row = Acceptance(8)
    row.add(60, 60)
    assert row.count(0.1) == 8
    assert row.count(0.1, worth=0.1) == 0


def test_a_dear_draft_is_not_made() -> None:
    assert Acceptance(8).count(0.8) == 0


@given(st.integers(2, 40))
def test_a_stopped_row_tries_again_after_retry_tokens(retry: int) -> None:
    acceptance = Acceptance(8, retry=retry, budget=1)
    until_off(acceptance, 0.2)  # the call that found it off is the first token
    assert [acceptance.count(0.2) > 0 for _ in range(retry - 1)] == [False] * (retry - 2) + [True]


def test_a_try_that_fails_is_followed_by_a_whole_pause() -> None:
    acceptance = Acceptance(8, retry=10, budget=1)
    until_off(acceptance, 0.2)
    while not (count := acceptance.count(0.2)):
        pass
    acceptance.add(0, count)
    assert [acceptance.count(0.2) > 0 for _ in range(10)] == [False] * 9 + [True]


def test_a_try_is_asked_for_until_something_is_drafted() -> None:
    acceptance = Acceptance(8, retry=5)
    until_off(acceptance, 0.2)
    while not acceptance.count(0.2):
        pass
    assert acceptance.count(0.2) > 0  # the drafter had no idea
    acceptance.add(0, 2)
    assert acceptance.count(0.2) == 0


@given(st.floats(0.1, 3))
def test_tries_cost_no_more_than_the_budget(price: float) -> None:
    acceptance = Acceptance(8, retry=1, budget=0.02)
    until_off(acceptance, price)
    spent = 0.0
    for _ in range(2000):
        if count := acceptance.count(price):
            spent += count * price
            acceptance.add(0, count)
    assert spent <= 0.0201 * 2000


def test_tries_that_succeed_turn_drafting_on() -> None:
    acceptance = Acceptance(8, retry=10, budget=1)
    until_off(acceptance, 0.2)
    for _ in range(60):
        if count := acceptance.count(0.2):
            acceptance.add(count, count)
    assert acceptance.count(0.2) == 8


@given(st.integers(1, 16), st.floats(0, 2), st.lists(st.integers(0, 16), max_size=60))
def test_no_more_is_asked_for_than_a_draft_may_have(longest: int, price: float, kept: list[int]) -> None:
    acceptance = Acceptance(longest, retry=3)
    for number in kept:
        count = acceptance.count(price)
        assert 0 <= count <= longest
        if count:
            acceptance.add(min(number, count), count)


# --------------------------------------------------------------------------------------------------------- modes


def run(modes: FastestMode[str], steps: int, cost: dict[str, float], rows: int = 2, tokens: int = 2) -> list[str]:
    """The modes of so many steps that cost `cost` seconds a token."""
    taken = []
    for _ in range(steps):
        mode = modes.current(rows)
        taken.append(mode)
        modes.add(mode, rows, tokens, cost[mode] * tokens)
    return taken


def runs(taken: list[str]) -> list[tuple[str, int]]:
    return [(mode, len(list(steps))) for mode, steps in itertools.groupby(taken)]


def test_each_mode_is_tried() -> None:
    assert runs(run(FastestMode(["a", "b", "c"], trial=2), 6, {"a": 1, "b": 1, "c": 1})) == [
        ("a", 2),
        ("b", 2),
        ("c", 2),
    ]


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=4), st.integers(1, 16))
def test_trials_lose_no_more_than_the_budget(costs: list[float], rows: int) -> None:
    cost = {str(i): seconds for i, seconds in enumerate(costs)}
    modes = FastestMode(list(cost), trial=4, budget=0.02)
    run(modes, 4 * len(costs), cost, rows)
    spent = sum(cost[mode] for mode in run(modes, 3000, cost, rows))
    # What is ten times dearer counts as ten times as dear.
    assume(max(costs) <= 10 * min(costs))
    assert spent <= 3000 * min(costs) * 1.025 + 4 * sum(costs)


@given(st.integers(1, 16), st.floats(0.001, 100), st.floats(1.05, 2))
def test_what_a_trial_needs_first_counts_as_its_cost(rows: int, toll: float, dearer: float) -> None:
    modes = FastestMode(["a", "b"], budget=0.02)
    cost, spent, last = {"a": 1.0, "b": dearer}, 0.0, "a"
    for step in range(3000):
        mode = modes.current(rows)
        if (last, mode) == ("a", "b"):
            modes.toll(rows, toll * rows)
            spent += toll * rows * (step > 8)
        modes.add(mode, rows, rows, cost[mode] * rows)
        spent += (cost[mode] - 1) * rows
        last = mode
    # The budget, the first trial, and the one that was due when time ran out.
    assert spent <= 0.025 * 3000 * rows + toll * rows + 8 * (dearer - 1) * rows


def test_seconds_a_token_count_not_seconds_a_step() -> None:
    modes = FastestMode(["few", "many"], trial=6)
    for _ in range(12):
        mode = modes.current(4)
        modes.add(mode, 4, *((1, 1.0) if mode == "few" else (4, 2.0)))
    assert modes.current(4) == "many"


def test_close_modes_are_compared_more_often_than_distant_ones() -> None:
    close, distant = (run(FastestMode(["a", "b"]), 600, {"a": 1.0, "b": b}).count("b") for b in (1.1, 2.0))
    assert close > 3 * distant > 0


def test_the_winner_may_depend_on_the_number_of_rows() -> None:
    modes = FastestMode(["a", "b"])
    for rows in (1, 2, 4, 8, 16) * 20:
        for mode, base, row in (("a", 1.0, 1.0), ("b", 3.0, 0.5)):
            modes.add(mode, rows, rows, base + row * rows)
    modes.untried.clear()
    assert min("ab", key=lambda mode: modes.price(mode, 2)) == "a"
    assert min("ab", key=lambda mode: modes.price(mode, 12)) == "b"


def test_few_rows_do_not_decide_for_many() -> None:
    """Of 16 rows the last three take long; a mode that ran those is not thereby the slower one."""
    modes = FastestMode(["a", "b"])
    modes.untried.clear()
    for rows in (16, 12, 3, 2, 1) * 20:
        modes.add("a", rows, rows, 10 + 0.1 * rows)
        modes.add("b", 16, 16, 11 + 0.1 * 16)
    assert modes.price("a", 16) < modes.price("b", 16)


@pytest.mark.parametrize("misled", ["a", "b"])
def test_first_steps_that_mislead_are_soon_outweighed(misled: str) -> None:
    modes, other = FastestMode(["a", "b"]), {"a": "b", "b": "a"}[misled]
    run(modes, 8, {misled: 1.0, other: 1.5})
    assert run(modes, 400, {misled: 1.2, other: 1.0})[200:].count(other) >= 200 - 5 * 4


@pytest.mark.parametrize(("before", "after"), [({"a": 1, "b": 2}, "b"), ({"a": 2, "b": 1}, "a")])
def test_a_loser_that_has_become_cheaper_wins_in_time(before: dict[str, float], after: str) -> None:
    modes = FastestMode(["a", "b"])
    run(modes, 40, before)
    changed = {"a": before["b"], "b": before["a"]}
    run(modes, 1500, changed)
    assert run(modes, 200, changed).count(after) >= 200 - 2 * 4


@given(st.integers(0, 500))
def test_a_mode_without_another_is_always_it(steps: int) -> None:
    assert set(run(FastestMode(["lazy"]), steps + 1, {"lazy": 1.0})) == {"lazy"}


def test_steps_without_tokens_do_no_harm() -> None:
    taken = run(FastestMode(["a", "b"], trial=1), 50, {"a": 1, "b": 2}, tokens=0)
    assert taken[:2] == ["a", "b"]


def test_a_mode_that_gave_no_token_is_tried_again() -> None:
    modes = FastestMode(["a", "b"], trial=4)
    for tokens in (2, 0):  # of a, of b
        for _ in range(4):
            modes.add(modes.current(2), 2, tokens, 1.0)
    assert "b" in run(modes, 2500, {"a": 1.0, "b": 0.5})
