"""The reference model's KV cache: every member's own cache behind the interface that transformers' `generate` drives.

`layers` is the members' layers end to end, router first, so that reordering, repeating, selecting and cropping, which
transformers does layer by layer, reach all of them. Its length is that of the members that ran, which need not be the
router.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from fusionroute.errors import UsageError


class FusionCache(Cache):
    """One `DynamicCache` per member, and the routes taken so far.

    Args:
        configs: member name to its transformers config, the router first.

    Attributes:
        members: member name to its cache.
        lengths: member name to the tokens it has seen: all there are, or none, or those before a policy left it out.
        routes: `[B, K]`, the expert chosen at each of the K positions that gave logits; column k is in the row order
            of its own step, so beam search gathers it by `beam_indices`.
        positions: `[K]`, where in the row (padding counted) each of them is.
        query_routes: `[B]`, the one decision per prompt of query-level routing.
    """

    def __init__(self, configs: Mapping[str, Any]) -> None:
        self.configs = dict(configs)
        self.members = {name: DynamicCache(config=config) for name, config in configs.items()}
        # Counted here, since what a sliding layer says of its length after a crop depends on transformers' version.
        self.lengths = dict.fromkeys(self.members, 0)
        self.routes: Tensor | None = None
        self.positions: Tensor | None = None
        self.query_routes: Tensor | None = None
        super().__init__(layers=[layer for cache in self.members.values() for layer in cache.layers])

    def require(self, names: Iterable[str]) -> dict[str, DynamicCache]:
        """The caches of the members `names`, each of which must have seen every token so far.

        Raises:
            UsageError: the cache was filled by a policy that left one of them out.
        """
        seen = self.get_seq_length()
        for name in names:
            if self.lengths[name] != seen:
                raise UsageError(
                    f"this cache holds {seen} tokens but {name} has seen {self.lengths[name]} of them: "
                    "it was filled with another `expert` or `alpha`; start a new one"
                )
        return {name: self.members[name] for name in names}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if layer_idx != 0:
            return super().get_seq_length(layer_idx)
        return max(self.lengths.values())

    def advance(self, names: Iterable[str], tokens: int) -> None:
        """Note that the members `names` have seen `tokens` more."""
        for name in names:
            self.lengths[name] += tokens

    def record(self, routes: Tensor, positions: Tensor) -> None:
        """Append the routes `[B, K]` of one forward, taken at `positions [K]`."""
        if self.routes is None or self.positions is None:
            self.routes, self.positions = routes, positions
        else:
            self.routes = torch.cat([self.routes, routes], dim=1)
            self.positions = torch.cat([self.positions, positions])

    def routes_from(self, first: int, count: int) -> Tensor:
        """The routes `[B, count]` taken at positions `first`, `first + 1`, …; −1 where none was."""
        assert self.routes is not None
        assert self.positions is not None
        found = self.routes.new_full((self.routes.shape[0], count), -1)
        wanted = (self.positions >= first) & (self.positions < first + count)
        found[:, self.positions[wanted] - first] = self.routes[:, wanted]
        return found

    def reset(self) -> None:
        self.__init__(self.configs)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.query_routes is not None:
            self.query_routes = self.query_routes.index_select(0, beam_idx.to(self.query_routes.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive number is the length to keep (an older form)."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.16 passes a tensor
        before = self.get_seq_length()
        after = tokens_to_remove if tokens_to_remove > 0 else max(before + tokens_to_remove, 0)
        for name, cache in self.members.items():
            if self.lengths[name]:  # else a policy left this member out
                cache.crop(-max(self.lengths[name] - after, 0))  # cropping by 0 still shrinks sliding windows
                self.lengths[name] = min(self.lengths[name], after)
        if self.routes is not None and self.positions is not None:
            kept = self.positions < after
            self.routes, self.positions = self.routes[:, kept], self.positions[kept]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.routes = None if self.routes is None else change(self.routes)
        self.query_routes = None if self.query_routes is None else change(self.query_routes)
