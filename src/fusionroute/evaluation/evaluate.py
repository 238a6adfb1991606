"""`fusionroute evaluate`: every system on every benchmark, resumable; what is stored is never computed again.

Three files in the results folder: `answers.jsonl` and `scores.jsonl` by key, and `plan.json`, which says what was
asked: of every system and benchmark the key of each item's score, also of those missing. `report` reads these alone.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute import collection as collections
from fusionroute.baselines.selection import select
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation.benchmarks import Benchmark, Item, load_task
from fusionroute.evaluation.execution import require_isolation
from fusionroute.evaluation.reward import RewardModel
from fusionroute.evaluation.store import Store, key_of
from fusionroute.evaluation.systems import SELECTION, Sources, System, find, parse
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
        sft, finetuned: as in `Sources`.
        reward: the reward model that selects among answers, as in `RewardModel`.
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
    reward: str | None = None
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
    config = collections.read_config(wanted.collection)
    names = parse(wanted.systems, config)
    asked_for_all = "all" in ",".join(wanted.systems).split(",")
    systems: dict[str, System] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            if name == SELECTION:
                _require_reward(wanted)
            else:
                systems[name] = find(name, sources)
        except UsageError as error:
            if not asked_for_all:
                raise
            missing[name] = str(error)
    selects = SELECTION in names and SELECTION not in missing
    reward = RewardModel(str(wanted.reward)) if selects else None
    benchmarks = [load_task(name, wanted.data, limit=wanted.limit) for name in wanted.tasks]
    if {"mbpp", "humaneval"} & set(wanted.tasks):
        require_isolation(wanted.unsafe)
    answers, scores = Store(wanted.out / "answers.jsonl"), Store(wanted.out / "scores.jsonl")
    experts = {name: find(f"expert:{name}", sources) for name in config.expert_names} if selects else {}
    # The experts' answers are those of `expert:NAME`, whether the table shows these or not.
    runs = {**systems, **{system.name: system for system in experts.values()}}
    identities = {
        name: system.identity(collections.read_config(system.folder), wanted.base) for name, system in runs.items()
    }
    cells = {
        name: {task.name: _cell(identity, task, wanted) for task in benchmarks} for name, identity in identities.items()
    }
    if reward is not None:
        cells[SELECTION] = {
            task.name: _selected(task, [cells[system.name][task.name] for system in experts.values()], reward)
            for task in benchmarks
        }
    plan: dict[str, Any] = {
        "collection": str(wanted.collection),
        "limit": wanted.limit,
        "dtype": wanted.dtype,
        "batch": wanted.batch,
        "reward": None if reward is None else {"source": reward.source, "accuracy": reward.accuracy},
        "experts": config.expert_names,
        "tasks": {
            task.name: {"settings": task.settings(), "primary": task.primary, "items": [item.id for item in task.items]}
            for task in benchmarks
        },
        "systems": {
            name: {
                "identity": identities.get(name),
                "routed": name in systems and systems[name].routed,
                "tasks": {task: asdict(cell) for task, cell in cells[name].items()},
            }
            for name in names
            if name in cells
        },
        "not_run": missing,
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    write_json(wanted.out / "plan.json", plan)
    _answer_all(list(runs.values()), benchmarks, cells, answers, wanted)
    if reward is not None:
        _select_all(experts, benchmarks, cells, answers, reward)
    for name in plan["systems"]:
        for task in benchmarks:
            _score(name, task, cells[name][task.name], answers, scores, wanted)
    return plan


def _require_reward(wanted: Evaluation) -> None:
    if wanted.reward is None:
        raise UsageError(f"{SELECTION} needs a reward model: give --reward SOURCE[+ADAPTER]")


def _cell(identity: dict[str, Any], task: Benchmark, wanted: Evaluation) -> Cell:
    requests = [[item.prompt, item.max_new_tokens, list(item.stop), wanted.dtype] for item in task.items]
    keys = [
        None if item.defect else key_of("answer", identity, request)
        for item, request in zip(task.items, requests, strict=True)
    ]
    return _keys(task, keys)


def _keys(task: Benchmark, answers: list[str | None]) -> Cell:
    settings = task.settings()
    scores = [
        None if key is None else key_of("score", key, task.name, item.id, settings)
        for item, key in zip(task.items, answers, strict=True)
    ]
    return Cell(answers, scores)


def _answer_all(
    systems: Sequence[System],
    benchmarks: Sequence[Benchmark],
    cells: dict[str, dict[str, Cell]],
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
            for key, item in zip(cells[system.name][task.name].answers, task.items, strict=True)
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


def _selected(task: Benchmark, experts: Sequence[Cell], reward: RewardModel) -> Cell:
    """The keys of what sequence selection picks among the experts' answers."""
    candidates = zip(*(cell.answers for cell in experts), strict=True)
    return _keys(task, [None if None in keys else key_of(SELECTION, keys, reward.digest) for keys in candidates])


def _select_all(
    experts: dict[str, System],
    benchmarks: Sequence[Benchmark],
    cells: dict[str, dict[str, Cell]],
    answers: Store,
    reward: RewardModel,
) -> None:
    """Pick among the experts' answers where that has not been done."""
    for task in benchmarks:
        sides = [cells[system.name][task.name].answers for system in experts.values()]
        for place, (item, key) in enumerate(zip(task.items, cells[SELECTION][task.name].answers, strict=True)):
            rows = [answers.get(str(side[place])) for side in sides]
            found = [row for row in rows if row is not None and not row["error"]]
            if key is None or answers.get(key) is not None or len(found) < len(experts):
                continue
            started = time.perf_counter()
            rewards = reward.score([(item.prompt, row["text"]) for row in found])
            row = select(list(zip(experts, found, strict=True)), rewards)
            row["seconds"] += time.perf_counter() - started
            answers.put(key, {**row, "system": SELECTION})


def _score(name: str, task: Benchmark, cell: Cell, answers: Store, scores: Store, wanted: Evaluation) -> None:
    """Score the answers that have no score yet; one that could not be scored is tried again."""
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
            print(f"{name}, {task.name} {item.id}: {error}", file=sys.stderr)
