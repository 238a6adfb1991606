"""No training row may share 13 words in a row with a benchmark's test item: an index of the items, and the check.

Thirteen words is the measure of Brown et al. 2020 (GPT-3, appendix C). It is blunt on purpose: a run of numbers or a
common code header that stands in both is dropped as well. Knows nothing of tokens, models or what a row is for; a
paraphrase, a translation or a changed number in every twelve words is not found.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fusionroute.errors import FusionRouteError
from fusionroute.training.formats import Row, strip_calculator_marks
from fusionroute.training.rows import read_raw

WINDOW = 13
# A whole item of fewer words ("Write a poem", "assert f(1) == 2") is no evidence that anybody saw the test.
SHORTEST = 6

_WORD = re.compile(r"[^\W_]+")
_Words = tuple[str, ...]


def words(text: str) -> list[str]:
    """Split a text into lower-case words: runs of Unicode letters and digits, everything else dropped.

    Compatibility forms are folded first (NFKC), so that `x²`, full-width digits and decomposed accents compare equal.
    `snake_case` is two words and `3.5` as well; a run of Chinese or Japanese without a space is one.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _windows(sequence: Sequence[str], size: int) -> Iterator[_Words]:
    return zip(*(sequence[start:] for start in range(size)), strict=False)


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, whatever holds it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


class BenchmarkIndex:
    """The word windows of test items, and for each the first item that has it.

    Args:
        items: (name, text) pairs; several texts may bear one name. A text of 13 words or more is found by any 13 of
            them in a row, one of 6 to 12 words as a whole, a shorter one never.
    """

    def __init__(self, items: Iterable[tuple[str, str]]) -> None:
        self._long: dict[_Words, str] = {}
        self._short: dict[_Words, list[tuple[_Words, str]]] = {}  # by their first six words
        for name, text in items:
            # Training rows lack the calculator marks that gsm8k's test answers have.
            for variant in {text, strip_calculator_marks(text)}:
                self._add(name, words(variant))

    def _add(self, name: str, sequence: list[str]) -> None:
        if len(sequence) >= WINDOW:
            for window in _windows(sequence, WINDOW):
                self._long.setdefault(window, name)
        elif len(sequence) >= SHORTEST:
            self._short.setdefault(tuple(sequence[:SHORTEST]), []).append((tuple(sequence), name))

    @classmethod
    def from_files(cls, paths: Iterable[Path]) -> "BenchmarkIndex":
        """Index test files: every string of every row is a text of its own, its name is `folder/file:line`.

        Ids and keys are strings too, but too short to count.

        Raises:
            FusionRouteError: a file is missing or damaged.
        """
        return cls(
            (f"{path.parent.name}/{path.name}:{line}", text)
            for path in paths
            for line, row in read_raw(path)
            for text in _texts(row)
        )

    def overlaps(self, row: Row) -> str | None:
        """Name a test item that shares 13 words in a row with a text of `row`, such as `gsm8k/test.jsonl:17`.

        The texts are read in order and the first match is named, long items before short ones; None if there is none.
        """
        for text in _texts(row):
            sequence = words(text)
            found = next(filter(None, map(self._long.get, _windows(sequence, WINDOW))), None)
            if found is not None:
                return found
            for candidates in filter(None, map(self._short.get, _windows(sequence, SHORTEST))):
                for item, name in candidates:
                    if item in _windows(sequence, len(item)):
                        return name
        return None


def drop_overlapping(rows: Sequence[Row], index: BenchmarkIndex) -> tuple[list[Row], list[tuple[int, str]]]:
    """Part `rows` into those to train on and those that show a test item.

    Returns:
        The kept rows in order, and (position in `rows` counted from 0, name of the test item) of each dropped one.
    """
    kept: list[Row] = []
    dropped: list[tuple[int, str]] = []
    for number, row in enumerate(rows):
        item = index.overlaps(row)
        if item is None:
            kept.append(row)
        else:
            dropped.append((number, item))
    return kept, dropped


def benchmark_files(data_dir: Path) -> list[Path]:
    """List the test files under a data folder, sorted: `*/test.jsonl`, `general/prompts.jsonl`, `mbpp/prompt.jsonl`.

    The last holds the examples shown in few-shot prompts. The list is empty if there are none: a caller that needs
    the check must say so.

    Raises:
        FusionRouteError: there is no such folder.
    """
    if not data_dir.is_dir():
        raise FusionRouteError(f"{data_dir} is not a folder: name the folder of your data with --data DIR")
    others = [data_dir / "general" / "prompts.jsonl", data_dir / "mbpp" / "prompt.jsonl"]
    return sorted([*data_dir.glob("*/test.jsonl"), *(path for path in others if path.is_file())])
