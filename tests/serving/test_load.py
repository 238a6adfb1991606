"""A crowd for a few seconds; `benchmarks/serving.py load` is the one of minutes."""

import asyncio
import sys
from collections import Counter
from pathlib import Path

from tests.serving.conftest import Start

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import serving


def test_a_crowd_leaves_nothing_behind(start: Start) -> None:
    live = start(rows=8, waiting=4)
    outcomes: Counter[str] = Counter()
    asyncio.run(serving.crowd(live.url, 24, 8.0, outcomes))
    assert not [name for name in outcomes if "FAILED" in name], outcomes
    assert outcomes["stream ended"] > 20
    assert outcomes["leave left"] > 5
    assert outcomes["malformed refused"] > 5
    assert live.idle()
    held = serving.settle(live.url)
    assert [held[f"fusionroute_rows_{state}"] for state in ("running", "waiting", "open")] == [0, 0, 0]
    assert held["fusionroute_kv_bytes"] == 0
