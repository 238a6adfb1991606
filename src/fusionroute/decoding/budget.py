"""How many rows there is memory for: bytes of keys and values, on every device that members are on. Knows no row."""

from collections.abc import Sequence

from fusionroute.decoding.members import Members
from fusionroute.decoding.memory import free_memory


class KVBudget:
    """Bytes that keys and values may take.

    Args:
        members: whose they are.
        nbytes: on each device; None is half of what is free there now.

    Attributes:
        limits: by device.
    """

    def __init__(self, members: Members, nbytes: int | None = None) -> None:
        self.members = members
        self.limits = {device: free_memory(device) // 2 if nbytes is None else nbytes for device in members.devices}

    @property
    def total(self) -> int:
        return sum(self.limits.values())

    def room(self, lengths: Sequence[int]) -> int:
        """Bytes left where there are fewest, if rows of these lengths visit every member in the caches as they are."""
        return min(
            limit - self.members.nbytes(lengths, now=True, device=device) for device, limit in self.limits.items()
        )

    def refusal(self, length: int) -> str | None:
        """Why a row of that length can never run, not even alone, if it cannot."""
        for device, limit in self.limits.items():
            if (needed := self.members.nbytes([length], device=device)) > limit:
                where = f" on {device}" if len(self.limits) > 1 else ""
                return f"{needed / 1e6:.3g} MB of KV cache{where} and the budget is {limit / 1e6:.3g} MB"
        return None
