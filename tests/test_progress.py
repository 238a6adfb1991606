"""Our bar, and the libraries' kept off the screen."""

import io
import subprocess
import sys
from typing import Any

import pytest

from bars import Bar
from fusionroute.progress import Meter, quiet


def test_a_meter_gives_the_terminal_back_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    bar = Bar()
    monkeypatch.setattr("rich.progress.Progress", lambda *_, **__: bar)
    monkeypatch.setattr(sys, "stderr", Terminal())

    def fail() -> None:
        with Meter("annotating", 10):
            assert bar.shown
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not bar.shown


def test_in_a_launch_one_process_shows_its_share(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        meter = Meter("annotating", 10)
        meter.started = meter.printed = meter.started - 60  # a minute ago
        meter.advance(5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("annotating: 5/10 tokens")


def test_quiet_restores_verbosity_after_an_error() -> None:
    from transformers.utils import logging

    def fail() -> None:
        with quiet():
            assert logging.get_verbosity() == logging.ERROR
            raise RuntimeError("inside")

    before = logging.get_verbosity()
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert logging.get_verbosity() == before


@pytest.mark.parametrize("shown", [True, False])
def test_quiet_leaves_bars_as_they_were(monkeypatch: pytest.MonkeyPatch, shown: bool) -> None:
    import datasets
    from transformers.utils import logging

    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        with quiet(data=True):
            assert not logging.is_progress_bar_enabled()
            assert datasets.are_progress_bars_disabled()
        assert logging.is_progress_bar_enabled() == shown
        assert datasets.are_progress_bars_disabled() != shown
    finally:
        logging.enable_progress_bar()
        datasets.enable_progress_bars()


def test_hush_is_about_what_is_imported_after() -> None:
    script = (
        "import logging\nfrom fusionroute.progress import hush\nhush()\nimport torchao\n"
        "logging.getLogger('fusionroute').warning('seen')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "seen"
