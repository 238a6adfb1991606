"""What commands that write load, and what they leave alone."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fusionroute.loading import load_engine


def test_writing_imports_nothing_of_training() -> None:
    script = (
        "import sys\n"
        "from fusionroute import chat, loading\n"
        "from fusionroute.serving import server\n"
        "print([m for m in ('datasets', 'trl', 'fusionroute.training.running') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("reuse", [True, False])
def test_an_engine_that_drafts_and_reuses_if_asked(make_collection: Callable[[str], Path], reuse: bool) -> None:
    engine = load_engine(make_collection("llama"), reuse=reuse, kv_budget=1 << 24)
    assert engine.drafter is not None
    assert engine.tokenizer is not None
    assert (engine.prefixes is not None) == reuse
    assert engine.budget.total == 1 << 24
