"""Eq. 1 at the positions of a step whose experts have run. Knows rows and members' hidden states; draws nothing."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusionroute import fusion
from fusionroute.decoding.members import Members
from fusionroute.decoding.rows import Block


class Span(NamedTuple):
    """Positions `start` to `upto` (exclusive) of a block."""

    block: Block
    start: int
    upto: int


# Logits that are worked on at a time on a CPU, 16 MB in float32. malloc asks the system for every tensor of more than
# 32 MB anew, and each of its pages is cleared first: a logsumexp alone of 64 rows of 152,000 took 62 ms, in parts 7.
MOST_LOGITS = 1 << 22


def fused_logits(members: Members, spans: Sequence[Span]) -> Iterator[tuple[Sequence[Span], Tensor, Tensor, Tensor]]:
    """Yields some of the spans with their positions' fused, expert's and router's logits `[K, V]`, end to end.

    A row whose policy leaves the router out has its expert's in the router's place.
    """
    parts = []
    for block, start, upto in spans:
        if block.router is not None:
            parts.append((0, block.router[start:upto]))
        parts += [(e + 1, block.hidden(e, j)) for j in range(start, upto) for e in block.running(j)]
    found = iter(members.logits(parts))
    most = MOST_LOGITS if members.device.type == "cpu" else math.inf
    chunk: list[Span] = []
    experts, routers, weights = [], [], []
    for span in spans:
        block, start, upto = span
        router = None if block.router is None else next(found)
        each = [[next(found) for _ in block.running(j)] for j in range(start, upto)]
        expert = torch.cat([logits[0] if len(logits) == 1 else fusion.product(logits) for logits in each])
        chunk.append(span)
        experts.append(expert)
        routers.append(router)
        weights += [0.0 if router is None else block.row.alpha] * (upto - start)
        if len(weights) * expert.shape[-1] >= most or span is spans[-1]:
            yield chunk, *_fuse(experts, routers, weights)
            chunk, experts, routers, weights = [], [], [], []


def _fuse(
    experts: Sequence[Tensor], routers: Sequence[Tensor | None], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 1 and its two terms, float32, of each span's logits and each position's α."""
    expert = torch.cat(list(experts)).float()
    if all(logits is None for logits in routers):
        return expert, expert, expert
    router = torch.cat([e if r is None else r for e, r in zip(experts, routers, strict=True)]).float()
    same = len(set(weights)) == 1
    alpha = weights[0] if same else torch.tensor(weights, device=expert.device).unsqueeze(-1)
    return fusion.fuse(router, expert, alpha), expert, router
