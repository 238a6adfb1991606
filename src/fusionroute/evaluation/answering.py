"""Answers of one system to many prompts, on the engine, with what each of them cost. Knows no task and no result."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from fusionroute import collection as collections
from fusionroute import fusion
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.members import Job, Members
from fusionroute.decoding.rows import Event, Request
from fusionroute.errors import UsageError, first_line
from fusionroute.placement import best_device

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


@dataclass
class Answer:
    """What a row wrote.

    Attributes:
        tokens: written ones, without the end.
        finish: `stop`, `length`, or `error`.
        seconds: of the engine's steps, each shared out among the rows it advanced.
        passes: rows of members run, shared out likewise; per token, what one expert alone takes once.
        pieces: [who wrote, text, tokens] along the answer.
        overruled: tokens at which the router overruled the expert.
        error: why there is no answer.
    """

    text: str = ""
    tokens: int = 0
    finish: str = "error"
    seconds: float = 0.0
    passes: float = 0.0
    pieces: list[list[Any]] = field(default_factory=list)
    overruled: int = 0
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_collection(
    folder: Path, dtype: str | None, base: str | None, device: str | None = None
) -> "tuple[FusionRouteForCausalLM, Any]":
    """A collection's model, and its tokenizer.

    Args:
        dtype: of the weights; None is as stored.
        base: replaces the base that adapters stand on, if any does.
        device: of the weights; None is the first GPU, else the CPU.
    """
    from fusionroute.modeling import FusionRouteForCausalLM
    from fusionroute.progress import quiet

    with quiet():
        # What stands on no adapter has no base to replace.
        base = base if any(spec.adapter for spec in collections.read_config(folder).member_specs) else None
        model = FusionRouteForCausalLM.from_pretrained(folder, dtype=dtype, base=base, device=device or best_device())
        return model, collections.load_tokenizer(folder, base=base)


def load_engine(folder: Path, dtype: str | None, base: str | None) -> tuple[Engine, Any]:
    """The engine of a collection, and its tokenizer; arguments as in `load_collection`.

    It reads once what prompts begin with alike, where its members allow it.
    """
    model, tokenizer = load_collection(folder, dtype, base)
    members = Members(model)
    return Engine(model, tokenizer, members=members, reuse=members.rewindable), tokenizer


@torch.inference_mode()
def choose(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The expert that the router picks at each prompt's end, as rows of `routing="query"` keep it; no row may run."""
    jobs = [Job(0, row, ids, 1) for row, ids in enumerate(prompts)]
    hidden = engine.members.run(jobs)
    engine.members.reset()
    scores = engine.model.router.route_head(torch.cat(hidden))
    return [engine.names[route] for route in fusion.route(scores).tolist()]


R = TypeVar("R", bound=Request, contravariant=True)


class Decoder(Protocol[R]):
    """An engine, or what works like one.

    Attributes:
        waiting: rows that are submitted and not begun; `abandon` leaves them.
    """

    members: Members

    @property
    def waiting(self) -> Collection[Any]: ...
    def submit(self, request: R) -> int: ...
    def step(self) -> list[Event]: ...
    def abandon(self) -> None: ...


def answer(engine: Decoder[R], wanted: Iterable[tuple[str, R]], batch: int) -> Iterator[tuple[str, Answer]]:
    """Answer requests, `batch` at a time, and yield each with its key as it ends.

    A request that the engine refuses, or whose row fails, is an answer with an `error`; so is every row that has begun
    when a step fails.
    """
    waiting = iter(wanted)
    running: dict[int, tuple[str, Answer]] = {}
    more = True
    while more or running:
        while more and len(running) < batch:
            entry = next(waiting, None)
            if entry is None:
                more = False
                break
            key, request = entry
            try:
                running[engine.submit(request)] = (key, Answer())
            except UsageError as error:
                yield key, Answer(error=str(error))
        if not running:
            continue
        jobs, started = engine.members.jobs, time.perf_counter()
        try:
            events = engine.step()
        except Exception as error:  # out of memory, for one: what ran is lost, what waits can still run
            engine.abandon()
            unbegun = {row.number for row in engine.waiting}
            lost = [number for number in running if number not in unbegun]
            if not lost:  # the next step would fail as this one did
                raise
            for number in lost:
                key, found = running.pop(number)
                found.error = f"{type(error).__name__}: {first_line(error)}"
                yield key, found
            continue
        seconds, jobs = time.perf_counter() - started, engine.members.jobs - jobs
        for event in events:
            key, found = running[event.row]
            found.seconds += seconds / len(events)
            found.passes += jobs / len(events)
            for token in event.tokens:
                found.tokens += 1
                found.overruled += token.overruled
                if found.pieces and found.pieces[-1][0] == token.expert:
                    found.pieces[-1][1] += token.text
                    found.pieces[-1][2] += 1
                else:
                    found.pieces.append([token.expert, token.text, 1])
            if event.finish is not None:
                found.text = "".join(piece[1] for piece in found.pieces) + event.tail
                found.finish = event.finish
                found.error = None if event.error is None else f"{type(event.error).__name__}: {event.error}"
                del running[event.row]
                yield key, found
