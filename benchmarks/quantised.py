"""What rounding an expert's weights costs and saves: agreement with the expert as published, speed, memory.

    python benchmarks/quantised.py [--collection FOLDER --expert NAME] [--forms int8,int4] [--rounds 5]

Without a collection, the expert is the default one's base as it is. The expert alone answers the prompts of `bench
decode` greedily; the rounded one then reads these answers. Agreement is the share of their tokens that are its first
choice too, divergence KL(published ‖ rounded) in nats per token. Speeds are ratios within a round, at batch 1 and 16,
of the same answers' tokens. The last line is one JSON document.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fusionroute import Engine, FusionRouteForCausalLM, Request, collection, encode_chat
from fusionroute.configuration import MemberSpec
from fusionroute.decoding.bench import PROMPTS
from fusionroute.members import Member
from fusionroute.placement import Placement


def weight_bytes(member: Member) -> int:
    """Bytes of the weights as they are stored, scales included."""
    total = 0
    for weight in {id(p): p for p in member.model.parameters()}.values():
        names = getattr(weight, "tensor_data_names", None)
        held = [weight] if names is None else [getattr(weight, name) for name in names]
        total += sum(part.nbytes for part in held if part is not None)
    return total


@torch.inference_mode()
def log_probs(member: Member, rows: list[list[int]], prompts: list[list[int]]) -> list[torch.Tensor]:
    """Of each answer's positions, the member's log-probabilities `[T, V]`."""
    found = []
    for row, prompt in zip(rows, prompts, strict=True):
        logits = member(input_ids=torch.tensor([row]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(logits.float().log_softmax(-1))
    return found


def speed(engine: Engine, requests: list[Request]) -> float:
    started = time.perf_counter()
    tokens = sum(len(answer.ids) for answer in engine.generate(requests))
    return tokens / (time.perf_counter() - started)


def bare(folder: Path) -> Path:
    """A collection whose one expert, `base`, is the default collection's base without an adapter."""
    source = collection.read_config(collection.locate(None)).router_spec.source
    collection.assemble(folder, MemberSpec("router", source), [MemberSpec("base", source)])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", help="one with an expert that is a whole model")
    parser.add_argument("--expert", default="base")
    parser.add_argument("--forms", default="int8,int4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    folder = collection.locate(given.collection) if given.collection else bare(Path(tempfile.mkdtemp()) / "bare")
    tokenizer = collection.load_tokenizer(folder)
    texts = [text for group in zip(*PROMPTS.values(), strict=True) for text in group][:16]
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    forms = [None, *given.forms.split(",")]

    def loaded(form: str | None) -> FusionRouteForCausalLM:
        placement = {} if form is None else {given.expert: Placement(dtype=form)}
        return FusionRouteForCausalLM.from_pretrained(folder, dtype="bfloat16", placement=placement)

    def member(model: FusionRouteForCausalLM) -> Member:
        return model.experts[model.config.expert_index(given.expert)]

    requests = [Request(prompt, given.tokens, expert=given.expert, alpha=0.0) for prompt in prompts]
    models = {form: loaded(form) for form in forms}
    engines = {form: Engine(model) for form, model in models.items()}
    rows = [prompt + answer.ids for prompt, answer in zip(prompts, engines[None].generate(requests), strict=True)]
    published = log_probs(member(models[None]), rows, prompts)
    result: dict[str, Any] = {"load_before": load, "tokens": sum(map(len, published))}
    sizes = {form: weight_bytes(member(model)) for form, model in models.items()}
    speeds: dict[tuple[str | None, int], list[float]] = {}
    for number in range(given.rounds):
        # By turns the one first and the other.
        for form in forms[:: 1 if number % 2 else -1]:
            for batch in (1, 16):
                few = requests[number % 16 :][:1] if batch == 1 else requests
                speeds.setdefault((form, batch), []).append(speed(engines[form], few))
    for form in forms[1:]:
        lossy = log_probs(member(models[form]), rows, prompts)
        same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(published, lossy, strict=True)]).float()
        apart = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(published, lossy, strict=True)])
        found: dict[str, Any] = {"agreement": float(same.mean()), "divergence": float(apart.mean())}
        found["bytes"] = sizes[form] / sizes[None]
        for batch in (1, 16):
            ratios = [a / b for a, b in zip(speeds[form, batch], speeds[None, batch], strict=True)]
            found[f"speed_{batch}"] = [statistics.median(ratios), min(ratios), max(ratios)]
        result[str(form)] = found
        print(form, json.dumps(found), flush=True)
        gc.collect()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
