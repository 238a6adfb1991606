"""Keys and values of rows that have ended, for rows that begin as those did: a conversation's next turn, for one.

What a member has seen is kept by member, so no expert ever reads another's cache; the store belongs to one engine and
so to one collection. Entries are copies of just their length, beside the slots that rows run in. The least recently
used goes first when room is needed. Knows no route and no text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusionroute.decoding.members import Members

LEAST = 16  # tokens that are worth a copy
MOST = 256  # entries


@dataclass(eq=False)  # an entry is itself: tensors do not compare to a truth value
class Prefix:
    """Tokens of a row that has ended, and by member how many of them it had seen, and its keys and values there."""

    ids: list[int]
    kept: dict[int, tuple[int, Any]]
    nbytes: int


class Prefixes:
    """The store.

    Args:
        members: whose keys and values are kept.
    """

    def __init__(self, members: Members) -> None:
        self.members = members
        self.entries: list[Prefix] = []  # the least recently used first
        self.spared = 0  # tokens that the router need not read, since the start

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def keep(self, row: int, ids: Sequence[int]) -> None:
        """Keep what the members have seen of a row that is about to go, `ids` at the most."""
        kept = {}
        for member in range(len(self.members.of)):
            seen = min(self.members.seen(member, row), len(ids))
            if seen >= LEAST:
                kept[member] = (seen, self.members.save(member, row, seen))
        if not kept:
            return
        longest = max(seen for seen, _ in kept.values())
        ids = list(ids[:longest])
        # A conversation that has gone on holds all that its earlier turns did.
        self.entries = [entry for entry in self.entries if not self._within(entry, ids, kept)]
        self.entries.append(Prefix(ids, kept, sum(self.members.saved_bytes(m, seen) for m, (seen, _) in kept.items())))
        del self.entries[:-MOST]

    def give(self, row: int, ids: Sequence[int]) -> None:
        """Let a new row of prompt `ids` begin with what the entry has that saves the most reading. The last id is left
        to read: what comes after it is wanted."""
        ids = list(ids[:-1])
        best, length, most = None, 0, 0
        for entry in self.entries:
            common = shared(entry.ids, ids)
            saved = sum(min(seen, common) for seen, _ in entry.kept.values())
            if common >= LEAST and saved >= most:  # of equals the latest
                best, length, most = entry, common, saved
        if best is None:
            return
        for member, (seen, kept) in best.kept.items():
            self.members.load(member, row, kept, min(seen, length))
        self.entries.remove(best)
        self.entries.append(best)
        self.spared += min(best.kept[0][0], length) if 0 in best.kept else 0

    def shrink(self, nbytes: int) -> None:
        """Forget entries until so many bytes hold the rest."""
        held = self.nbytes
        while self.entries and held > nbytes:
            held -= self.entries.pop(0).nbytes

    @staticmethod
    def _within(entry: Prefix, ids: list[int], kept: dict[int, tuple[int, Any]]) -> bool:
        return entry.ids == ids[: len(entry.ids)] and all(
            member in kept and kept[member][0] >= seen for member, (seen, _) in entry.kept.items()
        )


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first ids are the same."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
