"""Sequence selection: each expert answers, a reward model picks (a baseline of the paper's Table 1).

Answers are those that the experts give alone, so nothing is generated for it. Knows neither models nor files.
"""

from collections.abc import Sequence
from typing import Any


def select(candidates: Sequence[tuple[str, dict[str, Any]]], rewards: Sequence[float]) -> dict[str, Any]:
    """The stored answer of the highest reward; ties go to the first expert.

    Args:
        candidates: each expert's name and its stored answer.
        rewards: the reward model's score of each.

    Returns:
        An answer as stored. What it cost is what all of them cost: `seconds` and `passes` are sums.
    """
    best = max(range(len(candidates)), key=lambda i: (rewards[i], -i))
    name, chosen = candidates[best]
    return {
        **chosen,
        "pieces": [[name, chosen["text"], chosen["tokens"]]],
        "seconds": sum(row["seconds"] for _, row in candidates),
        "passes": sum(row["passes"] for _, row in candidates),
        "overruled": 0,
        "rewards": dict(zip((name for name, _ in candidates), rewards, strict=True)),
    }
