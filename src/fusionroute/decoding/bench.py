"""What decoding costs: every mode with every drafter, against transformers' `generate` of one expert alone.

    fusionroute bench decode [--quick] [--json] [--plot out.png]

One process, the variants taking turns; figures are ratios of tokens per second within a round, medians over rounds.
Decoding is timed apart from first visits (a member's prefill of a row). Answers that end in a loop are counted and
measured apart: they flatter prompt lookup. Never a test: a busy machine makes it lie.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch

from fusionroute.collection import encode_chat
from fusionroute.decoding.bench_checks import agreement, bandwidth, step_times, weights_in_memory
from fusionroute.decoding.bench_report import table
from fusionroute.decoding.bench_turns import Turn, Yardstick, loops, run
from fusionroute.decoding.drafting import PromptLookup, RouterDraft
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.members import Members
from fusionroute.decoding.rows import Request

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM

PROMPTS = {
    "math": (
        "A baker makes 24 rolls an hour and works 6 hours. She sells 100 rolls. How many rolls are left?",
        "Tom has 3 boxes with 15 pencils each. He gives 12 pencils to his sister. How many pencils has he now?",
        "A train goes 80 km in one hour. How far does it go in 3 hours and a half?",
        "A shirt costs $20 and is sold 25% cheaper. How much do two shirts cost?",
        "Anna reads 14 pages a day. Her book has 196 pages. How many weeks does she need?",
        "There are 45 children in 3 buses, and 4 more get on each bus. How many children are there in all?",
        "A garden is 12 m long and 7 m wide. A fence costs $5 a meter. How much is the fence around it?",
        "Sam earns $9 an hour. He works 5 hours on each of 4 days and spends $60. How much has he left?",
    ),
    "code": (
        "Write a Python function that returns the largest number of a list.",
        "Write a Python function that counts the vowels of a string.",
        "Write a Python function that checks whether a number is prime.",
        "Write a Python function that reverses the words of a sentence.",
        "Write a Python function that merges two sorted lists.",
        "Write a Python function that removes duplicates from a list and keeps the order.",
        "Write a Python function that computes the factorial of n.",
        "Write a Python function that tells whether two strings are anagrams.",
    ),
    "general": (
        "Explain in three sentences why the sky is blue.",
        "Write a short letter that invites a friend to a birthday party.",
        "What should I pack for a week in the mountains?",
        "Give me three tips for learning a new language.",
        "Describe how bread is made to somebody who has never seen it.",
        "Rewrite politely: send me the report now.",
        "Name two advantages and two drawbacks of working at home.",
        "Tell a short story about a lighthouse and a lost boat.",
    ),
}
DRAFTERS: dict[str | None, Callable[[], Any]] = {
    None: lambda: None,
    "prompt-lookup": PromptLookup,
    "router": RouterDraft,
}
# mode: (engine mode, separate weights, drafters that make sense)
MODES: dict[str, tuple[Any, bool, tuple[str | None, ...]]] = {
    "single": ("lazy", True, (None, "prompt-lookup")),
    "all-members": ("all", True, (None,)),
    "separate-lazy": ("lazy", True, (None, "prompt-lookup", "router")),
    "adapter-rows": ("all", False, (None, "prompt-lookup", "router")),
    "adapter-rows-predicted": ("predicted", False, (None, "prompt-lookup", "router")),
    "auto": ("auto", False, (None,)),
}
YARDSTICK = "transformers generate"
WARM_UP = 8  # tokens


class Bench:
    """All variants on one collection."""

    def __init__(self, model: "FusionRouteForCausalLM", tokenizer: Any, expert: str | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.expert = expert or model.config.expert_names[-1]
        self.yardstick = Yardstick(model, self.expert)
        self.engines: dict[tuple[str, str | None], Engine] = {}
        self.members: dict[bool, Members] = {}

    def prompts(self) -> list[list[int]]:
        """Prompts of the three domains in turn, as ids."""
        texts = [text for group in zip(*PROMPTS.values(), strict=True) for text in group]
        return [list(encode_chat(self.tokenizer, [{"role": "user", "content": text}])) for text in texts]

    def engine(self, mode: str, drafter: str | None) -> Engine:
        key = (mode, drafter)
        if key not in self.engines:
            how, separate, _ = MODES[mode]
            if separate not in self.members:
                self.members[separate] = Members(self.model, separate=separate)
            self.engines[key] = Engine(
                self.model, mode=how, members=self.members[separate], drafter=DRAFTERS[drafter]()
            )
        return self.engines[key]

    def turn(self, mode: str, drafter: str | None, prompts: Sequence[Sequence[int]], new: int) -> Turn:
        if mode == YARDSTICK:
            return self.yardstick(prompts, new)
        policy: dict[str, Any] = {"expert": self.expert, "alpha": 0.0} if mode == "single" else {}
        return run(self.engine(mode, drafter), [Request(prompt, new, **policy) for prompt in prompts])

    def variants(self) -> list[tuple[str, str | None]]:
        return [(YARDSTICK, None), *((mode, d) for mode, (_, _, drafters) in MODES.items() for d in drafters)]

    def split(self, new: int) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts whose fused answer ends and those whose answer loops."""
        prompts = self.prompts()
        marks = [loops(answer) for answer in self.turn("adapter-rows", None, prompts, new).answers]
        good = [p for p, mark in zip(prompts, marks, strict=True) if not mark]
        return good, [p for p, mark in zip(prompts, marks, strict=True) if mark]

    def measure(
        self,
        batch: int,
        prompts: Sequence[Sequence[int]],
        new: int,
        rounds: int,
        note: Callable[[str], None],
        least: int = 3,
    ) -> list[dict[str, Any]]:
        """Every variant on the same prompts in a round, on others in the next; `batch` at a time, at least `least`."""
        variants = self.variants()
        turns: dict[tuple[str, str | None], list[Turn]] = {variant: [] for variant in variants}
        count = max(batch, min(least, len(prompts)))
        started = time.perf_counter()
        for number in range(rounds):
            mine = [prompts[(number * count + i) % len(prompts)] for i in range(count)]
            # There and back: what drifts in the course of a round falls on no variant alone.
            for place, variant in enumerate(variants[:: -1 if number % 2 else 1]):
                done = number * len(variants) + place
                left = (time.perf_counter() - started) / max(done, 1) * (rounds * len(variants) - done)
                name = " + ".join(filter(None, variant))
                note(f"batch {batch}: {done}/{rounds * len(variants)}  {name}  {left / 60:.0f} min left")
                if not number:
                    self.turn(*variant, mine[:batch], WARM_UP)
                parts = [self.turn(*variant, mine[i : i + batch], new) for i in range(0, count, batch)]
                turns[variant].append(sum(parts, Turn()))
        return [self._row(variant, batch, turns) for variant in variants]

    def _row(
        self, variant: tuple[str, str | None], batch: int, turns: dict[tuple[str, str | None], list[Turn]]
    ) -> dict[str, Any]:
        mine = turns[variant]
        ratios = [a.speed / b.speed for a, b in zip(mine, turns[YARDSTICK, None], strict=True)]
        drafting = [a.speed / b.speed for a, b in zip(mine, turns[variant[0], None], strict=True)]
        whole = sum(mine, Turn())
        switches = [a != b for route in whole.routes for a, b in pairwise(route)]
        runs = [len(list(group)) for route in whole.routes for _, group in groupby(route)]
        return {
            "mode": variant[0],
            "drafter": variant[1],
            "batch": batch,
            "tokens_per_second": statistics.median(turn.speed for turn in mine),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "drafting": statistics.median(drafting) if variant[1] else None,  # ratio to the mode without a drafter
            "drafting_range": [min(drafting), max(drafting)] if variant[1] else None,
            "gigabytes_per_second": whole.bytes_read / whole.seconds / 1e9,
            "tokens_per_step": whole.tokens / max(whole.steps, 1),
            "switch_rate": sum(switches) / max(len(switches), 1),
            "route_run_length": sum(runs) / max(len(runs), 1),
            "catch_up_share": whole.caught_up / max(whole.run, 1),
            "prefill_seconds": whole.prefill_seconds / len(mine),
            "kv_megabytes": whole.kv_bytes / 1e6,
            "peak_megabytes": (self._weights(variant) + whole.kv_bytes) / 1e6,
            "answers": len(whole.answers),
            "looping": sum(loops(answer) for answer in whole.answers),
        }

    def _weights(self, variant: tuple[str, str | None]) -> int:
        """Bytes of weights in memory when nothing but this variant runs."""
        if variant[0] == YARDSTICK:
            return sum(p.nbytes for p in self.yardstick.model.parameters())
        return weights_in_memory(self.model, self.engine(*variant).members)


def measure_collection(name: str | None, *, quick: bool, batches: Sequence[int] = (), **loading: Any) -> dict[str, Any]:
    """`decode` on a collection by name, telling on standard error where it is; `loading` as in `chat.Session`."""
    import sys

    from fusionroute import collection
    from fusionroute.modeling import FusionRouteForCausalLM
    from fusionroute.progress import quiet

    folder = collection.locate(name)
    with quiet():
        model = FusionRouteForCausalLM.from_pretrained(folder, **loading)
        tokenizer = collection.load_tokenizer(folder, base=loading.get("base"))
    note = partial(print, file=sys.stderr, flush=True)
    return decode(model, tokenizer, quick=quick, batches=batches, note=note)


def decode(
    model: "FusionRouteForCausalLM",
    tokenizer: Any,
    *,
    quick: bool,
    batches: Sequence[int] = (),
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmark and return its document.

    Args:
        batches: rows decoded together; by default 1, 8 and 16, or 1 if quick.

    Returns:
        `conditions`; `results`, a row for each variant and batch; and unless quick: `looping`, such rows over the
        answers that loop; `agreement` with the reference model; `step_milliseconds` against length.
    """
    import transformers

    load = os.getloadavg()[0]
    bench, rounds = Bench(model, tokenizer), 2 if quick else 5
    # A batch takes as long per token as it has rows, so its answers are shorter.
    tokens = 24 if quick else 128
    plan = {
        batch: tokens if batch == 1 else max(tokens // 4, 16) for batch in batches or ((1,) if quick else (1, 8, 16))
    }
    good: list[list[int]] = bench.prompts()
    looping: list[list[int]] = []
    if not quick:
        note("answering once, to tell answers that loop from others")
        good, looping = bench.split(tokens)
    results = []
    for batch, new in plan.items():
        rows = bench.measure(batch, good or looping, new, rounds, note, least=2 if quick else 3)
        note("\n".join(table(rows)))
        results += rows
    document: dict[str, Any] = {
        "conditions": {
            "dtype": str(model.members[0].model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "load_before": load,
            "memory_gigabytes_per_second": bandwidth(model.device),
            "members": [member.name for member in model.members],
            "yardstick": f"{YARDSTICK} of {bench.expert}",
            "new_tokens": {str(batch): new for batch, new in plan.items()},
            "rounds": rounds,
            "prompts": len(good),
            "looping_prompts": len(looping),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }
    if quick:
        return document
    if looping:
        document["looping"] = bench.measure(1, looping[:3], tokens, 1, note)
    note("agreement with the reference model")
    document["agreement"] = [
        {"mode": mode, **agreement(model, bench.engine(mode, None).members, MODES[mode][0], bench.prompts()[:6], 64)}
        for mode in ("separate-lazy", "adapter-rows", "adapter-rows-predicted")
    ]
    note("step time against length")
    document["step_milliseconds"] = step_times(model, bench.engine("separate-lazy", None).members, 1024, 8)
    return document
