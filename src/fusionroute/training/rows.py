"""Raw data files and Hub data sets -> rows in trl's conventions, as plain dicts.

A chat row is `{"messages": [{"role", "content"}, ...], "domain"}` and ends with the assistant; a preference row is
`{"prompt": [messages], "chosen": [messages], "rejected": [messages], "domain"}`. Knows nothing of tokens, templates,
tensors or of what the rows are for.
"""

import gzip
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import pydantic

from fusionroute.errors import FusionRouteError
from fusionroute.training.formats import ADAPTERS, PAIRED, FieldError, Row, gpteacher_python

# fmt: off
Format = Literal[
    "gsm8k", "mbpp", "gpteacher", "instruct", "self_instruct", "perfectblend", "messages",
    "ultrafeedback", "hh_rlhf", "openhermes_preferences", "preference",
]
# fmt: on


class DataSpec(pydantic.BaseModel, extra="forbid"):
    """One entry of a recipe's data list.

    Args:
        format: how a raw row is read; one function of `formats` each.
        path: a `.jsonl` or `.json` file, plain or `.gz`, absolute or relative to the data folder; a Hub id if `split`
            is set.
        split: the Hub data set's split, such as `train` or `train[:1000]`.
        revision: the Hub data set's branch, tag or commit.
        domain: `math`, `code`, `general`; only for reporting.
        start: first row taken, counted after shuffling and filtering.
        stop: one past the last row taken; without it, all.
        shuffle_seed: shuffle with this seed; without it, the file's order.
        python_only: of a `gpteacher` file, only the rows that are answered with Python code.
        chosen_only: of preference rows the better answer alone, as chat rows.
    """

    format: Format
    path: str
    split: str | None = None
    revision: str | None = None
    domain: str
    start: int = pydantic.Field(default=0, ge=0)
    stop: int | None = None
    shuffle_seed: int | None = None
    python_only: bool = False
    chosen_only: bool = False

    @property
    def paired(self) -> bool:
        """Whether it gives preference rows; else chat rows."""
        return self.format in PAIRED and not self.chosen_only

    @pydantic.model_validator(mode="after")
    def _nothing_without_effect(self) -> "DataSpec":
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop ({self.stop}) must be greater than start ({self.start})")
        if self.python_only and self.format != "gpteacher":
            raise ValueError(f"python_only goes with format gpteacher, not {self.format}")
        if self.chosen_only and self.format not in PAIRED:
            raise ValueError(f"chosen_only goes with preference formats, not {self.format}: {', '.join(PAIRED)}")
        if self.revision is not None and self.split is None:
            raise ValueError("revision goes with a Hub data set: name its split too")
        return self


def parse_spec(entry: Mapping[str, Any]) -> DataSpec:
    """Check one entry of a data list.

    Raises:
        FusionRouteError: an unknown key or format, a missing or impossible value; one line for all of them.
    """
    try:
        return DataSpec.model_validate(entry)
    except pydantic.ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            given = f" (given: {problem['input']!r})" if problem["type"] == "literal_error" else ""
            problems.append(f"{key}: {problem['msg']}{given}" if key else problem["msg"])
        where = f"data entry {entry['path']!r}" if isinstance(entry.get("path"), str) else "data entry"
        raise FusionRouteError(f"{where}: {'; '.join(problems)}") from None


def read_raw(path: Path) -> list[tuple[int, Row]]:
    """Read a `.jsonl` or `.json` (one list) file, either also as `.gz`.

    Returns:
        (line, object) pairs, lines counted from 1; of a `.json` file, the number of the item.

    Raises:
        FusionRouteError: the file is missing, of another kind, damaged, or holds something that is no JSON object.
    """
    if not path.is_file():
        raise FusionRouteError(f"{path} is missing: name the folder of your data with --data DIR")
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("jsonl", "json"):
        raise FusionRouteError(f"{path}: only .jsonl and .json files, plain or .gz, can be read")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with cast(IO[str], opened(path, "rt", encoding="utf-8-sig")) as file:
            rows = _json_lines(file, path) if kind == "jsonl" else json.load(file)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # not JSON, not UTF-8, half a gzip file, no permission
        raise FusionRouteError(f"{path} cannot be read ({error}): fetch it again") from None
    if not isinstance(rows, list):
        raise FusionRouteError(f"{path} is not a list of rows: write one JSON list, or one row a line as .jsonl")
    numbered = rows if kind == "jsonl" else list(enumerate(rows, start=1))
    for number, value in numbered:
        if not isinstance(value, dict):
            raise FusionRouteError(f"{path}:{number}: not a JSON object but {value!r:.40}")
    return numbered


def _json_lines(file: IO[str], path: Path) -> list[tuple[int, Any]]:
    rows = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise FusionRouteError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
    return rows


def _hub_rows(spec: DataSpec) -> Sequence[Row]:
    import datasets

    try:
        return cast(Sequence[Row], datasets.load_dataset(spec.path, split=spec.split, revision=spec.revision))
    except Exception as error:  # the Hub, the network, the cache and every file format have exceptions of their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FusionRouteError(f"cannot load data set {spec.path}, split {spec.split}: {reason}") from error


def shuffled(count: int, seed: int) -> list[int]:
    """The order of `count` rows shuffled with `seed`: the same wherever rows are taken in slices."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


class Found(NamedTuple):
    """A row of a data set: its line (or number, from 0 on the Hub), as it stands there, and as it was read."""

    number: int
    raw: Row
    row: Row


def find_rows(spec: DataSpec, data_dir: Path | None) -> tuple[list[Found], int]:
    """Find the rows of one entry, in order, and count the rows that were left out.

    Returns:
        The rows, and how many of the raw rows looked at were dropped: an empty text, turns out of order, two equal
        answers, not Python. Nothing is looked at beyond row `stop`.

    Raises:
        FusionRouteError: see `read_raw`; a Hub set that cannot be loaded; a raw row without a field its format needs;
            nothing left.
    """
    raw: Sequence[Row]
    numbers: Sequence[int]
    if spec.split is None:
        path = Path(spec.path).expanduser()
        if data_dir is None and not path.is_absolute():
            raise FusionRouteError(f"where is {path}? Name its folder with --data DIR (or, on the Hub, its `split`)")
        path = ((data_dir or Path()) / path).absolute()
        numbered = read_raw(path)
        source, numbers, raw = str(path), [n for n, _ in numbered], [row for _, row in numbered]
    else:
        raw = _hub_rows(spec)
        source, numbers = f"{spec.path}[{spec.split}]", range(len(raw))
    adapter = gpteacher_python if spec.python_only else ADAPTERS[spec.format]
    # Shuffling before filtering gives a random order of the kept rows as well, and a slice of a million rows is
    # found without converting the rest.
    order = range(len(raw)) if spec.shuffle_seed is None else shuffled(len(raw), spec.shuffle_seed)
    rows: list[Found] = []
    dropped = 0
    for index in order:
        if len(rows) == spec.stop:
            break
        try:
            row = adapter(raw[index])
        except FieldError as error:
            raise FusionRouteError(f"{source}:{numbers[index]}: {error}; format {spec.format!r} needs it") from None
        if row is None:
            dropped += 1
        else:
            if spec.chosen_only:
                row = {"messages": row["prompt"] + row["chosen"]}
            rows.append(Found(numbers[index], raw[index], row | {"domain": spec.domain}))
    if len(rows) <= spec.start:
        found = f"{len(raw)} read as {spec.format!r}, {dropped} dropped, {len(rows)} left"
        raise FusionRouteError(f"{source}: no rows from {spec.start} on: {found}")
    return rows[spec.start :], dropped


def load_counted(spec: DataSpec, data_dir: Path | None) -> tuple[list[Row], int]:
    """Load the rows of one entry, as `load_rows`, and how many were left out. Returns and raises as `find_rows`."""
    found, dropped = find_rows(spec, data_dir)
    return [each.row for each in found], dropped


def load_rows(spec: DataSpec, data_dir: Path | None) -> list[Row]:
    """Load the chat or preference rows of one entry; `data_dir` (`--data DIR`) is what relative paths refer to.

    The same spec and file give the same rows in the same order; slices with one seed that do not overlap share no row.
    Raises as `find_rows`.
    """
    return load_counted(spec, data_dir)[0]
