"""Eq. 1 at the positions of a step whose experts have run. Knows rows and members' hidden states; draws nothing."""

from collections.abc import Sequence
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


def fused_logits(members: Members, spans: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
    """Fused, expert's and router's logits `[K, V]` of the spans' positions, end to end.

    A row whose policy leaves the router out has its expert's in the router's place.
    """
    parts = []
    for block, start, upto in spans:
        if block.router is not None:
            parts.append((0, block.router[start:upto]))
        parts += [(e + 1, block.hidden(e, j)) for j in range(start, upto) for e in block.running(j)]
    found = iter(members.logits(parts))
    experts, routers, weights = [], [], []
    for block, start, upto in spans:
        router = None if block.router is None else next(found)
        each = [[next(found) for _ in block.running(j)] for j in range(start, upto)]
        expert = torch.cat([logits[0] if len(logits) == 1 else fusion.product(logits) for logits in each])
        experts.append(expert)
        routers.append(expert if router is None else router)
        weights += [0.0 if router is None else block.row.alpha] * (upto - start)
    expert_logits = torch.cat(experts).float()
    alone = all(block.router is None for block, _, _ in spans)
    router_logits = expert_logits if alone else torch.cat(routers)
    same = len(set(weights)) == 1
    alpha = weights[0] if same else torch.tensor(weights, device=expert_logits.device).unsqueeze(-1)
    return fusion.fuse(router_logits, expert_logits, alpha), expert_logits, router_logits
