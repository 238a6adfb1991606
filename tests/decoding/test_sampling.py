import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.decoding.sampling import draw, gumbel


def test_temperature_zero_is_the_arg_max() -> None:
    assert draw(torch.tensor([0.0, 3.0, 1.0]), temperature=0, seed=5, position=7) == 1


@given(st.integers(0, 2**31), st.integers(0, 10_000))
def test_noise_depends_on_seed_and_position_alone(seed: int, position: int) -> None:
    torch.manual_seed(position)
    assert torch.equal(gumbel(seed, position, 8), gumbel(seed, position, 8))
    assert not torch.equal(gumbel(seed, position, 8), gumbel(seed, position + 1, 8))
    assert not torch.equal(gumbel(seed, position, 8), gumbel(seed + 1, position, 8))


def test_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel(1, 1, 200_000).double()
    assert math.isclose(float(noise.mean()), 0.5772, abs_tol=0.02)
    assert math.isclose(float(noise.var()), math.pi**2 / 6, abs_tol=0.05)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    count = 4000
    hits = torch.zeros(4)
    for position in range(count):
        hits[draw(logits, temperature=temperature, seed=3, position=position)] += 1
    expected = [math.exp(value / temperature) for value in logits.tolist()]
    expected = [value / sum(expected) * count for value in expected]
    chi_square = sum((float(h) - e) ** 2 / e for h, e in zip(hits, expected, strict=True))
    assert chi_square < 16.3  # 99.9 % point with 3 degrees of freedom
