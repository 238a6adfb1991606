"""The benchmarks: rows from files or the Hub, prompts, and everything that defines a result.

A benchmark is an lm-eval task, written down in `tasks/*.yaml`. `load_task` reads it through lm-eval, so that prompts
and settings are the same here and under the `lm_eval` command, which calls `load_rows` and `process_results` below; the
scores come from `scoring`. Knows nothing of models, chat templates or stores.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fusionroute.errors import FusionRouteError, UsageError, first_line
from fusionroute.evaluation import scoring
from fusionroute.evaluation.execution import Limits, require_isolation
from fusionroute.evaluation.fields import FIELDS, checked
from fusionroute.evaluation.problems import with_instructions
from fusionroute.evaluation.scoring import Score
from fusionroute.training.rows import parse_spec, read_raw, shuffled

if TYPE_CHECKING:
    import datasets

TASK_FILES = Path(__file__).parent / "tasks"
NAMES = tuple(scoring.SCORERS)
HELD_OUT = ("gsm8k", "mbpp", "ifeval")  # those with rows that the recipes keep out of training
CODE = ("mbpp", "humaneval")  # those whose answers are run
_PREFIX = "fusionroute_"
# Modules and packages whose version can change a score; lm-eval itself reads every task.
PACKAGES = {
    "math500": {"math_verify": "math-verify", "latex2sympy2_extended": "latex2sympy2-extended", "sympy": "sympy"},
    "ifeval": {"lm_eval": "lm_eval", "langdetect": "langdetect", "immutabledict": "immutabledict", "nltk": "nltk"},
}


@dataclass(frozen=True)
class Item:
    """One row asked for.

    Attributes:
        id: the row's own name, or its place in the file, from 0; unique in the benchmark.
        prompt: what to ask, before any chat template; empty if there is a defect.
        max_new_tokens: most tokens of an answer.
        stop: strings that end an answer, beside the model's own end.
        raw: the row's fields as the score uses them; the row as it came if there is a defect.
        defect: what the row lacks; such an item is not asked, counts, and has no score.
    """

    id: str
    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...]
    raw: dict[str, Any]
    defect: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's items, in file order, and how they are scored.

    Attributes:
        primary: the metric that tables show; None where a judge decides.
        source: where the rows came from, for people.
    """

    name: str
    items: tuple[Item, ...]
    primary: str | None
    source: str
    _settings: dict[str, Any] = field(repr=False)

    def score(self, item: Item, answer: str, *, unsafe: bool = False) -> Score:
        """Score an answer. `unsafe` runs model-written code also where nothing isolates it."""
        if item.defect:
            return scoring.unscored(self.name, f"defective row: {item.defect}")
        return scoring.SCORERS[self.name](item.raw, answer, unsafe=unsafe)

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on beside the answers, as JSON knows it: fit for printing and hashing.

        `sha256` is that of the rows as the scores use them, all of them whatever the limit, so the same rows from a
        file and from the Hub are the same.
        """
        return json.loads(json.dumps(self._settings))


def load_task(name: str, data_dir: Path | None, *, limit: int | None = None, held_out: bool = False) -> Benchmark:
    """Load a benchmark.

    Args:
        name: one of `NAMES`.
        data_dir: folder with the files that `tasks/*.yaml` name; without it, the Hub.
        limit: take the first so many rows of the file, as lm-eval's `--limit` does.
        held_out: of the training side's rows those that no recipe trains on, to choose settings by.

    Raises:
        UsageError: no such benchmark, or one without held-out rows; or a limit below 1.
        FusionRouteError: the file or the Hub's data set cannot be read, or a package is not installed.
    """
    if name not in NAMES:
        raise UsageError(f"unknown benchmark {name!r}: there are {', '.join(NAMES)}")
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} items leaves none: name at least 1")
    for module in ("lm_eval", *PACKAGES.get(name, ())):
        if importlib.util.find_spec(module) is None:
            raise FusionRouteError(f"benchmark {name} needs {module}: pip install 'fusionroute[eval]'")
    from lm_eval.tasks import TaskManager

    # Whether code may run is asked when it runs.
    metadata: dict[str, Any] = {"unsafe_code_execution": True}
    if data_dir is not None:
        metadata["data"] = str(data_dir)
    if held_out:
        metadata["held_out"] = True
    with _without_warnings():
        manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata)
        task = manager.load([_PREFIX + name])["tasks"][_PREFIX + name]
    docs = cast(Sequence[dict[str, Any]], task.eval_docs)
    generation = task.config.generation_kwargs
    items = [
        Item(
            doc["id"],
            "" if doc["defect"] else task.doc_to_text(doc),
            generation["max_gen_toks"],
            tuple(generation["until"]),
            json.loads(doc["row"]),
            doc["defect"],
        )
        for doc in (docs[index] for index in range(min(len(docs), limit or len(docs))))
    ]
    rows = _part(task.config.dataset_kwargs["rows"], held_out)
    place = rows.get("requests") or {"path": rows.get("file")}
    source = str(data_dir / place["path"]) if data_dir is not None else rows["hub"]["path"]
    settings = _settings_of(name, task, docs) | ({"part": "held out"} if held_out else {})
    return Benchmark(name, tuple(items), task.config.metadata["primary"], source, settings)


def _part(rows: Mapping[str, Any], held_out: bool) -> Mapping[str, Any]:
    """Where the test rows are, or those held out of training."""
    if not held_out:
        return rows
    if "held_out" not in rows:
        raise UsageError(f"{rows['task']} has no rows held out of training: there are some of {', '.join(HELD_OUT)}")
    return rows["held_out"]


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """lm-eval warns of every task that takes its rows from a function."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _settings_of(name: str, task: Any, docs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    config, metadata = task.config, task.config.metadata
    digest = hashlib.sha256()
    for doc in docs:
        digest.update(json.dumps([doc["id"], doc["defect"], doc["row"]]).encode() + b"\n")
    settings = {
        "task": name,
        "version": metadata["version"],
        "prompt": config.doc_to_text,
        "shots": config.num_fewshot,
        "chat_template": metadata["chat_template"],
        "max_new_tokens": config.generation_kwargs["max_gen_toks"],
        "stop": list(config.generation_kwargs["until"]),
        "primary": metadata["primary"],
        "rules": metadata["rules"],
        "rows": len(docs),
        "sha256": digest.hexdigest(),
        "packages": {package: version(package) for package in PACKAGES.get(name, {}).values()},
    }
    if name in CODE:
        settings |= {"python": ".".join(platform.python_version_tuple()[:2]), "limits": asdict(Limits())}
    return settings


def load_rows(
    *,
    rows: Mapping[str, Any],
    data: str | None = None,
    held_out: bool = False,
    unsafe_code_execution: bool = False,
    **_: Any,
) -> "dict[str, datasets.Dataset]":
    """What lm-eval calls for a task's rows: `rows` from the task file, the others from `--metadata`.

    Every row becomes one, in order: a row that lacks a field says so in `defect`, and nothing stands where lm-eval's
    own loader would have stopped the whole task.

    Raises:
        UsageError: the task runs code, and nothing isolates it here.
        FusionRouteError: the file or the Hub's data set cannot be read.
    """
    import datasets

    name: str = rows["task"]
    if name in CODE:
        require_isolation(unsafe_code_execution)
    part = _part(rows, held_out)
    folder = None if data is None else Path(data).expanduser()
    if name == "ifeval" and folder is not None:
        scoring.find_nltk_data(folder / "nltk_data")
    if "requests" in part:
        spec = parse_spec(part["requests"])
        found, source = [asked.raw for asked in with_instructions(spec, folder)[0]], spec.path
    elif folder is None:
        found, source = _hub_rows(**part["hub"]), part["hub"]["path"]
    else:
        found, source = [raw for _, raw in read_raw(folder / part["file"])], str(folder / part["file"])
    if not found:
        raise FusionRouteError(f"{source} holds no rows")
    if (seed := part.get("shuffle_seed")) is not None:
        found = [found[index] for index in shuffled(len(found), seed)]
    found = found[: part.get("stop")]
    docs = [_doc(name, raw, unsafe_code_execution) for raw in found]
    taken: set[str] = set()
    for index, doc in enumerate(docs):
        named = doc["id"] or str(index)
        doc["id"] = named if named not in taken else f"{named}@{index}"
        taken.add(doc["id"])
    return {"test": datasets.Dataset.from_list(docs)}


def _hub_rows(path: str, split: str, name: str | None = None) -> list[dict[str, Any]]:
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(path, name, split=split)]
    except Exception as error:  # the Hub, the network, the cache and every file format have exceptions of their own
        reason = f"cannot load data set {path}, split {split} ({first_line(error)})"
        raise FusionRouteError(f"{reason}: name the folder of your data with --data DIR") from error


def _doc(task: str, raw: dict[str, Any], unsafe: bool) -> dict[str, Any]:
    """A row as lm-eval sees it. All of one task have the same columns: its table takes no others."""
    kind = FIELDS[task]
    row, defect = checked(task, raw)
    shown = kind.shown if defect else {column: row[column] for column in kind.shown}
    named = raw.get(kind.named_by or "")
    kept = json.dumps(row, default=str)
    return {
        "id": str(named) if isinstance(named, int | str) else "",
        "task": task,
        "defect": defect,
        "unsafe": unsafe,
        "row": kept,
        **shown,
    }


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """What lm-eval calls for a row's scores: every metric, and whether there is none."""
    if doc["defect"]:
        found = scoring.unscored(doc["task"], doc["defect"])
    else:
        found = scoring.SCORERS[doc["task"]](json.loads(doc["row"]), results[0], unsafe=doc["unsafe"])
    scores: dict[str, Any] = {
        metric: (score, found.weights.get(metric, 1.0)) if metric.startswith("instruction_") else score
        for metric, score in found.scores.items()
    }
    return scores | {"unscored": float(found.unscored is not None)}
