"""What router training costs beside plain training: annotation, an SFT step, a CDPO step, memory against n experts.

    python benchmarks/training.py [--base SOURCE] [--steps N]

Ratios of medians within one run on an idle machine, the variants taking turns. The last line is one JSON document.
Never a test: a busy machine makes it lie.
"""

import argparse
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "farmer",
    "has",
    "some",
    "cows",
    "and",
    "buys",
    "three",
    "more",
    "so",
    "how",
    "many",
    "does",
    "he",
    "own",
]


def chat_rows(count: int, seed: int) -> list[dict]:
    """Rows of about 90 prompt and 110 answer tokens, as GSM8K's are under the default chat template."""
    generator = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(length))

    rows = []
    for _ in range(count):
        asked = [{"role": "user", "content": text(generator.randint(40, 80))}]
        chosen, rejected = (
            [{"role": "assistant", "content": text(generator.randint(70, 150))}],
            [{"role": "assistant", "content": text(generator.randint(70, 150))}],
        )
        rows.append(
            {"messages": asked + chosen, "prompt": asked, "chosen": chosen, "rejected": rejected, "domain": "x"}
        )
    return rows


class Clock:
    """Seconds of each optimizer step, as a Trainer callback."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        seconds: list[float] = []

        class Callback(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.started = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds.append(time.perf_counter() - self.started)

        self.callback, self.seconds = Callback(), seconds


def items_of(tokenizer: Any, rows: list[dict], experts: int, *, pairs: bool) -> list:
    """Rows as annotated items with random annotations (their values do not change the cost)."""
    import torch

    from fusionroute.training.data import Item, tokenize_rows

    kept = [
        {
            k: v
            for k, v in row.items()
            if k in (("prompt", "chosen", "rejected") if pairs else ("messages",)) or k == "domain"
        }
        for row in rows
    ]
    items, _ = tokenize_rows(tokenizer, kept, context=8192)
    torch.manual_seed(0)

    def column(count: int) -> dict:
        return {
            "logprobs": -torch.rand(count, experts) * 4,
            "greedy": torch.randint(0, 100, (count, experts), dtype=torch.int32),
            "reference": -torch.rand(count) * 4,
            "routes": torch.randint(0, experts, (count,), dtype=torch.int32),
        }

    return [Item(i.sequences, i.domain, tuple(column(len(s.completion)) for s in i.sequences)) for i in items]


def lora_model(folder: Path) -> Any:
    import torch
    from peft import get_peft_model

    from fusionroute.members import LoadOptions, load_model
    from fusionroute.training.lora import LoraSettings, lora_config

    model = load_model(folder, LoadOptions(dtype=torch.bfloat16))
    torch.manual_seed(0)
    return get_peft_model(model, lora_config(LoraSettings(r=16, alpha=32)))


def arguments(kind: type, run: Path, steps: int, batch: int, **more: Any) -> Any:
    from fusionroute.training.running import make_arguments

    given = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-5,
        "bf16": True,
        "logging_steps": 1000,
        "save_strategy": "no",
        "seed": 0,
    }
    return make_arguments(kind, run, given | more)


def router_steps(folder: Path, items: list, experts: int, run: Path, steps: int, batch: int) -> list[float]:
    """Seconds per step of `RouterTrainer`."""
    from fusionroute.router import RouteHead, head_width
    from fusionroute.training.trainer import RouterArguments, RouterForTraining, RouterTrainer

    lm = lora_model(folder)
    base = lm.get_base_model()
    head = RouteHead(head_width(base), [f"e{i}" for i in range(experts)])
    clock = Clock()
    trainer = RouterTrainer(
        RouterForTraining(lm, head, base.config.vocab_size),
        arguments(RouterArguments, run, steps, batch, train_sampling_strategy="sequential"),
        items,
        callbacks=[clock.callback],
    )
    trainer.train()
    return clock.seconds


def plain_sft_steps(folder: Path, items: list, run: Path, steps: int, batch: int) -> list[float]:
    """Seconds per step of transformers' Trainer on the same tokens, loss on the completions."""
    import torch
    from transformers import Trainer, TrainingArguments

    def collate(batch_items: list) -> dict:
        sequences = [item.sequences[0] for item in batch_items]
        width = max(len(s.ids) for s in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, s in enumerate(sequences):
            ids[row, : len(s.ids)] = torch.tensor(s.ids)
            mask[row, : len(s.ids)] = 1
            labels[row, s.start : len(s.ids)] = torch.tensor(s.completion)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    clock = Clock()
    trainer = Trainer(
        lora_model(folder),
        arguments(
            TrainingArguments, run, steps, batch, train_sampling_strategy="sequential", remove_unused_columns=False
        ),
        data_collator=collate,
        train_dataset=items,  # type: ignore[arg-type]
        callbacks=[clock.callback],
    )
    trainer.train()
    return clock.seconds


def plain_dpo_steps(folder: Path, tokenizer: Any, rows: list[dict], run: Path, steps: int, batch: int) -> list[float]:
    """Seconds per step of trl's DPOTrainer on the same pairs, reference log-probabilities precomputed."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    data = datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])
    clock = Clock()
    trainer = DPOTrainer(
        lora_model(folder),
        args=arguments(
            DPOConfig,
            run,
            steps,
            batch,
            precompute_ref_log_probs=True,
            max_length=None,
            train_sampling_strategy="sequential",
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[clock.callback],
    )
    trainer.train()
    return clock.seconds


def annotation_seconds(folder: Path, sequences: list, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds for annotating, and for a bare forward with the LM head over the same batches and chunks."""
    import torch

    from fusionroute.lm_head import Head, hidden_states
    from fusionroute.members import LoadOptions, Member, load_model
    from fusionroute.training.annotation import annotate_batch, batches, pad_batch
    from fusionroute.training.logprobs import CHUNK

    model = load_model(folder, LoadOptions(dtype=torch.bfloat16))
    member, head = Member("x", model), Head(model)
    groups = [[sequences[i] for i in group] for group in batches(sequences, range(len(sequences)))]

    @torch.no_grad()
    def bare() -> None:
        for group in groups:
            inputs, positions, _ = pad_batch(group, "cpu")
            hidden = hidden_states(model, **inputs).flatten(0, 1)[positions]
            for start in range(0, len(hidden), CHUNK):
                head(hidden[start : start + CHUNK])

    def annotate() -> None:
        for group in groups:
            annotate_batch(member, head, group)

    ours, theirs = [], []
    for work in (bare, annotate):
        work()
    for _ in range(rounds):
        for work, seconds in ((annotate, ours), (bare, theirs)):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return ours, theirs


def peak_resident() -> float:
    """Peak resident memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts the parent, as it was when it started this process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 1024  # type: ignore[union-attr]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def peak_memory(base: str, experts: int) -> float:
    """Peak resident memory in MB of a fresh process that trains a few router steps beside `experts` experts."""
    command = [sys.executable, __file__, "--base", base, "--memory-of", str(experts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None, help="source of the model; the default base if not given")
    parser.add_argument(
        "--steps", type=int, default=8, help="timed steps per turn, after two that warm caches and allocators"
    )
    parser.add_argument("--turns", type=int, default=2, help="how often the variants take turns")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch
    import transformers

    from fusionroute import sources
    from fusionroute.progress import quiet
    from fusionroute.training.annotation import sequences_of

    base = options.base or sources.DEFAULT_BASE
    folder = sources.resolve(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    steps, batch = options.steps + 2, options.batch
    rows = chat_rows(steps * batch, 0)
    with quiet(data=True), tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch)
        if options.memory_of:
            items = items_of(tokenizer, rows[: 3 * batch], options.memory_of, pairs=False)
            router_steps(folder, items, options.memory_of, run, 3, batch)
            print(json.dumps({"peak_mb": peak_resident()}))
            return
        load = os.getloadavg()[0]
        chat, pairs = (items_of(tokenizer, rows, 3, pairs=p) for p in (False, True))
        seconds: dict[str, list[float]] = {k: [] for k in ("router sft", "plain sft", "router cdpo", "plain dpo")}
        for _ in range(options.turns):
            seconds["router sft"] += router_steps(folder, chat, 3, run, steps, batch)[2:]
            seconds["plain sft"] += plain_sft_steps(folder, chat, run, steps, batch)[2:]
            seconds["router cdpo"] += router_steps(folder, pairs, 3, run, steps, batch)[2:]
            seconds["plain dpo"] += plain_dpo_steps(folder, tokenizer, rows, run, steps, batch)[2:]
        ours, theirs = annotation_seconds(folder, sequences_of(chat), rounds=5)
        memory = {n: peak_memory(base, n) for n in (1, 3, 8)}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    annotation = statistics.median(ours) / statistics.median(theirs)
    results = [
        {"what": "annotation / bare forward", "ratio": annotation, "bound": 1.25},
        {
            "what": "router SFT step / plain SFT step",
            "ratio": medians["router sft"] / medians["plain sft"],
            "bound": 1.15,
        },
        {"what": "CDPO step / plain DPO step", "ratio": medians["router cdpo"] / medians["plain dpo"], "bound": 1.15},
        {"what": "peak memory, 8 experts / 1 expert", "ratio": memory[8] / memory[1], "bound": 1.05},
    ]
    for row in results:
        print(f"{row['what']:36} {row['ratio']:.3f}   (at most {row['bound']})")
    conditions = {
        "base": base, "batch": batch, "steps": options.steps * options.turns, "dtype": "bfloat16", "lora_rank": 16,
        "threads": torch.get_num_threads(), "load_before": load, "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(json.dumps({"conditions": conditions, "results": results, "seconds": medians, "peak_mb": memory}))


if __name__ == "__main__":
    main()
