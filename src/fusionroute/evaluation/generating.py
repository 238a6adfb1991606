"""Answers that a results folder lacks: from engines, by selection among the experts' answers, from Collab.

Each answer is stored as it ends, so that a kill loses only those under way. Knows no score.
"""

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute import collection as collections
from fusionroute.baselines.collab import Collab, CollabSettings, TextRequest
from fusionroute.baselines.selection import select
from fusionroute.decoding.memory import free_memory
from fusionroute.decoding.rows import Request
from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.answering import Answer, answer, choose, load_engine
from fusionroute.evaluation.benchmarks import Item
from fusionroute.evaluation.names import COLLAB, SELECTION
from fusionroute.evaluation.reward import RewardModel
from fusionroute.evaluation.running_reward import RunningReward
from fusionroute.evaluation.store import Store
from fusionroute.evaluation.systems import System
from fusionroute.progress import Meter

if TYPE_CHECKING:
    from fusionroute.decoding.engine import Engine

# Rows that Collab advances together, memory allowing; each has as many again as it has candidates.
COLLAB_ROWS = 4


def stored(answers: Store, key: str) -> dict[str, Any] | None:
    """The answer under a key; None where there is none, or it failed."""
    row = answers.get(key)
    return None if row is None or row["error"] else row


def lacking(keys: Iterable[str | None], items: Iterable[Item], answers: Store) -> dict[str, Item]:
    """The items without an answer, by key; what failed is tried again."""
    pairs = zip(keys, items, strict=True)
    return {key: item for key, item in pairs if key is not None and stored(answers, key) is None}


def answer_all(
    systems: Mapping[str, System],
    todo: Mapping[str, dict[str, Item]],
    answers: Store,
    *,
    batch: int,
    dtype: str | None,
    base: str | None,
    twins: Mapping[str, Mapping[str, Mapping[str, str]]],
) -> None:
    """Answer the items by key of each system, one system's after another's; a key that two of them have, once.

    Args:
        twins: of a system that decides once per prompt, of each key, by expert the key of that expert's answer with the
            same α. Once the expert is chosen there is no difference, so where these are there, only the choice is made.
    """
    planned: set[str] = set()
    own: dict[str, dict[str, Item]] = {}
    for name, items in todo.items():
        own[name] = {key: item for key, item in items.items() if key not in planned}
        planned |= set(items)
    with Meter("answering", len(planned), "answers") as meter:
        loaded: tuple[Path, Engine, Any] | None = None
        folders = [systems[name].folder for name in own]
        # What shares others' answers comes after them; what shares a folder stays together, so that it is loaded once.
        for name in sorted(own, key=lambda name: (folders.index(systems[name].folder), name in twins)):
            items = own[name]
            if not items:
                continue
            system = systems[name]
            if loaded is None or loaded[0] != system.folder:
                loaded = engine = None  # before the next, so that there is one at a time in memory
                loaded = (system.folder, *load_engine(system.folder, dtype, base))
            _, engine, tokenizer = loaded
            meter.title = name
            if engine.prefixes is not None:
                engine.prefixes.shrink(0)  # no system is faster for another's having read the prompts
            if name in twins:
                items = _share(engine, tokenizer, system, items, twins[name], answers, batch, meter)
            requests = [
                (key, Request(_encode(tokenizer, item), item.max_new_tokens, stop=item.stop, **system.policy))
                for key, item in items.items()
            ]
            _keep(name, items, answer(engine, requests, batch), answers, meter)


def _share(
    engine: "Engine",
    tokenizer: Any,
    system: System,
    items: Mapping[str, Item],
    twins: Mapping[str, Mapping[str, str]],
    answers: Store,
    batch: int,
    meter: Meter,
) -> dict[str, Item]:
    """Store the chosen expert's answer where every expert's is known; the items that are left."""
    known = {key: {expert: stored(answers, twin) for expert, twin in twins[key].items()} for key in items}
    shared = [key for key, rows in known.items() if None not in rows.values()]
    done = set(shared)
    for first in range(0, len(shared), batch):
        keys = shared[first : first + batch]
        started = time.perf_counter()
        experts = choose(engine, [_encode(tokenizer, items[key]) for key in keys])
        seconds = (time.perf_counter() - started) / len(keys)
        for key, expert in zip(keys, experts, strict=True):
            row = {**(known[key][expert] or {}), "system": system.name}
            if system.policy.get("alpha") == 0:  # else the router's pass over the prompt is in the answer's own cost
                row["seconds"] += seconds
                row["passes"] += 1
            _put(key, row, answers)
            meter.advance(1)
    return {key: item for key, item in items.items() if key not in done}


def collab_all(
    items: dict[str, Item],
    answers: Store,
    reward: RewardModel,
    settings: CollabSettings,
    *,
    collection: Path,
    dtype: str | None,
    base: str | None,
) -> None:
    """Answer the items by key with Collab."""
    if not items:
        return
    engine, tokenizer = load_engine(collection, dtype, base)
    collab = Collab(engine.model, tokenizer, RunningReward(reward), settings, members=engine.members)
    requests = [
        (key, TextRequest(_encode(tokenizer, item), item.max_new_tokens, stop=item.stop, text=item.prompt))
        for key, item in items.items()
    ]
    with Meter(COLLAB, len(items), "answers") as meter:
        longest = max(len(request.prompt) + request.max_new_tokens for _, request in requests)
        _keep(COLLAB, items, answer(collab, requests, _collab_rows(collab, longest)), answers, meter)


def _collab_rows(collab: Collab, length: int) -> int:
    """Rows of `length` tokens whose candidates' keys and values fit into half of the free memory; at least one."""
    settings, members = collab.settings, collab.members
    slot = members.nbytes([length + settings.rollout + 1]) / len(members.of)
    row = slot * len(collab.names) * (1 + settings.candidates * (2 if settings.alpha else 1))
    return max(1, min(COLLAB_ROWS, int(free_memory(collab.device) / 2 // row)))


def select_all(
    experts: Sequence[str],
    places: Iterable[tuple[str, Item, Sequence[str]]],
    answers: Store,
    reward: RewardModel,
) -> None:
    """Pick among the experts' answers where that has not been done.

    Args:
        experts: their names.
        places: of each item: the key of what is picked, the item, and the keys of the experts' answers.
    """
    for key, item, candidates in places:
        if stored(answers, key) is not None:
            continue
        found = [row for row in (stored(answers, each) for each in candidates) if row is not None]
        if len(found) < len(experts):
            continue
        started = time.perf_counter()
        rewards = reward.score([(item.prompt, row["text"]) for row in found])
        if not all(map(math.isfinite, rewards)):
            failed = Answer(error=f"the reward model's scores are {rewards}")
            _put(key, {"system": SELECTION, "item": item.id, "prompt": item.prompt, **failed.to_dict()}, answers)
            continue
        row = select(list(zip(experts, found, strict=True)), rewards)
        row["seconds"] += time.perf_counter() - started
        _put(key, {**row, "system": SELECTION}, answers)


def _keep(
    name: str, items: Mapping[str, Item], found: Iterable[tuple[str, Answer]], answers: Store, meter: Meter
) -> None:
    for key, each in found:
        item = items[key]
        _put(key, {"system": name, "item": item.id, "prompt": item.prompt, **each.to_dict()}, answers)
        meter.advance(1)


def _put(key: str, row: dict[str, Any], answers: Store) -> None:
    try:
        answers.put(key, row)
    except FusionRouteError as error:
        print(f"{row['system']}, item {row['item']}: {error}", file=sys.stderr)


def _encode(tokenizer: Any, item: Item) -> list[int]:
    return collections.encode_chat(tokenizer, [{"role": "user", "content": item.prompt}])
