"""What pays, by measurement: which rows to draft for, and which members to run before their turn is sure.

Both choices change speed alone, never a token.
"""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np

Mode = TypeVar("Mode", bound=Hashable)  # by whatever name


class Average:
    """A mean of recent values, 0 before the first.

    Args:
        decay: weight of a value after one more.
    """

    def __init__(self, decay: float = 0.98) -> None:
        self.decay = decay
        self.weight = self.sum = 0.0

    def add(self, value: float) -> None:
        self.weight = self.weight * self.decay + 1
        self.sum = self.sum * self.decay + value

    @property
    def mean(self) -> float:
        return self.sum / self.weight if self.weight else 0.0


class CostModel:
    """Seconds of a step as `base + row · rows + draft · drafted tokens`, by least squares over recent steps.

    Drafted tokens are apart from rows because they make a pass ragged, which costs something of its own.

    Args:
        decay: weight of a step after one more.
        guess: of a row or a drafted token, as a share of a step; counts as `trust` steps that differ by one of them.
    """

    def __init__(self, decay: float = 0.99, guess: float = 0.05, trust: float = 4.0) -> None:
        self.decay, self.guess, self.trust = decay, guess, trust
        self.squares, self.products = np.zeros((3, 3)), np.zeros(3)

    def add(self, rows: float, drafted: int, seconds: float) -> None:
        step = np.array([1.0, rows, drafted])
        self.squares = self.squares * self.decay + np.outer(step, step)
        self.products = self.products * self.decay + step * seconds

    @property
    def mean(self) -> float:
        """Seconds of a step; 0 before the first."""
        return float(self.products[0] / self.squares[0, 0]) if self.squares[0, 0] else 0.0

    def _fit(self) -> tuple[float, float, float]:
        ridge = np.diag([0.0, self.trust, self.trust])
        guessed = self.trust * self.guess * self.mean
        base, row, draft = np.linalg.solve(self.squares + ridge, self.products + np.array([0, guessed, guessed]))
        return float(base), float(row), float(draft)

    def seconds(self, rows: int) -> float:
        """Of a step of so many rows without drafts, at the least a tenth of the mean; 0 before the first step."""
        if not self.mean:
            return 0.0
        base, row, _ = self._fit()
        return max(base + row * rows, 0.1 * self.mean)

    def price(self, rows: int, drafting: float = 0.0) -> float:
        """What a drafted token for each of `rows` costs, in steps without drafts; `drafting` is seconds a draft token.

        `guess` a row before the first step.
        """
        if not self.mean:
            return self.guess * rows
        return rows * (max(self._fit()[2], 0.0) + drafting) / self.seconds(rows)

    def share(self, rows: int) -> float:
        """Which part of a step of so many rows is theirs and ends with them, not the step's own; `guess` a row before
        the first step."""
        if not self.mean:
            return min(self.guess * rows, 1.0)
        return min(max(self._fit()[1], 0.0) * rows / self.seconds(rows), 1.0)


class Acceptance:
    """How often drafted tokens are kept, and so how many to ask for next.

    A draft is kept up to its first wrong token, so its k-th token is of use with probability p^k.

    Args:
        longest: tokens in a draft.
        like: what a new row starts from, with the weight of two drafted tokens; None is one token of two.
        decay: weight of a draft after one more.
        retry: steps after which a row that stopped drafting tries again, at the least.
        gain: what drafts must promise: this many times the tokens per second without.
        budget: what tries may cost, as a share of all steps.
    """

    def __init__(
        self,
        longest: int,
        like: "Acceptance | None" = None,
        *,
        decay: float = 0.85,
        retry: int = 24,
        gain: float = 1.15,
        budget: float = 0.02,
    ) -> None:
        self.longest, self.decay, self.retry, self.gain, self.budget = longest, decay, retry, gain, budget
        expected = 0.5 if like is None else like.probability
        self.kept, self.failed = 2 * expected, 2 * (1 - expected)
        self.idle = 0

    @property
    def probability(self) -> float:
        """Of a drafted token's being kept, if those before it are."""
        return self.kept / (self.kept + self.failed)

    def add(self, kept: int, drafted: int) -> None:
        self.kept = self.kept * self.decay + kept
        self.failed = self.failed * self.decay + (kept < drafted)
        self.idle = 0

    def count(self, price: float, worth: float = 1.0) -> int:
        """How many tokens to draft, each for `price` steps: as many as promise most tokens per second; 0 is none.

        `worth` is what a token is worth that comes a step early, in tokens.
        """
        probability, best, count, tokens = self.probability, self.gain, 0, 1.0
        for length in range(1, self.longest + 1):
            tokens += worth * probability**length
            if tokens / (1 + length * price) > best:
                best, count = tokens / (1 + length * price), length
        if count:
            return count
        self.idle += 1
        trial = min(2, self.longest)
        if self.idle < max(self.retry, trial * price / self.budget):
            return 0
        return trial  # asked for until something is drafted


class FastestMode(Generic[Mode]):
    """The mode with the fewest seconds a token at so many rows.

    Every mode is tried once, and again when what a trial costs is within the budget: soon where modes are close, seldom
    where one is far behind. Rows come and go, so what a mode was seen to cost at other numbers of rows counts too, by
    its `CostModel`.

    Args:
        trial: steps of a trial.
        budget: what trials may cost, as a share of all steps.
    """

    def __init__(self, modes: Sequence[Mode], trial: int = 4, budget: float = 0.02) -> None:
        self.modes, self.trial, self.budget = list(modes), trial, budget
        self.costs = {mode: CostModel() for mode in self.modes}
        self.tokens = {mode: Average() for mode in self.modes}  # a row and step
        self.idle = dict.fromkeys(self.modes, 0)  # steps since its last
        self.tolls = dict.fromkeys(self.modes, 0.0)  # seconds a row of going over to it for its last trial
        self.untried = self.modes[::-1]
        self.chosen, self.left = self.modes[0], 0  # of a trial

    def price(self, mode: Mode, rows: int) -> float:
        """Seconds a token."""
        return self.costs[mode].seconds(rows) / max(rows * self.tokens[mode].mean, 1e-9)

    def current(self, rows: int) -> Mode:
        """The mode to run a step of so many rows with."""
        if len(self.modes) > 1 and not self.left:
            self._choose(rows)
        return self.chosen

    def _choose(self, rows: int) -> None:
        if self.untried:
            self._try(self.untried.pop())
            return
        prices = {mode: self.price(mode, rows) for mode in self.modes}
        self.chosen = min(prices, key=lambda mode: prices[mode])
        budget = self.budget / (len(self.modes) - 1)
        for mode in self.modes:
            # Nothing is so far behind that it is never looked at again.
            loss = min(prices[mode] / max(prices[self.chosen], 1e-12), 10.0) - 1
            toll = self.tolls[mode] * rows / max(self.costs[self.chosen].seconds(rows), 1e-12)
            if mode != self.chosen and self.idle[mode] * budget > self.trial * loss + toll:
                self._try(mode)
                return

    def _try(self, mode: Mode) -> None:
        self.chosen, self.left, self.tolls[mode] = mode, self.trial, 0.0

    def toll(self, rows: int, seconds: float) -> None:
        """Note that, of a trial, so long went into what its mode needs first, as members that had fallen behind."""
        if self.left:
            self.tolls[self.chosen] += seconds / rows

    def add(self, mode: Mode, rows: int, tokens: int, seconds: float) -> None:
        """Note a step of so many rows that gave so many tokens."""
        self.costs[mode].add(rows, 0, seconds)
        self.tokens[mode].add(tokens / rows)
        self.idle = {other: idle + 1 for other, idle in self.idle.items()}
        self.idle[mode] = 0
        self.left = max(self.left - 1, 0)
