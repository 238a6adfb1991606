"""Means of named quantities between two log lines, over all processes. Knows no quantity."""

import json
from typing import Any

from torch import Tensor


class Tally:
    """Means of named quantities since they were last read: sums and counts, reduced over processes when read."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Count `count` values of `name` that add up to `total`, each a number or a tensor of one."""
        entry = self.sums.setdefault(name, [0.0, 0.0])
        # Added up in Python's double precision: some devices (MPS) have none of their own.
        entry[0] += float(total)
        entry[1] += float(count)

    def read(self, accelerator: Any) -> dict[str, float]:
        """Means of everything counted by any process, each of which must ask; starts anew."""
        state, self.sums = self.sums, {}
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            merged: dict[str, list[float]] = {}
            for text in gather_object([json.dumps(state)]):
                for name, (total, count) in json.loads(text).items():
                    entry = merged.setdefault(name, [0.0, 0.0])
                    entry[0] += total
                    entry[1] += count
            state = merged
        return {name: total / count for name, (total, count) in state.items() if count}
