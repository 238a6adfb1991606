"""The steps before a draw against transformers' logits processors, and draws against the distribution they leave."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusionroute.decoding.sampling import Sampling, adjust, draw, gumbel, noisy_argmax
from fusionroute.errors import UsageError

SIZE = 12
PROMPT = 3
SETTINGS = settings(deadline=None, max_examples=150)


def theirs(logits: torch.Tensor, sampling: Sampling, ids: Sequence[int], new: int, ends: Sequence[int]) -> torch.Tensor:
    """What transformers' `generate` would draw from, `[V]`, its processors in its order."""
    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.min_tokens and ends:
        steps.append(MinNewTokensLengthLogitsProcessor(len(ids) - new, sampling.min_tokens, list(ends)))
    if sampling.mask is not None:
        mask = sampling.mask
        steps.append(PrefixConstrainedLogitsProcessor(lambda _, row: list(mask(row.tolist())), 1))
    if sampling.temperature:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            steps.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(steps)(torch.tensor([list(ids)]), logits[None].clone())[0]


def even_ids(ids: Sequence[int]) -> list[int]:
    """A mask that depends on the row: tokens as even or odd as its length."""
    return [token for token in range(SIZE) if token % 2 == len(ids) % 2]


values = st.integers(-80, 80).map(lambda number: number / 10)
rows = st.lists(values, min_size=SIZE, max_size=SIZE, unique=True).map(torch.tensor)
texts = st.lists(st.integers(0, SIZE - 1), min_size=PROMPT, max_size=9)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, SIZE, 50]),
    top_p=st.sampled_from([1.0, 0.97, 0.6, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    min_tokens=st.integers(0, 6),
    mask=st.sampled_from([None, even_ids]),
)


@SETTINGS
@given(rows, samplings, texts, st.sets(st.integers(0, 3), max_size=3))
def test_adjusted_is_what_generate_draws_from(
    logits: torch.Tensor, sampling: Sampling, ids: list[int], ends: set[int]
) -> None:
    new = len(ids) - PROMPT
    expected = theirs(logits, sampling, ids, new, sorted(ends))
    torch.testing.assert_close(adjust(logits, sampling, ids, new, ends), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.4),
        Sampling(min_tokens=4),
        Sampling(mask=even_ids),
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=4),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.1),
    ],
    ids=lambda s: ",".join(k for k, v in vars(s).items() if v != getattr(Sampling(), k)),
)
@settings(deadline=None, max_examples=25)
@given(logits=rows, ids=texts)
def test_each_step_alone(sampling: Sampling, logits: torch.Tensor, ids: list[int]) -> None:
    new = len(ids) - PROMPT
    expected = theirs(logits, sampling, ids, new, [1, 2])
    torch.testing.assert_close(adjust(logits, sampling, ids, new, {1, 2}), expected, atol=1e-5, rtol=1e-5)


@given(rows, st.integers(0, 8), st.integers(0, 8))
def test_no_end_id_before_the_shortest_length(logits: torch.Tensor, least: int, new: int) -> None:
    # The same rule as generate's `min_length`, which counts the prompt.
    ids = [5] * (PROMPT + new)
    expected = LogitsProcessorList([MinLengthLogitsProcessor(PROMPT + least, [2, 4])])(
        torch.tensor([ids]), logits[None].clone()
    )[0]
    assert torch.equal(adjust(logits, Sampling(min_tokens=least), ids, new, {2, 4}), expected)


@SETTINGS
@given(rows, samplings, texts)
def test_what_came_in_is_left_as_it_was(logits: torch.Tensor, sampling: Sampling, ids: list[int]) -> None:
    before, row = logits.clone(), list(ids)
    adjust(logits, sampling, row, 0, {1})
    assert torch.equal(logits, before)
    assert row == ids


@given(rows, samplings)
def test_something_is_always_left(logits: torch.Tensor, sampling: Sampling) -> None:
    assert adjust(logits, sampling, [1, 2, 3], 0, {4}).isfinite().any()


def test_logits_of_half_precision_are_adjusted_in_float32() -> None:
    logits = torch.randn(SIZE).bfloat16()
    expected = adjust(logits.float(), Sampling(temperature=0.3), [1], 0, ())
    assert torch.equal(adjust(logits, Sampling(temperature=0.3), [1], 0, ()), expected)


def test_a_row_without_tokens_has_nothing_to_penalise() -> None:
    assert draw(torch.tensor([0.0, 2.0, 1.0]), Sampling(repetition_penalty=1.5)) == 1


# ---------------------------------------------------------------------------------------------------------- mask


def test_the_mask_is_given_the_whole_row() -> None:
    seen: list[list[int]] = []

    def mask(ids: Sequence[int]) -> list[int]:
        seen.append(list(ids))
        return [0]

    draw(torch.zeros(SIZE), Sampling(mask=mask), ids=[7, 8, 9], new=1)
    assert seen == [[7, 8, 9]]


@given(rows, st.sets(st.integers(0, SIZE - 1), min_size=1), st.sampled_from([0.0, 1.0]), st.integers(0, 9))
def test_only_what_the_mask_allows_is_drawn(
    logits: torch.Tensor, allowed: set[int], temperature: float, seed: int
) -> None:
    sampling = Sampling(temperature=temperature, top_k=3, seed=seed, mask=lambda ids: allowed)
    assert draw(logits, sampling, ids=[1, 2]) in allowed


def test_a_mask_may_name_a_token_twice() -> None:
    assert draw(torch.arange(SIZE).float(), Sampling(mask=lambda ids: [3, 3, 1])) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_that_allows_nothing_is_refused(temperature: float, refuses: Any) -> None:
    with refuses(UsageError, "mask"):
        draw(torch.zeros(SIZE), Sampling(temperature=temperature, mask=lambda ids: []))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_that_allows_only_an_end_too_early_is_refused(temperature: float, refuses: Any) -> None:
    # Nothing is left: no token may be drawn that one of the two forbids.
    sampling = Sampling(temperature=temperature, min_tokens=2, mask=lambda ids: [2])
    with refuses(UsageError):
        draw(torch.zeros(SIZE), sampling, ids=[5], new=0, ends={2})


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("temperature", -0.5, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.5, "(0, 1]"),
        ("min_p", -0.25, "[0, 1]"),
        ("min_p", 1.5, "[0, 1]"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", -2.0, "above 0"),
        ("min_tokens", -3, "at least 0"),
    ],
)
def test_what_cannot_be_is_refused_with_both_values(name: str, value: float, bound: str, refuses: Any) -> None:
    with refuses(UsageError, name, bound, value):
        Sampling(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("edge", [{"top_p": 1.0}, {"min_p": 1.0}, {"min_p": 0.0}, {"temperature": 0.0}, {"top_k": 0}])
def test_the_bounds_themselves_are_allowed(edge: dict[str, Any]) -> None:
    Sampling(**edge)


# --------------------------------------------------------------------------------------------------------- greedy


@given(rows, texts)
def test_temperature_zero_is_the_arg_max(logits: torch.Tensor, ids: list[int]) -> None:
    sampling = Sampling(top_k=2, top_p=0.1, min_p=0.9, seed=5)
    assert draw(logits, sampling, ids=ids) == max(range(SIZE), key=logits.tolist().__getitem__)


@given(rows, samplings, texts)
def test_greedy_or_not_temperature_zero_takes_the_likeliest_that_is_left(
    logits: torch.Tensor, sampling: Sampling, ids: list[int]
) -> None:
    assume(sampling.temperature == 0)
    expected = theirs(logits, sampling, ids, len(ids) - PROMPT, [1])
    assert draw(logits, sampling, ids=ids, new=len(ids) - PROMPT, ends={1}) == int(expected.argmax())


@pytest.mark.parametrize(
    ("other", "greedy"),
    [
        ({}, True),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.5, "seed": 9}, True),
        ({"temperature": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_tokens": 1}, False),
        ({"mask": even_ids}, False),
    ],
)
def test_greedy_is_when_nothing_but_the_arg_max_counts(other: dict[str, Any], greedy: bool) -> None:
    assert Sampling(**other).greedy is greedy


@given(st.integers(0, 1000), st.sampled_from([0.0, 1.0, 3.0, 10.0]), st.sampled_from([1e-9, 0.3, 0.9, 0.999]))
@settings(deadline=None, max_examples=40)
def test_of_many_tokens_the_likeliest_reach_top_p(seed: int, spread: float, top_p: float) -> None:
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(seed)) * spread
    inside = adjust(logits, Sampling(1.0, top_p=top_p), [], 0, []).isfinite()
    probabilities = logits.double().softmax(-1)
    count = int(inside.sum())
    assert probabilities[inside].min() >= probabilities[~inside].max()
    assert float(probabilities[inside].sum()) >= top_p - 1e-5
    assert count == 1 or float(probabilities[inside].sum() - probabilities[inside].min()) < top_p + 1e-5


# ---------------------------------------------------------------------------------------------------------- noise


@given(st.integers(0, 2**63), st.integers(0, 10_000))
def test_noise_depends_on_nothing_but_seed_and_position(seed: int, position: int) -> None:
    first = gumbel(seed, position, 8)
    torch.manual_seed(position)
    assert torch.equal(gumbel(seed, position, 8), first)


@given(st.integers(0, 2**63), st.integers(0, 10_000))
def test_neighbouring_positions_have_other_noise(seed: int, position: int) -> None:
    assert not torch.equal(gumbel(seed, position, 8), gumbel(seed, position + 1, 8))


@given(st.integers(0, 2**62 - 1), st.integers(0, 61), st.integers(0, 10_000))
def test_seeds_that_differ_in_one_bit_have_other_noise(seed: int, bit: int, position: int) -> None:
    assert not torch.equal(gumbel(seed, position, 8), gumbel(seed ^ (1 << bit), position, 8))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    gumbel(3, 4, 8)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(-(2**40), -1))
def test_a_negative_seed_is_a_seed(seed: int) -> None:
    assert gumbel(seed, 0, 4).isfinite().all()


def test_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel(1, 1, 200_000).double()
    assert math.isclose(float(noise.mean()), 0.5772, abs_tol=0.02)
    assert math.isclose(float(noise.var()), math.pi**2 / 6, abs_tol=0.05)


# ---------------------------------------------------------------------------------------------------------- draws

LOGITS = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 1.6])
DRAWN = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0, repetition_penalty=1.5),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.5, min_p=0.3),
    Sampling(temperature=1.0, min_tokens=9, mask=lambda ids: [0, 3, 4]),
]


def assert_follows(hits: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square below its 99.99 % point, and nothing drawn that has no probability."""
    assert hits[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0].double() * hits.sum()
    chi_square = float(((hits[probabilities > 0] - expected) ** 2 / expected).sum())
    free = len(expected) - 1
    assert chi_square < free * (1 - 2 / (9 * free) + 3.72 * math.sqrt(2 / (9 * free))) ** 3  # Wilson and Hilferty


@pytest.mark.parametrize("sampling", DRAWN, ids=range(len(DRAWN)))
def test_draws_of_many_seeds_follow_the_distribution(sampling: Sampling) -> None:
    probabilities = theirs(LOGITS, sampling, [3, 1], 0, [4]).softmax(-1)
    hits = torch.zeros(len(LOGITS), dtype=torch.double)
    for seed in range(2000):
        hits[draw(LOGITS, Sampling(**vars(sampling) | {"seed": seed}), ids=[3, 1], ends={4})] += 1
    assert_follows(hits, probabilities)


def test_draws_along_a_row_follow_the_distribution_pair_by_pair() -> None:
    # Neighbouring positions must not know of each other.
    count, size = 3000, 4
    sampling = Sampling(temperature=1.0, seed=11)
    drawn = [draw(LOGITS[:size], sampling, ids=range(position)) for position in range(2 * count)]
    hits = torch.zeros(size, size, dtype=torch.double)
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        hits[first, second] += 1
    alone = LOGITS[:size].softmax(-1)
    assert_follows(hits.flatten(), torch.outer(alone, alone).flatten())


@given(rows, st.integers(0, 100), st.lists(st.integers(0, SIZE - 1), min_size=4, max_size=4))
def test_noise_is_keyed_by_the_length_of_the_row_not_by_its_tokens(
    logits: torch.Tensor, seed: int, ids: list[int]
) -> None:
    sampling = Sampling(temperature=1.0, seed=seed)
    assert draw(logits, sampling, ids=ids, new=2) == draw(logits, sampling, ids=[0] * 4, new=0)


@given(rows, texts, st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_of_what_was_written(logits: torch.Tensor, ids: list[int], often: float, once: float) -> None:
    new = len(ids) - PROMPT
    sampling = Sampling(frequency_penalty=often, presence_penalty=once)
    written = ids[PROMPT:]
    expected = [x - often * written.count(i) - once * (i in written) for i, x in enumerate(logits.tolist())]
    assert adjust(logits, sampling, ids, new, ()).tolist() == pytest.approx(expected, abs=1e-4)


@given(rows, st.dictionaries(st.integers(0, SIZE - 1), st.floats(-100, 100), min_size=1, max_size=4))
def test_a_bias_is_added(logits: torch.Tensor, bias: dict[int, float]) -> None:
    expected = [x + bias.get(i, 0.0) for i, x in enumerate(logits.tolist())]
    assert adjust(logits, Sampling(bias=bias), [1], 0, ()).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("setting", [{"bias": {1: 0.5}}, {"frequency_penalty": 0.1}, {"presence_penalty": -0.1}])
def test_adjusted_greedy_is_not_the_arg_max_as_it_is(setting: dict) -> None:
    assert not Sampling(**setting).greedy


def test_a_mask_may_give_a_tensor() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    for allowed in ([1, 3], torch.tensor([1, 3])):
        assert draw(logits, Sampling(mask=lambda ids, allowed=allowed: allowed)) == 1


def test_penalties_may_be_whole_numbers() -> None:
    sampling = Sampling(frequency_penalty=1, presence_penalty=2)
    assert adjust(torch.tensor([5.0, 5.0]), sampling, [0, 1, 1], 2, ()).tolist() == [5.0, 1.0]


@pytest.mark.parametrize("temperature", [1e-20, 1e-40, 5e-324])
def test_next_to_no_temperature_takes_the_likeliest(temperature: float) -> None:
    drawn = {draw(torch.tensor([3.0, 9.0, 5.0]), Sampling(temperature, top_p=0.9, seed=seed)) for seed in range(20)}
    assert drawn == {1}


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(UsageError, match=f"temperature must be at least 0 and finite, not {temperature}"):
        Sampling(temperature)


@given(
    seed=st.integers(0, 2**63),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 40.0, 1e9]),
    left_out=st.sampled_from([0.0, 0.5, 0.999]),
    position=st.integers(0, 5000),
)
@settings(max_examples=300, deadline=None)
def test_noise_is_worked_out_wherever_it_matters(seed: int, spread: float, left_out: float, position: int) -> None:
    generator = torch.Generator().manual_seed(position)
    logits = torch.randn(4000, generator=generator) * spread
    logits[torch.rand(4000, generator=generator) < left_out] = -math.inf
    expected = int((logits + gumbel(seed, position, 4000)).argmax())
    assert noisy_argmax(logits, seed, position) == expected


def test_loud_noise_may_lift_any_token() -> None:
    noise = gumbel(0, 0, 100_000)
    loudest = int(noise.argmax())
    logits = torch.zeros(100_000)
    logits[0] = float(noise[loudest] - noise[0]) - 0.01
    assert noisy_argmax(logits, 0, 0) == loudest
    logits[0] += 0.02
    assert noisy_argmax(logits, 0, 0) == 0
