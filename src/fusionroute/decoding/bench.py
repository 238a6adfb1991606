"""What decoding costs: every mode with every drafter, against transformers' `generate` of one expert alone.

    fusionroute bench decode [--quick] [--json] [--plot out.png]

One process, the variants taking turns; figures are ratios of tokens per second within a round, medians over rounds.
Decoding is timed apart from first visits (a member's prefill of a row). Answers that end in a loop are counted and
left out: they flatter prompt lookup. Never a test: a busy machine makes it lie.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch

from fusionroute.collection import encode_chat
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
    "single": ("lazy", False, (None, "prompt-lookup")),
    "all-members": ("all", True, (None,)),
    "separate-lazy": ("lazy", True, (None, "prompt-lookup", "router")),
    "adapter-rows": ("all", False, (None, "prompt-lookup", "router")),
    "adapter-rows-predicted": ("predicted", False, (None, "prompt-lookup", "router")),
    "auto": ("auto", False, (None, "prompt-lookup")),
}
YARDSTICK = "transformers generate"


@dataclass
class Turn:
    """One variant's answers to one set of prompts."""

    tokens: int = 0  # decoded after the first visits
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    answers: list[list[int]] = field(default_factory=list)
    routes: list[list[str]] = field(default_factory=list)
    drafted: int = 0  # tokens that came from drafts
    drafted_steps: int = 0
    steps: int = 0  # of rows
    bytes_read: int = 0
    caught_up: int = 0
    run: int = 0
    kv_bytes: int = 0


def loops(ids: Sequence[int]) -> bool:
    """Whether the text ends in a loop: some period three times in a row, over at least 24 tokens."""
    for period in range(1, len(ids) // 3 + 1):
        times = max(3, -(-24 // period))
        if period * times <= len(ids):
            tail = ids[len(ids) - period * times :]
            if all(tail[i] == tail[i + period] for i in range(len(tail) - period)):
                return True
    return False


class Yardstick:
    """transformers' `generate` of one expert, its adapter merged; same dtype, threads and attention."""

    def __init__(self, model: "FusionRouteForCausalLM", expert: str) -> None:
        from peft import PeftModel

        from fusionroute.members import LoadOptions, load_model

        member = model.experts[model.config.expert_index(expert)]
        assert member.folder is not None
        options = LoadOptions(dtype=member.model.dtype, attn_implementation=member.config._attn_implementation)
        alone: Any = load_model(member.folder, options)
        if member.adapter_folder is not None:
            alone = PeftModel.from_pretrained(alone, str(member.adapter_folder)).merge_and_unload()
        self.model, self.config = alone.eval(), model.generation_config

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], new: int) -> Turn:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        ends = self.config.eos_token_id
        times: list[float] = []

        def clock(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        started = time.perf_counter()
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0,
            stopping_criteria=[clock],
        )  # fmt: skip
        stops = set(ends if isinstance(ends, list) else [ends])
        turn = Turn(seconds=times[-1] - times[0], prefill_seconds=times[0] - started)
        for row in out[:, width:].tolist():
            length = next((i for i, token in enumerate(row) if token in stops), len(row))
            turn.answers.append(row[:length])
            # The end token was decoded too; the first one came with the prefill.
            turn.tokens += min(length + 1, len(row)) - 1
        turn.steps = turn.tokens
        turn.bytes_read = (len(times) - 1) * sum(p.nbytes for p in self.model.parameters())
        return turn


def run(engine: Engine, requests: Sequence[Request]) -> Turn:
    """Drain the engine of `requests`, timing the steps with a first visit apart."""
    turn = Turn()
    numbers = [engine.submit(request) for request in requests]
    answers: dict[int, list[Any]] = {number: [] for number in numbers}
    members = engine.members
    before_run = sum(members.tokens)
    emitted = 0
    while engine.waiting or engine.active:
        visits, passes = members.visits, list(members.passes)
        started = time.perf_counter()
        events = engine.step()
        seconds = time.perf_counter() - started
        tokens = sum(len(event.tokens) + (event.finish == "stop") for event in events)
        emitted += tokens
        turn.kv_bytes = max(turn.kv_bytes, members.allocated)
        if members.visits > visits:
            turn.prefill_seconds += seconds
        else:
            turn.seconds += seconds
            turn.tokens += tokens
            turn.steps += len(events)
            read = zip(members.pools, passes, members.passes, strict=True)
            turn.bytes_read += sum(pool.weight_bytes * (after - before) for pool, before, after in read)
        for event in events:
            answers[event.row] += event.tokens
            count = sum(token.drafted for token in event.tokens)
            turn.drafted += count
            turn.drafted_steps += count > 0
    turn.run = sum(members.tokens) - before_run
    for number in numbers:
        turn.answers.append([token.id for token in answers[number]])
        turn.routes.append([token.expert for token in answers[number]])
    return turn


def bandwidth(size: int = 1 << 28) -> float:
    """GB/s of reading memory: the best of some sums over a tensor that no cache holds."""
    data = torch.ones(size // 4)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return size / min(seconds) / 1e9


class Bench:
    """All variants on one collection."""

    def __init__(self, model: "FusionRouteForCausalLM", tokenizer: Any, *, new: int, expert: str | None = None) -> None:
        self.model, self.tokenizer, self.new = model, tokenizer, new
        self.expert = expert or model.config.expert_names[-1]
        self.yardstick = Yardstick(model, self.expert)
        self.engines: dict[tuple[str, str | None], Engine] = {}
        self.members: dict[bool, Members] = {}

    def prompts(self) -> list[list[int]]:
        """Prompts of the three domains in turn, as ids; those whose fused answer loops last."""
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

    def turn(self, mode: str, drafter: str | None, prompts: Sequence[Sequence[int]]) -> Turn:
        if mode == YARDSTICK:
            return self.yardstick(prompts, self.new)
        policy: dict[str, Any] = {"expert": self.expert, "alpha": 0.0} if mode == "single" else {}
        return run(self.engine(mode, drafter), [Request(prompt, self.new, **policy) for prompt in prompts])

    def variants(self) -> list[tuple[str, str | None]]:
        return [(YARDSTICK, None), *((mode, d) for mode, (_, _, drafters) in MODES.items() for d in drafters)]

    def split(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts whose fused answer ends and those whose answer loops."""
        prompts = self.prompts()
        turn = self.turn("adapter-rows-predicted", None, prompts)
        marks = [loops(answer) for answer in turn.answers]
        good = [p for p, mark in zip(prompts, marks, strict=True) if not mark]
        return good, [p for p, mark in zip(prompts, marks, strict=True) if mark]

    def measure(
        self, batch: int, prompts: Sequence[Sequence[int]], rounds: int, note: Callable[[str], None]
    ) -> list[dict[str, Any]]:
        """Every variant on `prompts`, `batch` at a time, in turns."""
        turns: dict[tuple[str, str | None], list[Turn]] = {variant: [] for variant in self.variants()}
        for number in range(rounds + 1):  # the first warms up
            for variant in turns:
                note(f"batch {batch}, round {number}/{rounds}: {variant[0]} {variant[1] or ''}")
                parts = [self.turn(*variant, prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
                if number:
                    turns[variant].append(_sum(parts))
        speeds = {variant: [t.tokens / t.seconds for t in found] for variant, found in turns.items()}
        return [
            self._row(variant, batch, found, speeds[variant], speeds[YARDSTICK, None])
            for variant, found in turns.items()
        ]

    def _row(
        self,
        variant: tuple[str, str | None],
        batch: int,
        turns: Sequence[Turn],
        speeds: Sequence[float],
        yardstick: Sequence[float],
    ) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(speeds, yardstick, strict=True)]
        whole = _sum(turns)
        switches = [a != b for route in whole.routes for a, b in pairwise(route)]
        runs = [len(list(group)) for route in whole.routes for _, group in groupby(route)]
        return {
            "mode": variant[0],
            "drafter": variant[1],
            "batch": batch,
            "tokens_per_second": statistics.median(speeds),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "gigabytes_per_second": whole.bytes_read / whole.seconds / 1e9,
            "tokens_per_step": whole.tokens / max(whole.steps, 1),
            "switch_rate": sum(switches) / max(len(switches), 1),
            "route_run_length": sum(runs) / max(len(runs), 1),
            "prefill_seconds": whole.prefill_seconds / len(turns),
            "kv_megabytes": max(turn.kv_bytes for turn in turns) / 1e6,
            "answers": len(turns[0].answers),
            "looping": sum(loops(answer) for answer in turns[0].answers),
        }


def _sum(turns: Sequence[Turn]) -> Turn:
    total = Turn()
    for turn in turns:
        for name, value in vars(turn).items():
            setattr(total, name, max(total.kv_bytes, value) if name == "kv_bytes" else getattr(total, name) + value)
    return total


def step_times(model: "FusionRouteForCausalLM", members: Members, length: int, bins: int) -> dict[str, list[float]]:
    """Milliseconds of a step against the row's length, lazy mode, for routes that stay and routes that alternate."""
    found = {}
    head = model.router.route_head
    for name, period in (("sticky", 0), ("alternating", 1)):
        model.router.route_head = Metronome(len(model.config.expert_names), period)  # type: ignore[assignment]
        try:
            engine = Engine(model, mode="lazy", members=members)
            engine.submit(Request([5] * 16, length, ignore_end=True))
            times = []
            while engine.active or engine.waiting:
                started = time.perf_counter()
                engine.step()
                times.append(1000 * (time.perf_counter() - started))
        finally:
            model.router.route_head = head
        width = len(times) // bins
        found[name] = [statistics.median(times[i * width : (i + 1) * width]) for i in range(bins)]
    return found


class Metronome(torch.nn.Module):
    """A route head that changes expert at every call, or never."""

    def __init__(self, experts: int, period: int) -> None:
        super().__init__()
        self.experts, self.period, self.calls = experts, period, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += self.period
        scores = torch.zeros(*hidden.shape[:-1], self.experts)
        scores[..., self.calls % self.experts] = 1
        return scores


def measure_collection(name: str | None, dtype: str | None, base: str | None, *, quick: bool) -> dict[str, Any]:
    """`decode` on a collection by name, telling on standard error where it is."""
    import sys

    from fusionroute import collection
    from fusionroute.modeling import FusionRouteForCausalLM
    from fusionroute.training.running import quiet

    folder = collection.locate(name)
    with quiet():
        model = FusionRouteForCausalLM.from_pretrained(folder, dtype=dtype, base=base)
        tokenizer = collection.load_tokenizer(folder)
    return decode(model, tokenizer, quick=quick, note=lambda text: print(text, file=sys.stderr, flush=True))


def decode(
    model: "FusionRouteForCausalLM",
    tokenizer: Any,
    *,
    quick: bool,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmark and return its document: `{"conditions", "results", "step_milliseconds"}`."""
    import transformers

    load = os.getloadavg()[0]
    bench = Bench(model, tokenizer, new=48 if quick else 128)
    note("answering once, to leave out answers that loop")
    good, looping = bench.split()
    results = []
    for batch in (1,) if quick else (1, 8, 16):
        prompts = good[:3] if quick else (good[:6] if batch == 1 else (good * 16)[:batch])
        results += bench.measure(batch, prompts, 2 if quick else 5, note)
    conditions = {
        "dtype": str(model.members[0].model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "memory_gigabytes_per_second": bandwidth(),
        "members": [member.name for member in model.members],
        "yardstick": f"{YARDSTICK} of {bench.expert}",
        "new_tokens": bench.new,
        "prompts": len(good),
        "looping_answers_left_out": len(looping),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    document = {"conditions": conditions, "results": results}
    if not quick:
        note("step time against length")
        document["step_milliseconds"] = step_times(model, bench.members[True], 1024, 8)
    return document
