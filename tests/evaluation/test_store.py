import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.store import Store, key_of

values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v), max_leaves=4)


@given(rows=st.dictionaries(st.text(min_size=1), st.dictionaries(st.text().filter(lambda k: k != "key"), values)))
def test_what_was_put_is_there_again(rows: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("store") / "rows.jsonl"
    store = Store(path)
    for key, row in rows.items():
        store.put(key, row)
    assert Store(path).rows == store.rows == rows


def test_the_last_row_of_a_key_counts(tmp_path: Path) -> None:
    store = Store(tmp_path / "rows.jsonl")
    store.put("a", {"n": 1})
    store.put("a", {"n": 2})
    assert Store(store.path).get("a") == {"n": 2}


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_cut_short_costs_only_its_own_row(cut: int, tmp_path: Path) -> None:
    store = Store(tmp_path / "rows.jsonl")
    store.put("a", {"text": "one"})
    store.put("b", {"text": "zwei – ünïcode"})
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-cut])
    again = Store(store.path)
    again.put("c", {"text": "three"})
    assert {"a", "c"} <= set(Store(store.path).rows)
    assert Store(store.path).get("c") == {"text": "three"}


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('nonsense\n[1]\n{"no": "key"}\n' + json.dumps({"key": "a", "n": 1}) + "\n")
    assert Store(path).rows == {"a": {"n": 1}}


def test_a_row_that_cannot_be_written_is_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "rows.jsonl")
    store.put("a", {"n": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size, before[1]))
    try:
        with pytest.raises((FusionRouteError, OSError)):
            store.put("b", {"n": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.get("b") is None
    assert Store(store.path).rows == {"a": {"n": 1}}


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fusionroute.evaluation.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for n in range(10**6):\n"
        "    store.put(str(n), {'text': 'x' * 300})\n"
        "    print(n, flush=True)\n"
    )
    path = tmp_path / "rows.jsonl"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    last = 0
    until = time.monotonic() + 30
    while last < 50 and time.monotonic() < until:
        last = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    rows = Store(path).rows
    assert all(rows[str(n)] == {"text": "x" * 300} for n in range(last + 1))


def test_keys_tell_apart_what_differs() -> None:
    parts = [("a", 1), ("a", "1"), ("a1",), ("a", {"x": 1}), ("a", {"x": 2}), (["a"], 1)]
    assert len({key_of(*part) for part in parts}) == len(parts)


def test_a_key_does_not_depend_on_the_order_of_settings() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
