"""What long work shows on a terminal: a bar of ours, and none of the libraries'. Knows no model.

In a launch of several processes the main one shows its own share, of which no process has more.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any


class Meter:
    """Progress in tokens, or in another unit: a bar on a terminal, a line every half minute elsewhere.

    `with Meter(…) as meter:` stops the bar however the block ends.
    """

    def __init__(self, title: str, total: int, unit: str = "tokens") -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self.started = self.printed = time.monotonic()
        self.bar: Any = None
        self.shown = os.environ.get("RANK", "0") == "0"
        if sys.stderr.isatty() and self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(title, total=total, note="")
            self.bar.start()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        rate = self.done / max(now - self.started, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=f"{rate:.3g} {self.unit}/s")
        elif now - self.printed > 30 and self.shown:
            self.printed = now
            left = (self.total - self.done) / rate / 60
            print(
                f"{self.title}: {self.done}/{self.total} {self.unit}  {rate:.3g} {self.unit}/s  {left:.0f} min left",
                file=sys.stderr,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def hush() -> None:
    """Let libraries that are imported from now on keep to themselves what concerns nobody here; for commands.

    transformers imports torchao where it is installed, which tells of kernels for GPUs that are not there.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet(*, data: bool = False) -> Iterator[None]:
    """Keep transformers' own bars and advice off the screen, and leave its settings as they were.

    Args:
        data: those of `datasets` too, which is imported for it.
    """
    from transformers.utils import logging as advice

    level, bars = advice.get_verbosity(), advice.is_progress_bar_enabled()
    advice.set_verbosity_error()
    advice.disable_progress_bar()
    try:
        with warnings.catch_warnings(), _no_bars_of_data() if data else contextlib.nullcontext():
            # Deprecations between transformers, peft and trl are theirs to settle.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        advice.set_verbosity(level)
        # Where the user has turned them off by the environment, turning them on again would be a warning.
        if bars:
            advice.enable_progress_bar()


@contextlib.contextmanager
def _no_bars_of_data() -> Iterator[None]:
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
