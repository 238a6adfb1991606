"""Means with intervals, and paired differences: what may be said from so many items. Pure functions on numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

DRAWS = 10_000
_Z = 1.959964  # of a normal distribution, 95 % within


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % bootstrap interval; p is two-sided, of no difference, where one was tested."""

    mean: float
    low: float
    high: float
    n: int
    p: float | None = None


def mean_of(groups: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """The mean of the groups' means, with a percentile bootstrap over each group's items.

    Args:
        groups: the items' scores of each benchmark; one group is an ordinary mean, empty ones are left out.
    """
    filled = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not filled:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    generator = np.random.default_rng(seed)
    draws = sum(group[generator.integers(len(group), size=(DRAWS, len(group)))].mean(axis=1) for group in filled)
    low, high = np.quantile(draws / len(filled), (0.025, 0.975))
    mean = sum(group.mean() for group in filled) / len(filled)
    return Estimate(float(mean), float(low), float(high), sum(map(len, filled)))


def proportion_of(scores: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of scores from 0 to 1, as `mean_of` gives it; Wilson's interval where all are 0 or all are 1, of which
    every draw is the same."""
    found = mean_of([scores], seed)
    if found.mean not in (0.0, 1.0):
        return found
    open_end = _Z**2 / (found.n + _Z**2)
    return replace(found, high=open_end) if found.mean == 0 else replace(found, low=1 - open_end)


def difference_of(groups: Sequence[Sequence[float]], others: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """The mean of the groups' mean differences `groups − others`, item by item, with interval and p-value.

    The p-value is that of a sign-flip permutation test: how often as large a difference comes about when a coin says
    which of the two systems each of an item's scores belongs to.
    """
    pairs = [[a - b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in zip(groups, others, strict=True)]
    filled = [np.asarray(group, dtype=float) for group in pairs if group]
    estimate = mean_of(pairs, seed)
    generator = np.random.default_rng(seed + 1)
    totals = sum(
        (generator.integers(2, size=(DRAWS, len(group))) * 2 - 1) @ group / len(group) / len(filled) for group in filled
    )
    extreme = int((np.abs(totals) >= abs(estimate.mean) - 1e-12).sum()) if filled else DRAWS
    return replace(estimate, p=(extreme + 1) / (DRAWS + 1))


def resamples(count: int, seed: int = 0) -> np.ndarray:
    """How often each of `count` items is taken, `[1 + DRAWS, count]`: the items as they are, then bootstrap draws."""
    drawn = np.random.default_rng(seed).integers(count, size=(DRAWS, count)) + np.arange(DRAWS)[:, None] * count
    weights = np.bincount(drawn.ravel(), minlength=DRAWS * count).reshape(DRAWS, count)
    return np.vstack([np.ones(count), weights])


def estimate_of(values: np.ndarray, n: int) -> Estimate | None:
    """A figure of `n` items from its value and those of the draws `[1 + DRAWS]`; draws without one (NaN) are left out.

    None if the items as they are give no figure.
    """
    if not np.isfinite(values[0]):
        return None
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high), n)
