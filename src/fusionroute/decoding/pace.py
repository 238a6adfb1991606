"""What pays, by measurement: which rows to draft for, and which members to run before their turn is sure.

Both choices change speed alone, never a token.
"""

from collections.abc import Sequence


class CostModel:
    """Seconds of a step as `base + slope · positions`, by least squares over recent steps.

    A position is one that a step decides for one row: one without a draft, one more for each drafted token.

    Args:
        decay: weight of a step after one more.
        guess: `slope`, as a share of a step, until steps of different sizes were seen.
    """

    def __init__(self, decay: float = 0.99, guess: float = 0.05) -> None:
        self.decay, self.guess = decay, guess
        self.weight = self.x = self.y = self.xx = self.xy = 0.0

    def add(self, positions: int, seconds: float) -> None:
        for name, value in (
            ("weight", 1.0),
            ("x", positions),
            ("y", seconds),
            ("xx", positions**2),
            ("xy", positions * seconds),
        ):
            setattr(self, name, getattr(self, name) * self.decay + value)

    @property
    def mean(self) -> float:
        """Seconds of a step; 0 before the first."""
        return self.y / self.weight if self.weight else 0.0

    @property
    def slope(self) -> float:
        """Seconds of one more position; 0 before the first step."""
        spread = self.weight * self.xx - self.x**2
        if spread <= 0.05 * self.weight**2:
            return self.guess * self.mean
        return max((self.weight * self.xy - self.x * self.y) / spread, 0.0)

    def price(self, rows: int, drafting: float = 0.0) -> float:
        """What a drafted token for each of `rows` costs, in steps without drafts; `drafting` is seconds a draft token.

        `guess` a row before the first step.
        """
        if not self.weight:
            return self.guess * rows
        slope = self.slope
        alone = max((self.y - slope * self.x) / self.weight, 0.0) + slope * rows
        return rows * (slope + drafting) / max(alone, 1e-9)


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
    """The mode with the fewest seconds a token: each is tried for some steps, the loser again now and then.

    Args:
        trial: steps of a trial.
        period: steps between trials.
    """

    def __init__(self, modes: Sequence[str], trial: int = 6, period: int = 200, decay: float = 0.95) -> None:
        self.modes, self.trial, self.period, self.decay = list(modes), trial, period, decay
        self.seconds = dict.fromkeys(self.modes, 0.0)
        self.tokens = dict.fromkeys(self.modes, 0.0)
        self.steps = 0

    def current(self) -> str:
        if len(self.modes) == 1:
            return self.modes[0]
        within = self.steps % self.period
        if within < self.trial * len(self.modes):
            return self.modes[within // self.trial]
        return min(self.modes, key=lambda mode: self.seconds[mode] / max(self.tokens[mode], 1e-9))

    def add(self, mode: str, tokens: int, seconds: float) -> None:
        self.steps += 1
        self.seconds[mode] = self.seconds[mode] * self.decay + seconds
        self.tokens[mode] = self.tokens[mode] * self.decay + tokens
