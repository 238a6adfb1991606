"""`fusionroute evaluate`: every system on every benchmark, resumable; what is stored is never computed again.

In the results folder `answers.jsonl`, `scores.jsonl`, `verdicts.jsonl` and `forced.jsonl` by key, and `plan.json`,
which says what was asked: of every system and benchmark the key of each item's score, also of those missing. `report`
reads these alone.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fusionroute import collection as collections
from fusionroute.baselines.carried import reward_source, shown
from fusionroute.baselines.collab import CollabSettings
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation import forced, judging
from fusionroute.evaluation.answering import load_collection
from fusionroute.evaluation.benchmarks import CODE, Benchmark, Item, load_task
from fusionroute.evaluation.execution import require_isolation
from fusionroute.evaluation.generating import COLLAB_ROWS, answer_all, collab_all, lacking, select_all, stored
from fusionroute.evaluation.names import COLLAB, FINETUNED, OURS, SELECTION
from fusionroute.evaluation.reward import RewardModel, describe
from fusionroute.evaluation.store import Store, key_of
from fusionroute.evaluation.systems import NotGivenError, Sources, System, find, parse
from fusionroute.files import write_json

TASKS = ("gsm8k", "math500", "mbpp", "humaneval", "ifeval", judging.TASK)
WIN_RATES = "win rates"
REWARDED = (SELECTION, COLLAB)


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        out: results folder; what is there is not computed again.
        data: folder with the benchmarks' files; None takes them from the Hub.
        limit: items of each benchmark, the first; None is all.
        held_out: ask rows held out of training instead of test rows: what settings may be chosen by.
        batch: rows that are decoded together.
        sft, finetuned, variants: as in `Sources`.
        reward: the reward model that selects among answers, as in `RewardModel`; None takes the collection's own.
        judge: who compares answers to general prompts, as in `judging.load`; None takes the collection's own.
        against: the system that the others are compared with; None is `finetuned`, else `fusionroute`.
        collab, collab_limit: its knobs, and its items of each benchmark, the first; it takes long.
        unsafe: run model-written code where nothing isolates it.
    """

    collection: Path
    out: Path
    tasks: Sequence[str] = TASKS
    systems: Sequence[str] = ("all",)
    data: Path | None = None
    limit: int | None = None
    held_out: bool = False
    dtype: str | None = None
    base: str | None = None
    batch: int = 32
    sft: Path | None = None
    finetuned: str | None = None
    variants: Mapping[str, Path] = field(default_factory=dict)
    reward: str | None = None
    judge: str | None = None
    against: str | None = None
    collab: CollabSettings = field(default_factory=CollabSettings)
    collab_limit: int = 5
    unsafe: bool = False


@dataclass(frozen=True)
class Cell:
    """One system on one benchmark: keys of its answers and scores, item by item; None where there can be none."""

    answers: list[str | None]
    scores: list[str | None]


def evaluate(wanted: Evaluation) -> dict[str, Any]:
    """Fill the results folder and return the plan.

    Raises:
        UsageError: an unknown task or system, or a judge that may not judge; before anything runs.
        FusionRouteError: data, weights or packages that cannot be had; a full disk.
    """
    run = _Run(wanted)
    plan = run.plan()
    write_json(wanted.out / "plan.json", plan)
    answers, scores = Store(wanted.out / "answers.jsonl"), Store(wanted.out / "scores.jsonl")
    run.answer(answers)
    run.score(answers, scores)
    if plan["teacher_forced"] is not None:
        load = partial(load_collection, wanted.collection, wanted.dtype, wanted.base)
        forced.fill(plan["teacher_forced"], run.benchmarks, Store(wanted.out / "forced.jsonl"), load)
    if run.judge is not None:
        judging.judge_all(run.judge, run.contests(answers), Store(wanted.out / "verdicts.jsonl"))
    return plan


class _Run:
    """What one call asks for: its systems, and the keys of everything that they answer.

    Attributes:
        names: the systems of the table, in its order.
        systems: those of them that the engine runs, by name.
        rewarded: those of them that need a reward model, which is `reward`.
        experts: where there are any of these, each expert alone: what is selected among, and what Collab runs.
        runs: what the engine has to answer with.
        few: the benchmarks with the items that Collab answers.
        missing: what is left out, and why.
        identities: what answers depend on, by system; sequence selection has none of its own.
        cells: by system and benchmark.
    """

    def __init__(self, wanted: Evaluation) -> None:
        self.wanted = wanted
        self.config = collections.read_config(wanted.collection)
        asked = parse(wanted.systems, self.config, wanted.variants)
        if wanted.collab.reference is not None:
            self.config.expert_index(wanted.collab.reference)
        self.benchmarks = [
            load_task(name, wanted.data, limit=wanted.limit, held_out=wanted.held_out) for name in wanted.tasks
        ]
        if not set(CODE).isdisjoint(wanted.tasks):
            require_isolation(wanted.unsafe)
        sources = Sources(
            wanted.collection,
            wanted.out / "models",
            sft=wanted.sft,
            finetuned=wanted.finetuned,
            base=wanted.base,
            variants=wanted.variants,
        )
        self.missing: dict[str, str] = {}
        self.systems = self._found(asked, sources)
        self.names = [name for name in asked if name not in self.missing]
        self.rewarded = [name for name in self.names if name in REWARDED]
        self.reward = RewardModel(_reward_source(wanted, self.rewarded[0])) if self.rewarded else None
        self.judge, self.against = _judging(wanted, self.names, self.missing, self.reward)
        self.experts = [find(f"expert:{name}", sources) for name in self.config.expert_names] if self.rewarded else []
        known = {**self.systems, **{system.name: system for system in self.experts}}
        # The experts' answers are those of `expert:NAME`, whether the table shows these or not; Collab needs none.
        self.runs = known if SELECTION in self.rewarded else self.systems
        self.few = [replace(task, items=task.items[: wanted.collab_limit]) for task in self.benchmarks]
        self.identities = {
            name: system.identity(collections.read_config(system.folder), wanted.base) for name, system in known.items()
        }
        self.cells = {
            name: {task.name: _cell(identity, task, wanted) for task in self.benchmarks}
            for name, identity in self.identities.items()
        }
        if self.reward is not None:
            self._add_rewarded(self.reward)

    def _found(self, names: Sequence[str], sources: Sources) -> dict[str, System]:
        """The systems of these names that the engine runs; those that cannot run go to `missing`, or are refused."""
        named = {name for entry in self.wanted.systems for name in entry.split(",")}
        found: dict[str, System] = {}
        for name in names:
            try:
                if name in REWARDED:
                    _reward_source(self.wanted, name)
                else:
                    found[name] = find(name, sources)
            except FusionRouteError as error:
                # Of what `all` means, a collection need not have everything, and not all experts can be merged.
                if name in named or not (isinstance(error, NotGivenError) or name.startswith("merge:")):
                    raise
                self.missing[name] = str(error)
        return found

    def _add_rewarded(self, reward: RewardModel) -> None:
        """Identities and cells of the systems that the reward model decides for."""
        alone = [self.identities[system.name] for system in self.experts]
        self.identities[COLLAB] = {"experts": alone, "settings": asdict(self.wanted.collab), "reward": reward.digest}
        self.cells[COLLAB] = {task.name: _cell(self.identities[COLLAB], task, self.wanted) for task in self.few}
        self.cells[SELECTION] = {
            task.name: _selected(task, [self.cells[system.name][task.name] for system in self.experts], reward)
            for task in self.benchmarks
        }

    def plan(self) -> dict[str, Any]:
        """What is asked for, as JSON knows it: all that a report needs beside the stores."""
        wanted, reward = self.wanted, self.reward
        packaged = wanted.collection.parent == collections.PACKAGED
        judge = self.judge and judging.describe(self.judge, self.against)
        return {
            "collection": wanted.collection.name if packaged else str(wanted.collection),
            "limit": wanted.limit,
            "held_out": wanted.held_out,
            "dtype": wanted.dtype,
            "base": wanted.base,
            "batch": wanted.batch,
            "reward": None
            if reward is None
            else {
                "source": shown(reward.source, wanted.collection),
                "systems": self.rewarded,
                "accuracy": reward.accuracy,
                "held_out": None if reward.accuracy is None else describe(reward.accuracy),
            },
            "collab": {**asdict(wanted.collab), "rows": COLLAB_ROWS, "limit": wanted.collab_limit}
            if COLLAB in self.rewarded
            else None,
            "judge": judge and judge | {"name": shown(judge["name"], wanted.collection)},
            "experts": self.config.expert_names,
            "tasks": {
                task.name: {
                    "settings": task.settings(),
                    "primary": task.primary,
                    "items": [item.id for item in task.items],
                    "defects": {item.id: item.defect for item in task.items if item.defect},
                }
                for task in self.benchmarks
            },
            "systems": {
                name: {
                    "identity": self.identities.get(name),
                    "routed": name in self.systems and self.systems[name].routed,
                    "tasks": {task: asdict(cell) for task, cell in self.cells[name].items()},
                }
                for name in self.names
            },
            "not_run": self.missing,
            "teacher_forced": forced.plan(self.benchmarks, self.identities[OURS], self.config.alpha, wanted.dtype)
            if OURS in self.systems
            else None,
        }

    def answer(self, answers: Store) -> None:
        """Have everything answered that has no answer yet; what failed is tried again."""
        wanted, cells = self.wanted, self.cells
        todo = {name: self._lacking(name, self.benchmarks, answers) for name in self.runs}
        twins = _twins(self.runs, cells, self.config.expert_names)
        answer_all(self.runs, todo, answers, batch=wanted.batch, dtype=wanted.dtype, base=wanted.base, twins=twins)
        if self.reward is not None and SELECTION in self.rewarded:
            choices = _choices(self.benchmarks, cells[SELECTION], [cells[system.name] for system in self.experts])
            select_all(self.config.expert_names, choices, answers, self.reward)
        if self.reward is not None and COLLAB in self.rewarded:
            collab_all(
                self._lacking(COLLAB, self.few, answers),
                answers,
                self.reward,
                wanted.collab,
                collection=wanted.collection,
                dtype=wanted.dtype,
                base=wanted.base,
            )

    def _lacking(self, name: str, tasks: Sequence[Benchmark], answers: Store) -> dict[str, Item]:
        """The items of all benchmarks that a system has no answer to, by key."""
        found = (lacking(self.cells[name][task.name].answers, task.items, answers) for task in tasks)
        return {key: item for each in found for key, item in each.items()}

    def score(self, answers: Store, scores: Store) -> None:
        """Score the answers that have no score yet; one that could not be scored is tried again."""
        for name in self.names:
            for task in self.few if name == COLLAB else self.benchmarks:
                cell = self.cells[name][task.name]
                for item, answer_key, score_key in zip(task.items, cell.answers, cell.scores, strict=True):
                    if answer_key is None or score_key is None:
                        continue
                    row, known = stored(answers, answer_key), scores.get(score_key)
                    if row is None or (known is not None and known["unscored"] is None):
                        continue
                    found = task.score(item, row["text"], unsafe=self.wanted.unsafe)
                    try:
                        scores.put(score_key, asdict(found))
                    except FusionRouteError as error:
                        print(f"{name}, {task.name} {item.id}: {error}", file=sys.stderr)

    def contests(self, answers: Store) -> list[judging.Contest]:
        """Every other system's answers to the general prompts against those of the system compared with."""
        theirs = self.cells[self.against][judging.TASK].answers
        found = (
            judging.contest_of(*(None if key is None else answers.get(key) for key in keys))
            for name in self.names
            if name != self.against
            for keys in zip(self.cells[name][judging.TASK].answers, theirs, strict=False)  # Collab has fewer items
        )
        return [contest for contest in found if contest is not None]


def _judging(
    wanted: Evaluation, names: Sequence[str], missing: dict[str, str], reward: RewardModel | None
) -> tuple[judging.Judge | None, str]:
    """The judge and the system that the others are compared with; no judge if there is nothing to judge."""
    if judging.TASK not in wanted.tasks:
        return None, ""
    against = wanted.against or next((name for name in (FINETUNED, OURS) if name in names), "")
    if wanted.against and against not in names:
        reason = missing.get(against, "it is not among the systems of this run: add it to --system")
        raise UsageError(f"--against {against}: {reason}")
    if against == COLLAB:
        raise UsageError(f"--against {COLLAB}: it answers the first {wanted.collab_limit} items alone; name another")
    try:
        source = reward_source(wanted.collection, wanted.base, wanted.judge, name="judge")
    except UsageError as error:
        missing[WIN_RATES] = str(error)
        return None, against
    if source is None:
        missing[WIN_RATES] = "they need a judge: give --judge SOURCE[+ADAPTER], a reward model, or --judge URL#MODEL"
    elif not against:
        missing[WIN_RATES] = "they need a system to compare with: name one of --system with --against"
    else:
        return judging.load(source, reward), against
    return None, against


def _reward_source(wanted: Evaluation, system: str) -> str:
    source = reward_source(wanted.collection, wanted.base, wanted.reward)
    if source is None:
        raise NotGivenError(f"{system} needs a reward model: give --reward SOURCE[+ADAPTER]")
    return source


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


def _twins(
    systems: Mapping[str, System], cells: Mapping[str, Mapping[str, Cell]], experts: Sequence[str]
) -> dict[str, dict[str, dict[str, str]]]:
    """Of each system that decides once per prompt, of each of its keys, by expert the key of that expert's answer."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, system in systems.items():
        kind = "expert" if system.policy.get("alpha") == 0 else "fixed"
        beside = {expert: cells.get(f"{kind}:{expert}") for expert in experts}
        if system.policy.get("routing") != "query" or None in beside.values():
            continue
        found[name] = {
            key: {expert: str(mine[task].answers[place]) for expert, mine in beside.items() if mine is not None}
            for task, cell in cells[name].items()
            for place, key in enumerate(cell.answers)
            if key is not None
        }
    return found


def _selected(task: Benchmark, experts: Sequence[Cell], reward: RewardModel) -> Cell:
    """The keys of what sequence selection picks among the experts' answers."""
    candidates = zip(*(cell.answers for cell in experts), strict=True)
    return _keys(task, [None if None in keys else key_of(SELECTION, keys, reward.digest) for keys in candidates])


def _choices(
    benchmarks: Sequence[Benchmark], picked: dict[str, Cell], experts: Sequence[dict[str, Cell]]
) -> Iterator[tuple[str, Item, list[str]]]:
    """Of each item that sequence selection answers: its key, the item, and the keys of the experts' answers."""
    for task in benchmarks:
        columns = zip(*(cells[task.name].answers for cells in experts), strict=True)
        for key, item, candidates in zip(picked[task.name].answers, task.items, columns, strict=True):
            if key is not None:
                yield key, item, [str(candidate) for candidate in candidates]
