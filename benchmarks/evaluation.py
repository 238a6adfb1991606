"""What evaluation costs beside its engine: tokens per second of both on the same prompts.

    python benchmarks/evaluation.py --data DIR [--items 64] [--batch 32] [--rounds 3] [--collection NAME]

`evaluate` answers GSM8K with FusionRoute, model loading and storing included; the engine generates from the same
prompts, as many rows at a time. Ratios within a round; the last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fusionroute import Request, collection, encode_chat
from fusionroute.evaluation.answering import load_engine
from fusionroute.evaluation.benchmarks import Item, load_task
from fusionroute.evaluation.generating import answer_all
from fusionroute.evaluation.names import OURS
from fusionroute.evaluation.store import Store
from fusionroute.evaluation.systems import Sources, find


def engine_speed(folder: Path, items: Sequence[Item], batch: int) -> float:
    """Tokens per second of the engine alone, loaded before."""
    engine, tokenizer = load_engine(folder, None, None)
    engine.max_rows = batch
    requests = [
        Request(encode_chat(tokenizer, [{"role": "user", "content": item.prompt}]), item.max_new_tokens, stop=item.stop)
        for item in items
    ]
    started = time.perf_counter()
    tokens = sum(len(answer.tokens) for answer in engine.generate(requests))
    return tokens / (time.perf_counter() - started)


def evaluation_speed(folder: Path, items: Sequence[Item], batch: int) -> float:
    """Tokens per second of an evaluation, loading and storing included."""
    with tempfile.TemporaryDirectory() as out:
        store = Store(Path(out) / "answers.jsonl")
        systems = {OURS: find(OURS, Sources(folder, Path(out)))}
        todo = {OURS: {item.id: item for item in items}}
        started = time.perf_counter()
        answer_all(systems, todo, store, batch=batch, dtype=None, base=None, twins={})
        return sum(row["tokens"] for row in store.rows.values()) / (time.perf_counter() - started)


SIDES = {"engine": engine_speed, "evaluation": evaluation_speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--collection", default="smollm2")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    before = os.getloadavg()[0]
    folder = collection.locate(given.collection)
    items = load_task("gsm8k", given.data, limit=given.items).items
    ratios, speeds = [], []
    for number in range(given.rounds):
        # By turns the one first and the other; in memory there is one model at a time.
        order = list(SIDES)[:: 1 if number % 2 else -1]
        found = {side: SIDES[side](folder, items, given.batch) for side in order}
        ratios.append(found["evaluation"] / found["engine"])
        speeds.append(found["evaluation"])
        print(f"evaluation {found['evaluation']:.1f} tokens/s, engine {found['engine']:.1f}", flush=True)
    result = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    print(json.dumps({"load_before": before, **result, "tokens_per_second": statistics.median(speeds)}))


if __name__ == "__main__":
    main()
