"""What pays, by measurement: which rows to draft for, and which members to run before their turn is sure.

Both choices change speed alone, never a token.
"""

from collections.abc import Sequence


class CostModel:
    """Seconds of a step as `base + slope · tokens`, by least squares over recent steps.

    Args:
        decay: weight of a step after one more.
    """

    def __init__(self, decay: float = 0.98) -> None:
        self.decay = decay
        self.weight = self.x = self.y = self.xx = self.xy = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        for name, value in (
            ("weight", 1.0),
            ("x", tokens),
            ("y", seconds),
            ("xx", tokens**2),
            ("xy", tokens * seconds),
        ):
            setattr(self, name, getattr(self, name) * self.decay + value)

    @property
    def mean(self) -> float:
        """Seconds of a step; 0 before the first."""
        return self.y / self.weight if self.weight else 0.0

    @property
    def relative_slope(self) -> float:
        """Cost of one more token in a step, in average steps; 0.02 until steps of different sizes were seen."""
        spread = self.weight * self.xx - self.x**2
        if self.y <= 0 or spread <= 0.25 * self.weight**2:
            return 0.02
        return max((self.weight * self.xy - self.x * self.y) / spread, 0.0) / self.mean


class Acceptance:
    """How often a row's drafted tokens are kept, and so how many to ask for next.

    A draft is kept up to its first wrong token, so its k-th token is of use with probability p^k.

    Args:
        longest: tokens in a draft.
        decay: weight of a draft after one more.
        retry: steps after which a row that stopped drafting tries again.
    """

    def __init__(self, longest: int, decay: float = 0.85, retry: int = 24) -> None:
        self.longest, self.decay, self.retry = longest, decay, retry
        # As if it had gone well once: a new row tries.
        self.kept, self.failed = 3.0, 1.0
        self.idle = 0

    def add(self, kept: int, drafted: int) -> None:
        self.kept = self.kept * self.decay + kept
        self.failed = self.failed * self.decay + (kept < drafted)
        self.idle = 0

    def count(self, price: float) -> int:
        """How many tokens to draft if each costs `price` of what a kept one saves; 0 is none."""
        probability = self.kept / max(self.kept + self.failed, 1e-9)
        count = 0
        while count < self.longest and probability ** (count + 1) > price:
            count += 1
        if count:
            return count
        self.idle += 1
        return min(2, self.longest) if self.idle % self.retry == 0 else 0


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
