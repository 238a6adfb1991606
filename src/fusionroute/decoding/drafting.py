"""Who proposes the next tokens. Proposals cost little and change nothing: the engine keeps those that it draws itself.

A drafter makes one `Draft` per row, which follows the row's tokens and proposes what may come next.
"""

from collections.abc import Sequence
from typing import Protocol


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
    """

    name = "prompt-lookup"

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
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
    """The router itself drafts, token by token; the engine runs it, so that nothing it sees is run twice."""

    name = "router"
