"""What a step drew becomes traces: who wrote each token, what each side would have written, where the row ends."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusionroute import fusion
from fusionroute.decoding.rows import Block, Candidates, Logprobs
from fusionroute.fusion import TokenTrace


class Drawn(NamedTuple):
    """A token that was drawn at a position of a block; its logits stand at `where` of the step's."""

    block: Block
    position: int
    where: int
    token: int


def emit(drawn: Sequence[Drawn], fused: Tensor, experts: Tensor, routers: Tensor, names: Sequence[str]) -> None:
    """Add what was drawn to the blocks' events, up to the end of each row.

    Args:
        drawn: in order of positions within each block.
        fused, experts, routers: logits `[K, V]` of Eq. 1 and of its two terms.
        names: of the experts.
    """
    if not drawn:
        return
    tokens = torch.tensor([each.token for each in drawn], device=fused.device)
    if len(drawn) == len(fused):  # they stand as they were drawn
        choices = fusion.choices(fused, experts, routers, tokens)
    else:
        places = torch.tensor([each.where for each in drawn], device=fused.device)
        choices = fusion.choices(fused[places], experts[places], routers[places], tokens)
    for (block, position, where, token), choice in zip(drawn, choices, strict=True):
        row, event = block.row, block.event
        if event.finish is not None:
            continue
        count = row.request.logprobs
        logprobs = None if count is None else _logprobs(fused[where], token, count)
        if token in row.ends:
            event.finish = "stop"
            event.end = None if logprobs is None else (token, logprobs)
            continue
        last = block.first + position + 1 >= row.limit
        scores = torch.zeros(len(names)) if block.scores is None else block.scores[position]
        event.tokens.append(
            TokenTrace(
                id=token,
                text="" if row.text is None else row.text.push(token, last=last),
                expert=block.writer(position),
                weights=dict(zip(names, scores.softmax(-1).tolist(), strict=True)),
                **choice,
                drafted=position < len(block.drafts) and token == block.drafts[position],
            )
        )
        if logprobs is not None:
            event.logprobs.append(logprobs)
        if count := row.request.candidates:
            sides = (logits[where].float().log_softmax(dim=-1) for logits in (fused, experts, routers))
            event.candidates.append(Candidates(*(_likeliest(side, count) for side in sides)))
        if row.text is not None and row.text.stopped:
            event.finish = "stop"
        elif last:
            event.finish = "length"
    for block in {id(each.block): each.block for each in drawn}.values():
        block.done |= block.event.finish is not None


def _logprobs(logits: Tensor, token: int, count: int) -> Logprobs:
    logprobs = logits.log_softmax(dim=-1)
    return Logprobs(float(logprobs[token]), _likeliest(logprobs, count))


def _likeliest(logprobs: Tensor, count: int) -> list[tuple[int, float]]:
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))
