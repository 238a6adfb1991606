"""What a collection costs in vLLM: tokens per second to one model's, and what `compute_logits` adds to a step.

    python benchmarks/in_vllm.py [--experts 3] [--rows 64] [--new 64] [--rounds 3] [--eager]

Random models of the default base's shape and vocabulary, in bfloat16, all rows under way at once, greedy, no early end.
Every engine runs in a process of its own, one after the other. n experts and a router are n + 1 models, so an engine
without any cost of its own writes 1 ÷ (n + 1) as fast as one model; the ratio to that is what is measured. The overhead
is the time in the collection's `compute_logits` less that in its members' heads, to the step's. The last line is one
JSON document.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = 32  # ids


def make_models(folder: Path, count: int) -> list[Path]:
    """Random models of the default base's shape, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fusionroute import copying, sources

    base = sources.resolve(sources.DEFAULT_BASE)
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.bfloat16)
        made.append(folder / f"model{seed}")
        model.save_pretrained(made[-1])
        copying.copy_tokenizer(base, made[-1])
    return made


def make_collection(folder: Path, models: list[Path]) -> Path:
    """The first as router, the others as experts, by reference; a random head, so that every expert is chosen."""
    import torch
    from transformers import AutoConfig

    from fusionroute import collection
    from fusionroute.configuration import MemberSpec
    from fusionroute.router import RouteHead

    router, *experts = models
    specs = [MemberSpec(f"expert{number}", str(path)) for number, path in enumerate(experts)]
    head = RouteHead(AutoConfig.from_pretrained(router).hidden_size, [spec.name for spec in specs])
    torch.nn.init.normal_(head.weight)
    head.trained = True  # else the first expert would write everything
    (folder / "head").mkdir()
    head.save(folder / "head")
    collection.assemble(folder / "collection", MemberSpec("router", str(router)), specs, head=folder / "head")
    return folder / "collection"


class Clock:
    """Seconds spent in functions that are watched."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)


def measure(model: Path, rows: int, new: int, eager: bool) -> dict[str, float]:
    """Tokens per second of one engine, and the seconds of its heads; to be run in a process of its own."""
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    settings = {"dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": rows, "enable_prefix_caching": False}
    llm = LLM(str(model), kv_cache_memory_bytes=2 << 30, enforce_eager=eager, **settings)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        TokensPrompt(prompt_token_ids=torch.randint(100, 40_000, (PROMPT,), generator=generator).tolist())
        for _ in range(rows)
    ]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    whole, heads = Clock(), Clock()

    def watch(loaded: Any) -> None:
        whole.watch(loaded, "compute_logits")
        for member in getattr(loaded, "members", {}).values():
            heads.watch(member, "compute_logits")

    llm.apply_model(watch)
    started = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), use_tqdm=False)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": rows * new, "compute_logits": whole.seconds, "heads": heads.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without compiling, which takes minutes on CPUs")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.measure, given.rows, given.new, given.eager)))
        return
    before = os.getloadavg()[0]
    # One process, so that what is watched is what runs.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    ratios, overheads, shares = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        models = make_models(Path(scratch), given.experts + 1)
        sides = {"one": models[0], "collection": make_collection(Path(scratch), models)}
        for number in range(given.rounds):
            found: dict[str, dict[str, float]] = {}
            for side in ("one", "collection")[:: 1 if number % 2 else -1]:
                command = [sys.executable, __file__, "--measure", str(sides[side]), "--rows", str(given.rows)]
                command += ["--new", str(given.new), *(["--eager"] if given.eager else [])]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                found[side] = json.loads(done.stdout.strip().splitlines()[-1])
            speeds = {side: each["tokens"] / each["seconds"] for side, each in found.items()}
            ours = found["collection"]
            ratios.append(speeds["collection"] * (given.experts + 1) / speeds["one"])
            overheads.append((ours["compute_logits"] - ours["heads"]) / ours["seconds"])
            shares.append(ours["compute_logits"] / ours["seconds"])
            print(
                f"round {number + 1}: one model {speeds['one']:.0f} tokens/s, collection "
                f"{speeds['collection']:.0f}, ratio to 1 / {given.experts + 1}: {ratios[-1]:.2f}, "
                f"overhead {overheads[-1]:.1%}",
                file=sys.stderr,
            )
    result = {
        "experts": given.experts,
        "rows": given.rows,
        "new": given.new,
        "eager": given.eager,
        "threads": int(environment["OMP_NUM_THREADS"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "overhead": statistics.median(overheads),
        "overheads": overheads,
        "compute_logits_share": statistics.median(shares),
        "load_before": before,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
