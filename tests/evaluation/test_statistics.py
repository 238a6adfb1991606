import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.evaluation.statistics import difference_of, mean_of

scores = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=30)


@given(groups=st.lists(scores, min_size=1, max_size=4))
def test_the_mean_is_that_of_the_groups_and_lies_in_its_interval(groups: list[list[float]]) -> None:
    found = mean_of(groups)
    assert found.mean == pytest.approx(sum(sum(g) / len(g) for g in groups) / len(groups))
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    assert found.n == sum(map(len, groups))


def test_the_interval_is_about_that_of_the_normal_distribution() -> None:
    values = [1.0] * 120 + [0.0] * 280
    found = mean_of([values])
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert (found.low, found.high) == (pytest.approx(0.3 - half, abs=0.006), pytest.approx(0.3 + half, abs=0.006))


def test_no_items_give_no_number() -> None:
    assert math.isnan(mean_of([]).mean)
    assert math.isnan(difference_of([[]], [[]]).mean)


@given(values=scores)
def test_no_difference_has_p_one(values: list[float]) -> None:
    found = difference_of([values], [values])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


@given(mine=scores, seed=st.integers(0, 99))
def test_a_difference_is_antisymmetric(mine: list[float], seed: int) -> None:
    theirs = random.Random(seed).choices([0.0, 1.0], k=len(mine))
    one, other = difference_of([mine], [theirs]), difference_of([theirs], [mine])
    assert one.mean == pytest.approx(-other.mean)
    assert one.p == pytest.approx(other.p, abs=0.03)


def test_the_p_value_is_that_of_an_exact_sign_test() -> None:
    # 14 items that one system alone got right, 4 that the other did: the sign-flip test is then a binomial one.
    mine, theirs = [1.0] * 14 + [0.0] * 4 + [1.0] * 30, [0.0] * 14 + [1.0] * 4 + [1.0] * 30
    exact = 2 * sum(math.comb(18, k) for k in range(5)) / 2**18
    assert difference_of([mine], [theirs]).p == pytest.approx(exact, abs=0.008)


def test_a_benchmark_counts_once_however_many_items_it_has() -> None:
    assert difference_of([[1.0], [0.0] * 99], [[0.0], [0.0] * 99]).mean == pytest.approx(0.5)
