"""Keys and values by slot and position, and which slots are free. Knows no member, row or token.

A slot is one sequence of one member. Entries are written at (slot, position), so sequences of any length stand beside
each other without padding, and taking tokens back needs no work: what is beyond the reader's end is not read.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Per layer, keys and values `[slots, kv_heads, capacity, head_dim]`, grown when a slot or a length needs it.

    One head's entries stand together: attention reads them in a row.

    Args:
        shapes: of each layer, (kv_heads, head_dim); the number of heads is the same in all.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, not whatever was there: a masked entry is still multiplied by its weight, which is 0.
        self.keys = [torch.zeros(0, heads, 0, width, dtype=dtype, device=device) for heads, width in shapes]
        self.values = [tensor.clone() for tensor in self.keys]
        self.free: list[int] = []

    @property
    def slots(self) -> int:
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return sum(2 * k.shape[1] * k.shape[3] * k.element_size() for k in self.keys)

    @property
    def nbytes(self) -> int:
        return self.slots * self.capacity * self.bytes_per_token

    def acquire(self) -> int:
        """The lowest free slot: neighbours share an attention call."""
        if not self.free:
            self._resize(max(2 * self.slots, 1), self.capacity)
        return heapq.heappop(self.free)

    def release(self, slot: int) -> None:
        heapq.heappush(self.free, slot)
        if len(self.free) == self.slots:
            self._resize(0, 0)

    def copy(self, source: int, target: int, length: int) -> None:
        """Put the first `length` tokens of one slot into another."""
        for tensors in (self.keys, self.values):
            for layer in tensors:
                layer[target, :, :length] = layer[source, :, :length]

    def save(self, slot: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Copies `[kv_heads, length, head_dim]` of a slot's first keys and values, by layer."""
        return [
            (k[slot, :, :length].clone(), v[slot, :, :length].clone())
            for k, v in zip(self.keys, self.values, strict=True)
        ]

    def load(self, slot: int, saved: Sequence[tuple[Tensor, Tensor]], length: int) -> None:
        """Put the first `length` tokens of what `save` gave into a slot that has room for them."""
        for layer, (keys, values) in enumerate(saved):
            self.keys[layer][slot, :, :length] = keys[:, :length]
            self.values[layer][slot, :, :length] = values[:, :length]

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in every slot."""
        if length > self.capacity:
            self._resize(self.slots, length)

    def _resize(self, slots: int, capacity: int) -> None:
        before = self.slots
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
                if slots >= before:
                    new[:before, :, : old.shape[2]] = old
                tensors[layer] = new
        if slots:
            for slot in range(before, slots):
                heapq.heappush(self.free, slot)
        else:
            self.free = []

    def places(self, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Where the entries of N tokens go, `[N · kv_heads]`, in any layer; until the cache grows."""
        heads = self.keys[0].shape[1]
        at = torch.tensor([slots, positions], device=self.keys[0].device)
        head = torch.arange(heads, device=at.device)
        return ((at[0].unsqueeze(1) * heads + head) * self.capacity + at[1].unsqueeze(1)).flatten()

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put `[N, kv_heads, head_dim]` at the `places` of N tokens."""
        self.keys[layer].flatten(0, 2).index_copy_(0, places, keys.flatten(0, 1))
        self.values[layer].flatten(0, 2).index_copy_(0, places, values.flatten(0, 1))

    def read(self, layer: int, slots: slice, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[R, kv_heads, end, head_dim]` of neighbouring slots, as views."""
        return self.keys[layer][slots, :, :end], self.values[layer][slots, :, :end]
