"""`fusionroute evaluate`: every system on every benchmark, resumable; what is stored is never computed again.

Three files in the results folder: `answers.jsonl` and `scores.jsonl` by key, and `plan.json`, which says what was
asked: of every system and benchmark the key of each item's score, also of those missing. `report` reads these alone.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute import collection as collections
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation.benchmarks import Benchmark, Item, load_task
from fusionroute.evaluation.store import Store, key_of
from fusionroute.evaluation.systems import Sources, System, find, parse
from fusionroute.files import write_json

if TYPE_CHECKING:
    from fusionroute.decoding.engine import Engine

TASKS = ("gsm8k", "math500", "mbpp", "humaneval", "ifeval")


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        out: results folder; what is there is not computed again.
        data: folder with the benchmarks' files; None takes them from the Hub.
        limit: items of each benchmark, the first; None is all.
        batch: rows that are decoded together.
        unsafe: run model-written code where nothing isolates it.
    """

    collection: Path
    out: Path
    tasks: Sequence[str] = TASKS
    systems: Sequence[str] = ("all",)
    data: Path | None = None
    limit: int | None = None
    dtype: str | None = None
    base: str | None = None
    batch: int = 32
    sft: Path | None = None
    finetuned: str | None = None
    unsafe: bool = False


@dataclass
class Cell:
    """One system on one benchmark: keys of its answers and scores, item by item; None where there can be none."""

    answers: list[str | None] = field(default_factory=list)
    scores: list[str | None] = field(default_factory=list)


def evaluate(wanted: Evaluation) -> dict[str, Any]:
    """Fill the results folder and return the plan.

    Raises:
        UsageError: an unknown task or system; before anything runs.
    """
    sources = Sources(
        wanted.collection, wanted.out / "models", sft=wanted.sft, finetuned=wanted.finetuned, base=wanted.base
    )
    names = parse(wanted.systems, collections.read_config(wanted.collection))
    asked_for_all = "all" in ",".join(wanted.systems).split(",")
    systems, missing = [], {}
    for name in names:
        try:
            systems.append(find(name, sources))
        except UsageError as error:
            if not asked_for_all:
                raise
            missing[name] = str(error)
    benchmarks = [load_task(name, wanted.data, limit=wanted.limit) for name in wanted.tasks]
    answers, scores = Store(wanted.out / "answers.jsonl"), Store(wanted.out / "scores.jsonl")
    plan: dict[str, Any] = {
        "collection": str(wanted.collection),
        "limit": wanted.limit,
        "dtype": wanted.dtype,
        "batch": wanted.batch,
        "experts": collections.read_config(wanted.collection).expert_names,
        "tasks": {
            task.name: {"settings": task.settings(), "primary": task.primary, "items": [item.id for item in task.items]}
            for task in benchmarks
        },
        "systems": {},
        "not_run": missing,
    }
    cells: dict[tuple[str, str], Cell] = {}
    for system in systems:
        config = collections.read_config(system.folder)
        identity = system.identity(config, wanted.base)
        plan["systems"][system.name] = {"identity": identity, "routed": system.routed, "tasks": {}}
        for task in benchmarks:
            cell = _cell(identity, task, wanted)
            cells[system.name, task.name] = cell
            plan["systems"][system.name]["tasks"][task.name] = asdict(cell)
    wanted.out.mkdir(parents=True, exist_ok=True)
    write_json(wanted.out / "plan.json", plan)
    _answer_all(systems, benchmarks, cells, answers, wanted)
    _score_all(systems, benchmarks, cells, answers, scores, wanted)
    return plan


def _cell(identity: dict[str, Any], task: Benchmark, wanted: Evaluation) -> Cell:
    cell = Cell()
    for item in task.items:
        request = [item.prompt, item.max_new_tokens, list(item.stop), wanted.dtype]
        answer = None if item.defect else key_of("answer", identity, request)
        cell.answers.append(answer)
        cell.scores.append(None if answer is None else key_of("score", answer, task.name, item.id, task.settings()))
    return cell


def _answer_all(
    systems: Sequence[System],
    benchmarks: Sequence[Benchmark],
    cells: dict[tuple[str, str], Cell],
    answers: Store,
    wanted: Evaluation,
) -> None:
    """Generate the answers that are missing, one system's after another's."""
    from fusionroute.decoding.rows import Request
    from fusionroute.evaluation.answering import answer
    from fusionroute.training.running import Meter

    todo: dict[str, dict[str, Item]] = {}
    planned: set[str] = set()
    for system in systems:
        items = {
            key: item
            for task in benchmarks
            for key, item in zip(cells[system.name, task.name].answers, task.items, strict=True)
            # Systems that are one and the same answer once; what failed is tried again.
            if key is not None and key not in planned and (answers.get(key) or {"error": "missing"})["error"]
        }
        planned |= set(items)
        todo[system.name] = items
    meter = Meter("answering", sum(map(len, todo.values())), "answers")
    loaded: tuple[Path, Engine, Any] | None = None
    for system in systems:
        if not todo[system.name]:
            continue
        if loaded is None or loaded[0] != system.folder:
            loaded = None  # before the next, so that there is one at a time in memory
            loaded = (system.folder, *_load(system.folder, wanted))
        _, engine, tokenizer = loaded
        meter.title = system.name
        requests = (
            (key, Request(_encode(tokenizer, item), item.max_new_tokens, stop=item.stop, **system.policy))
            for key, item in todo[system.name].items()
        )
        for key, found in answer(engine, requests, wanted.batch):
            item = todo[system.name][key]
            row = {"system": system.name, "item": item.id, "prompt": item.prompt, **found.to_dict()}
            try:
                answers.put(key, row)
            except FusionRouteError as error:
                print(f"{system.name}, item {row['item']}: {error}", file=sys.stderr)
            meter.advance(1)
    meter.close()


def _encode(tokenizer: Any, item: Item) -> list[int]:
    return collections.encode_chat(tokenizer, [{"role": "user", "content": item.prompt}])


def _load(folder: Path, wanted: Evaluation) -> "tuple[Engine, Any]":
    from fusionroute.decoding.engine import Engine
    from fusionroute.modeling import FusionRouteForCausalLM
    from fusionroute.training.running import quiet

    with quiet():
        # What stands on no adapter has no base to replace.
        base = wanted.base if any(s.adapter for s in collections.read_config(folder).member_specs) else None
        model = FusionRouteForCausalLM.from_pretrained(folder, dtype=wanted.dtype, base=base)
        tokenizer = collections.load_tokenizer(folder)
    return Engine(model, tokenizer), tokenizer


def _score_all(
    systems: Sequence[System],
    benchmarks: Sequence[Benchmark],
    cells: dict[tuple[str, str], Cell],
    answers: Store,
    scores: Store,
    wanted: Evaluation,
) -> None:
    """Score the answers that have none yet; one that could not be scored is tried again."""
    for system in systems:
        for task in benchmarks:
            cell = cells[system.name, task.name]
            for item, answer_key, score_key in zip(task.items, cell.answers, cell.scores, strict=True):
                if answer_key is None or score_key is None:
                    continue
                row, known = answers.get(answer_key), scores.get(score_key)
                if row is None or row["error"] or (known is not None and known["unscored"] is None):
                    continue
                found = task.score(item, row["text"], unsafe=wanted.unsafe)
                try:
                    scores.put(score_key, asdict(found))
                except FusionRouteError as error:
                    print(f"{system.name}, {task.name} {item.id}: {error}", file=sys.stderr)
