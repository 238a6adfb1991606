"""Who proposes the next tokens. Proposals cost little and change nothing: the engine keeps those that it draws itself.

A drafter makes one `Draft` per row, which follows the row's tokens and proposes what may come next.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fusionroute.decoding.members import Job
from fusionroute.decoding.sampling import draw
from fusionroute.errors import UsageError

if TYPE_CHECKING:
    from fusionroute.decoding.members import Members
    from fusionroute.decoding.rows import Row


class Draft(Protocol):
    """What a drafter knows of one row."""

    def extend(self, ids: Sequence[int]) -> None:
        """The row has these further tokens (at first the prompt)."""

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may come next; none if it has no idea."""


class Drafter(Protocol):
    """Makes the drafts of new rows."""

    name: str

    def start(self) -> Draft: ...


class PromptLookup:
    """What followed the last tokens when they last occurred in the row, prompt included (n-gram lookup).

    Args:
        longest, shortest: tokens that must agree; longer agreement is tried first.

    Raises:
        UsageError: nothing could ever be found: `shortest` is below 1 or above `longest`.
    """

    name = "prompt-lookup"

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(
                f"prompt lookup needs 1 <= shortest <= longest, not shortest {shortest}, longest {longest}"
            )
        self.lengths = range(longest, shortest - 1, -1)

    def start(self) -> Draft:
        return _Lookup(self.lengths)


class _Lookup:
    def __init__(self, lengths: range) -> None:
        self.lengths = lengths
        self.ids: list[int] = []
        # Where each n-gram was last followed by something.
        self.after: dict[tuple[int, ...], int] = {}

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            for length in self.lengths:
                if len(self.ids) >= length:
                    self.after[tuple(self.ids[-length:])] = len(self.ids)
            self.ids.append(token)

    def propose(self, count: int) -> list[int]:
        for length in self.lengths:
            place = self.after.get(tuple(self.ids[-length:])) if len(self.ids) >= length else None
            if place is not None:
                return self.ids[place : place + count]
        return []


class RouterDraft:
    """The router itself drafts, token by token; what it has seen of a draft it need not see again to route it."""

    name = "router"

    def propose(
        self, members: "Members", rows: Sequence["Row"], counts: Sequence[int]
    ) -> list[tuple[list[int], list[Tensor]]]:
        """Tokens that the router alone would write, drawn with each row's own noise, and the hidden states `[1, d]`
        that it had on the way: at most `counts` of each row."""
        made: list[tuple[list[int], list[Tensor]]] = [([], []) for _ in rows]
        left = list(counts)
        for step in range(max(counts, default=0)):
            going = [i for i, row in enumerate(rows) if row.routed and step < left[i]]
            if not going:
                break
            hidden = members.run([Job(0, rows[i].number, rows[i].ids + made[i][0], 1) for i in going])
            logits = members.logits([(0, torch.cat(hidden))])[0]
            for place, i in enumerate(going):
                row, (drafts, held) = rows[i], made[i]
                held.append(hidden[place])
                # Eq. 1 with the router in the expert's place: the same arg-max, and about as sharp.
                guess = logits[place].float() * (1 + row.alpha)
                ids = row.ids + drafts
                try:
                    token = draw(guess, row.request.sampling, ids=ids, new=row.new + step, ends=row.ends)
                except Exception:  # of the row's mask, and perhaps on a path that the row does not take
                    token, left[i] = int(guess.argmax()), 0
                drafts.append(token)
        return made
