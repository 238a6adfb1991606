"""Raw data files and Hub data sets -> rows in trl's conventions, as plain dicts.

A chat row is `{"messages": [{"role", "content"}, ...], "domain"}` and ends with the assistant; a preference row is
`{"prompt": [messages], "chosen": [messages], "rejected": [messages], "domain"}`. Knows nothing of tokens, templates,
tensors or of what the rows are for.
"""

import ast
import gzip
import json
import random
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

import pydantic

from fusionroute.errors import FusionRouteError

Row = dict[str, Any]
Messages = list[dict[str, str]]
T = TypeVar("T")
# fmt: off
Format = Literal[
    "gsm8k", "mbpp", "gpteacher", "instruct", "self_instruct", "perfectblend", "messages",
    "ultrafeedback", "hh_rlhf", "openhermes_preferences", "preference",
]
# fmt: on


class DataSpec(pydantic.BaseModel, extra="forbid"):
    """One entry of a recipe's data list.

    Args:
        format: how a raw row is read; one function of this module each.
        path: a `.jsonl` or `.json` file, plain or `.gz`, absolute or relative to the data folder; a Hub id if `split`
            is set.
        split: the Hub data set's split, such as `train` or `train[:1000]`.
        revision: the Hub data set's branch, tag or commit.
        domain: `math`, `code`, `general`; only for reporting.
        start: first row taken, counted after shuffling and filtering.
        stop: one past the last row taken; without it, all.
        shuffle_seed: shuffle with this seed; without it, the file's order.
        python_only: of a `gpteacher` file, only the rows that are answered with Python code.
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

    @pydantic.model_validator(mode="after")
    def _nothing_without_effect(self) -> "DataSpec":
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop ({self.stop}) must be greater than start ({self.start})")
        if self.python_only and self.format != "gpteacher":
            raise ValueError(f"python_only goes with format gpteacher, not {self.format}")
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


class _FieldError(Exception):
    """A raw row lacks a field its format needs; whoever knows the file and line completes the message."""


def _field(raw: Row, name: str, kind: type[T], default: T | None = None) -> T:
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        what = "is missing" if value is None else f"is not a {kind.__name__} but {value!r:.40}"
        raise _FieldError(f"field {name!r} {what}")
    return value


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _tidy(text: str) -> str:
    # Blank lines around a text would be learnt as part of the turn; indentation of its first line may be code.
    return text.replace("\r\n", "\n").lstrip("\n").rstrip()


def _well_formed(messages: Messages) -> bool:
    """A system message or none, then user and assistant in turns, the assistant last, nothing empty.

    Chat templates of several families refuse anything else.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [turn["role"] for turn in turns]
    in_turns = ["user", "assistant"] * max(1, len(roles) // 2)
    return roles == in_turns and all(message["content"].strip() for message in messages)


def _chat(messages: Messages | None) -> Row | None:
    return {"messages": messages} if messages is not None and _well_formed(messages) else None


def _pair(prompt: Messages, chosen: Messages, rejected: Messages) -> Row | None:
    if chosen == rejected or not (_well_formed(prompt + chosen) and _well_formed(prompt + rejected)):
        return None
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _instruction(instruction: str, extra: str, answer: str) -> Row | None:
    extra = _tidy(extra)
    user = _tidy(instruction) + (f"\n\n{extra}" if extra else "")
    return _chat([_message("user", user), _message("assistant", _tidy(answer))])


def strip_calculator_marks(text: str) -> str:
    """Remove gsm8k's `<<48/2=24>>`, which instruct a calculator and are not meant to be read."""
    return re.sub(r"<<[^<>\n]*>>", "", text)


def _gsm8k(raw: Row) -> Row | None:
    return _instruction(_field(raw, "question", str), "", strip_calculator_marks(_field(raw, "answer", str)))


def _mbpp(raw: Row) -> Row | None:
    text, code = _tidy(_field(raw, "text", str)), _tidy(_field(raw, "code", str))
    tests = [_tidy(str(test)) for test in _field(raw, "test_list", list)]
    if not text or not code:
        return None
    user = "\n".join([text, "Your code should pass these tests:", *tests])
    return _chat([_message("user", user), _message("assistant", f"```python\n{code}\n```")])


def _instruct(raw: Row, answer: str = "output") -> Row | None:
    return _instruction(_field(raw, "instruction", str), _field(raw, "input", str, ""), _field(raw, answer, str))


def _gpteacher(raw: Row) -> Row | None:
    return _instruct(raw, "response")


def _gpteacher_python(raw: Row) -> Row | None:
    instruction, response = _field(raw, "instruction", str), _tidy(_field(raw, "response", str))
    if asks_for_another_language(instruction) or not is_python(response):
        return None
    return _gpteacher(raw | {"response": response if "```" in response else f"```python\n{response}\n```"})


def _self_instruct(raw: Row) -> Row | None:
    instances = _field(raw, "instances", list)
    if not instances or not isinstance(instances[0], dict):
        raise _FieldError("field 'instances' holds no instance")
    return _instruct(instances[0] | {"instruction": raw.get("instruction")})


def _messages_of(items: list[Any]) -> Messages | None:
    """The messages with role and content alone; None if one of them is not made of these."""
    if not all(isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str} for m in items):
        return None
    return [_message(m["role"], m["content"]) for m in items]


def _messages(raw: Row) -> Row | None:
    return _chat(_messages_of(_field(raw, "messages", list)))


def _perfectblend(raw: Row) -> Row | None:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    turns = [turn if isinstance(turn, dict) else {} for turn in _field(raw, "conversations", list)]
    # Some of the blended sets write an empty system turn where others write none.
    turns = [turn for turn in turns if turn.get("from") != "system" or turn.get("value")]
    return _chat(_messages_of([{"role": roles.get(str(t.get("from"))), "content": t.get("value")} for t in turns]))


def _preference(raw: Row) -> Row | None:
    """A pair whose answers are strings, assistant messages, or whole conversations that include the prompt."""
    sides: list[tuple[Messages, Messages]] = []
    for field in ("chosen", "rejected"):
        if isinstance(raw.get(field), str):
            sides.append(([], [_message("assistant", raw[field])]))
            continue
        messages = _messages_of(_field(raw, field, list))
        if not messages:
            return None
        split = 0 if messages[0]["role"] == "assistant" else len(messages) - 1
        sides.append((messages[:split], messages[split:]))
    (prompt, chosen), (other_prompt, rejected) = sides
    if prompt != other_prompt:
        return None
    if not prompt and isinstance(raw.get("prompt"), list):
        prompt = _messages_of(raw["prompt"]) or []
    elif not prompt:
        prompt = [_message("user", _field(raw, "prompt", str))]
    return _pair(prompt, chosen, rejected)


def _hh_rlhf(raw: Row) -> Row | None:
    roles = {"Human": "user", "Assistant": "assistant"}
    sides = []
    for field in ("chosen", "rejected"):
        before, *parts = re.split(r"\n\n(Human|Assistant):", _field(raw, field, str))
        if before.strip() or not parts:
            return None
        sides.append([_message(roles[r], text.strip()) for r, text in zip(parts[::2], parts[1::2], strict=True)])
    chosen, rejected = sides
    return _pair(chosen[:-1], chosen[-1:], rejected[-1:]) if chosen[:-1] == rejected[:-1] else None


_ADAPTERS: dict[str, Callable[[Row], Row | None]] = {
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "gpteacher": _gpteacher,
    "instruct": _instruct,
    "self_instruct": _self_instruct,
    "perfectblend": _perfectblend,
    "messages": _messages,
    "ultrafeedback": _preference,
    "hh_rlhf": _hh_rlhf,
    "openhermes_preferences": _preference,
    "preference": _preference,
}

_PROGRAMMING = (
    r"(?:(?i:java|javascript|js|node\.js|typescript|c\+\+|cpp|c#|ruby|php|golang|rust|swift|kotlin|perl|scala|haskell"
    r"|lua|matlab|bash|shell)|C|R|Go)"
)
_LANGUAGE = re.compile(rf"(?<![\w+#])(?:{_PROGRAMMING}|(?i:(?:my)?sql|mongodb|html|css))(?![\w+#])")
# Markup and SQL are left out here: a Python program may well be asked to write "to a MySQL database".
_TARGET = re.compile(
    rf"\b(?i:to|into|in|using)\s+(?:(?i:an?|the|its|equivalent|corresponding)\s+)*{_PROGRAMMING}(?![\w+#])"
)
_FENCED = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def asks_for_another_language(instruction: str) -> bool:
    """Whether the code asked for is not Python: "... to Java", or another language and no word of Python."""
    if re.search(r"\bpython", instruction, re.IGNORECASE):
        return _TARGET.search(instruction) is not None
    return _LANGUAGE.search(instruction) is not None


def is_python(text: str) -> bool:
    """Whether `text`, or its first fenced block, is a Python program that does something.

    A lone name, number, list or annotation does not count: `42`, `Output: 'NaN'` and `ls -lS` parse too. What parses
    is up to the running Python, so a row in a thousand may differ between versions.
    """
    fenced = _FENCED.search(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            statements = ast.parse(fenced[1] if fenced else text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(_does_something(statement) for statement in statements)


def _does_something(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    return not (isinstance(statement, ast.AnnAssign) and statement.value is None)


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


def load_counted(spec: DataSpec, data_dir: Path | None) -> tuple[list[Row], int]:
    """Load the rows of one entry, as `load_rows`, and count the rows that were left out.

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
    adapter = _gpteacher_python if spec.python_only else _ADAPTERS[spec.format]
    # Shuffling before filtering gives a random order of the kept rows as well, and a slice of a million rows is
    # found without converting the rest.
    order = list(range(len(raw)))
    if spec.shuffle_seed is not None:
        random.Random(spec.shuffle_seed).shuffle(order)
    rows: list[Row] = []
    dropped = 0
    for index in order:
        if len(rows) == spec.stop:
            break
        try:
            row = adapter(raw[index])
        except _FieldError as error:
            raise FusionRouteError(f"{source}:{numbers[index]}: {error}; format {spec.format!r} needs it") from None
        if row is None:
            dropped += 1
        else:
            rows.append(row | {"domain": spec.domain})
    if len(rows) <= spec.start:
        found = f"{len(raw)} read as {spec.format!r}, {dropped} dropped, {len(rows)} left"
        raise FusionRouteError(f"{source}: no rows from {spec.start} on: {found}")
    return rows[spec.start :], dropped


def load_rows(spec: DataSpec, data_dir: Path | None) -> list[Row]:
    """Load the chat or preference rows of one entry; `data_dir` (`--data DIR`) is what relative paths refer to.

    The same spec and file give the same rows in the same order; slices with one seed that do not overlap share no row.
    Raises as `load_counted`.
    """
    return load_counted(spec, data_dir)[0]


def load_many(specs: Iterable[DataSpec], data_dir: Path | None) -> list[Row]:
    """Load the rows of several entries, one after the other. Raises as `load_counted`."""
    return [row for spec in specs for row in load_rows(spec, data_dir)]
