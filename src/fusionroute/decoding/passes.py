"""Which experts run in which pass: beside the router those that are likely to be chosen, after it those that were.

Changes speed alone, never a token. Knows rows and which members share a pass; runs nothing.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from fusionroute.decoding.members import Members
from fusionroute.decoding.rows import Block

# Which experts run in the router's pass: none, the one that wrote the row's last token, or all; or what is fastest.
Mode = Literal["lazy", "predicted", "all", "auto"]


class Stretch(NamedTuple):
    """Positions `first` to `last` (inclusive) of a block that an expert is to run over."""

    expert: int
    first: int
    last: int


def beside_router(members: Members, expert: int) -> bool:
    """Whether the expert runs on the router's weights, and so in one pass with it."""
    return members.of[expert + 1] is members.of[0]


def guesses(members: Members, block: Block, mode: str) -> list[Stretch]:
    """Experts to run in the router's pass, over the whole block."""
    row = block.row
    experts: list[int] = []
    if row.expert is not None:
        experts = [row.expert]
    elif row.uniform or mode == "all":
        experts = list(range(len(row.names)))
    elif mode == "predicted" and row.last_route is not None and beside_router(members, row.last_route):
        experts = [row.last_route]
    return [Stretch(expert, 0, block.count - 1) for expert in experts]


def behind(members: Members, blocks: Sequence[Block], mode: str) -> int:
    """Tokens that guessed experts have missed of rows that have begun to write: what `mode` asks for first."""
    return sum(
        block.first - 1 - members.seen(guess.expert + 1, block.row.number)
        for block in blocks
        if block.row.new and not block.begun
        for guess in guesses(members, block, mode)
    )


def chosen(members: Members, block: Block) -> list[Stretch]:
    """The chosen experts that have not run, each as far into the block as it is chosen."""
    first = block.routes[block.at]
    # Another expert on the same weights may as well come along, should the draft hold until its turn.
    wanted = {first} | {
        e
        for j, e in enumerate(block.routes)
        if j >= block.at and not block.has(j) and members.of[e + 1] is members.of[first + 1]
    }
    positions = {e: [j for j in range(block.at, block.count) if block.routes[j] == e] for e in sorted(wanted)}
    return [Stretch(expert, places[0], places[-1]) for expert, places in positions.items()]
