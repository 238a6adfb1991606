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
from pathlib import Path

from fusionroute import Request, collection, encode_chat
from fusionroute.evaluation.answering import load_engine
from fusionroute.evaluation.benchmarks import load_task
from fusionroute.evaluation.generating import answer_all
from fusionroute.evaluation.names import OURS
from fusionroute.evaluation.store import Store
from fusionroute.evaluation.systems import Sources, find


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
        sides = {}
        for side in ("engine", "evaluation")[:: 1 if number % 2 else -1]:
            if side == "engine":
                engine, tokenizer = load_engine(folder, None, None)
                engine.max_rows = given.batch
                requests = [
                    Request(
                        encode_chat(tokenizer, [{"role": "user", "content": item.prompt}]),
                        item.max_new_tokens,
                        stop=item.stop,
                    )
                    for item in items
                ]
                started = time.perf_counter()
                tokens = sum(len(answer.tokens) for answer in engine.generate(requests))
            else:
                with tempfile.TemporaryDirectory() as out:
                    store = Store(Path(out) / "answers.jsonl")
                    systems = {OURS: find(OURS, Sources(folder, Path(out)))}
                    todo = {OURS: {item.id: item for item in items}}
                    started = time.perf_counter()
                    answer_all(systems, todo, store, batch=given.batch, dtype=None, base=None, twins={})
                    tokens = sum(row["tokens"] for row in store.rows.values())
            sides[side] = tokens / (time.perf_counter() - started)
        ratios.append(sides["evaluation"] / sides["engine"])
        speeds.append(sides["evaluation"])
        print(f"evaluation {sides['evaluation']:.1f} tokens/s, engine {sides['engine']:.1f}", flush=True)
    found = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    print(json.dumps({"load_before": before, **found, "tokens_per_second": statistics.median(speeds)}))


if __name__ == "__main__":
    main()
