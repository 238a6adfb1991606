"""What a decoding benchmark tells beside speed: agreement with the reference model, memory, step time by length."""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fusionroute.decoding.engine import Engine, Mode
from fusionroute.decoding.members import Members
from fusionroute.decoding.rows import Request

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


def bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """GB/s of reading a device's memory: the best of some sums over a tensor of `size` bytes, which no cache holds."""
    data = torch.ones(size // 4, device=device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        data.sum().item()  # a GPU has not summed before it is asked for
        seconds.append(time.perf_counter() - started)
    return size / min(seconds) / 1e9


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
        scores = torch.zeros(*hidden.shape[:-1], self.experts, device=hidden.device)
        scores[..., self.calls % self.experts] = 1
        return scores


class Watched(Engine):
    """An engine that keeps the fused logits of every draw."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn: list[torch.Tensor] = []

    def _logits(self, spans: Sequence[Any]) -> Iterator[Any]:
        for found in super()._logits(spans):
            self.drawn += list(found[1])
            yield found


def agreement(
    model: "FusionRouteForCausalLM", members: Members, mode: Mode, prompts: Sequence[Sequence[int]], new: int
) -> dict[str, float]:
    """An engine's greedy answers against the reference model on the same prefixes.

    Returns:
        Shares of tokens and of routes that are the same, and the largest difference of a fused logit where routes are.
    """
    tokens = routes = count = 0
    largest = 0.0
    for prompt in prompts:
        engine = Watched(model, mode=mode, members=members)
        (answer,) = engine.generate([Request(prompt, new, ignore_end=True)])
        ids = torch.tensor([[*prompt, *answer.ids[:-1]]], device=model.device)
        with torch.inference_mode():
            output = model(ids, logits_to_keep=len(answer.ids))
        same = [model.config.expert_names[r] == t.expert for r, t in zip(output.routes[0], answer.tokens, strict=True)]
        expected = output.logits[0].float()
        tokens += int((expected.argmax(-1).cpu() == torch.tensor(answer.ids)).sum())
        routes += sum(same)
        count += len(same)
        gaps = (torch.stack(engine.drawn).float() - expected).abs().amax(-1)
        largest = max([largest, *gaps[torch.tensor(same)].tolist()])
    return {"tokens": tokens / count, "routes": routes / count, "largest_logit_difference": largest}


def weights_in_memory(model: "FusionRouteForCausalLM", members: Members) -> int:
    """Bytes of the collection's own weights and of the layouts and merged copies that `members` made of them."""
    held: dict[int, int] = {}
    weights = [p for member in model.members for p in member.model.parameters()]
    for pool in members.pools:
        weights += pool.matrices
    for weight in weights:
        # A blocked weight has no storage that can be asked for; it is shared with nothing.
        key, size = (
            (id(weight), weight.nbytes)
            if weight.is_mkldnn
            else (weight.untyped_storage().data_ptr(), weight.untyped_storage().nbytes())
        )
        held[key] = size
    return sum(held.values())
