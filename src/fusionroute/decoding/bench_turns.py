"""One answer of one decoder to some prompts, timed: our engine, and transformers' `generate` as the yardstick."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fusionroute.decoding.engine import Engine
from fusionroute.decoding.rows import Request

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


@dataclass
class Turn:
    """One variant's answers to one set of prompts."""

    tokens: int = 0  # decoded after the first visits
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    answers: list[list[int]] = field(default_factory=list)
    routes: list[list[str]] = field(default_factory=list)
    steps: int = 0  # of rows
    bytes_read: int = 0
    run: int = 0  # tokens that experts read, and how many of them only to catch up
    caught_up: int = 0
    kv_bytes: int = 0  # at most at a time

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def __add__(self, other: "Turn") -> "Turn":
        total = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Turn(**{**total, "kv_bytes": max(self.kv_bytes, other.kv_bytes)})


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
    """transformers' `generate` of one expert, its adapter merged; same dtype, device, threads and attention."""

    def __init__(self, model: "FusionRouteForCausalLM", expert: str) -> None:
        from peft import PeftModel

        from fusionroute.members import LoadOptions, load_model

        member = model.experts[model.config.expert_index(expert)]
        assert member.folder is not None
        attention = member.config._attn_implementation
        options = LoadOptions(member.model.dtype, member.model.device, attention)
        alone: Any = load_model(member.folder, options)
        if member.adapter_folder is not None:
            alone = PeftModel.from_pretrained(alone, str(member.adapter_folder)).merge_and_unload()
        self.model, self.config = alone.eval(), model.generation_config

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], new: int) -> Turn:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        ends = self.config.eos_token_id
        times: list[float] = []

        def clock(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        started = time.perf_counter()
        output = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0,
            stopping_criteria=[clock], return_dict_in_generate=True,
        )  # fmt: skip
        stops = set(ends if isinstance(ends, list) else [ends])
        turn = Turn(seconds=times[-1] - times[0], prefill_seconds=times[0] - started)
        for row in output.sequences[:, width:].tolist():
            length = next((i for i, token in enumerate(row) if token in stops), len(row))
            turn.answers.append(row[:length])
            # The end token was decoded too; the first one came with the prefill.
            turn.tokens += min(length + 1, len(row)) - 1
        turn.steps = turn.tokens
        turn.bytes_read = (len(times) - 1) * sum(p.nbytes for p in self.model.parameters())
        turn.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
        return turn


def run(engine: Engine, requests: Sequence[Request]) -> Turn:
    """Drain the engine of `requests`, timing the steps with a first visit apart."""
    turn = Turn()
    numbers = [engine.submit(request) for request in requests]
    answers: dict[int, list[Any]] = {number: [] for number in numbers}
    members = engine.members
    sizes = {pool: sum(weight.nbytes for weight in pool.matrices) for pool in members.pools}
    while engine.waiting or engine.active:
        visits, passes = members.visits, list(members.passes)
        read, caught_up = sum(members.tokens[1:]), members.caught_up
        started = time.perf_counter()
        events = engine.step()
        seconds = time.perf_counter() - started
        turn.kv_bytes = max(turn.kv_bytes, members.allocated)
        if members.visits > visits:
            turn.prefill_seconds += seconds
        else:
            turn.seconds += seconds
            turn.tokens += sum(len(event.tokens) + (event.finish == "stop") for event in events)
            turn.steps += len(events)
            counts = zip(members.pools, passes, members.passes, strict=True)
            turn.bytes_read += sum(sizes[pool] * (after - before) for pool, before, after in counts)
            turn.run += sum(members.tokens[1:]) - read
            turn.caught_up += members.caught_up - caught_up
        for event in events:
            answers[event.row] += event.tokens
    for number in numbers:
        turn.answers.append([token.id for token in answers[number]])
        turn.routes.append([token.expert for token in answers[number]])
    return turn
