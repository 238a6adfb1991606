"""What pays, by measurement: which rows to draft for, and which members to run before their turn is sure.

Both choices change speed alone, never a token.
"""

from collections.abc import Sequence

import numpy as np


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

    def add(self, rows: int, drafted: int, seconds: float) -> None:
        step = np.array([1.0, rows, drafted])
        self.squares = self.squares * self.decay + np.outer(step, step)
        self.products = self.products * self.decay + step * seconds

    @property
    def mean(self) -> float:
        """Seconds of a step; 0 before the first."""
        return float(self.products[0] / self.squares[0, 0]) if self.squares[0, 0] else 0.0

    def price(self, rows: int, drafting: float = 0.0) -> float:
        """What a drafted token for each of `rows` costs, in steps without drafts; `drafting` is seconds a draft token.

        `guess` a row before the first step.
        """
        if not self.mean:
            return self.guess * rows
        ridge = np.diag([0.0, self.trust, self.trust])
        guessed = self.trust * self.guess * self.mean
        base, row, draft = np.linalg.solve(self.squares + ridge, self.products + np.array([0, guessed, guessed]))
        return float(rows * (max(draft, 0.0) + drafting) / max(base + row * rows, 0.1 * self.mean))


class Acceptance:
    """How often drafted tokens are kept, and so how many to ask for next.

    A draft is kept up to its first wrong token, so its k-th token is of use with probability p^k.

    Args:
        longest: tokens in a draft.
        like: what a new row starts from, with the weight of two drafted tokens; None trusts it.
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
        gain: float = 1.05,
        budget: float = 0.02,
    ) -> None:
        self.longest, self.decay, self.retry, self.gain, self.budget = longest, decay, retry, gain, budget
        expected = 0.75 if like is None else like.probability
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

    def count(self, price: float) -> int:
        """How many tokens to draft, each for `price` steps: as many as promise most tokens per second; 0 is none."""
        probability, best, count, tokens = self.probability, self.gain, 0, 1.0
        for length in range(1, self.longest + 1):
            tokens += probability**length
            if tokens / (1 + length * price) > best:
                best, count = tokens / (1 + length * price), length
        if count:
            return count
        self.idle += 1
        trial = min(2, self.longest)
        if self.idle < max(self.retry, trial * price / self.budget):
            return 0
        return trial  # asked for until something is drafted


class FastestMode:
    """The mode with the fewest seconds a token: each is tried for some steps, and again after longer and longer pauses.

    Args:
        trial: steps of a trial.
        pause, longest: steps to the second trials, and between the last ones; each pause is twice the one before. What
            the first steps of new rows say of a mode is not yet what it is worth.
        decay: weight of a step after one more of the same mode.
    """

    def __init__(
        self, modes: Sequence[str], trial: int = 6, pause: int = 12, longest: int = 200, decay: float = 0.85
    ) -> None:
        self.modes, self.trial, self.pause, self.longest, self.decay = list(modes), trial, pause, longest, decay
        self.seconds = dict.fromkeys(self.modes, 0.0)
        self.tokens = dict.fromkeys(self.modes, 0.0)
        self.within = 0  # steps since the trials began

    def current(self) -> str:
        if len(self.modes) == 1:
            return self.modes[0]
        if self.within < self.trial * len(self.modes):
            return self.modes[self.within // self.trial]
        return min(self.modes, key=lambda mode: self.seconds[mode] / max(self.tokens[mode], 1e-9))

    def add(self, mode: str, tokens: int, seconds: float) -> None:
        self.within += 1
        if self.within == self.trial * len(self.modes) + self.pause:
            self.within, self.pause = 0, min(2 * self.pause, self.longest)
        self.seconds[mode] = self.seconds[mode] * self.decay + seconds
        self.tokens[mode] = self.tokens[mode] * self.decay + tokens
