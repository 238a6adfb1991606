"""Advance these members by what they have not seen of these rows; what their LM heads read there comes back.

A pool is one set of weights and the members that run on it: in the packed pass, adapters on one base are lanes of one
transformer and share its passes; a whole model is a pool of its own. One watermark per (member, row), how many of the
row's tokens the member has seen, is the single source of truth: catching up and the new token are one pass, and
rejected drafts only lower watermarks. Knows no route, no sampling and no text.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusionroute.decoding.matrices import Matrix
from fusionroute.decoding.memory import free_memory
from fusionroute.decoding.products import UnsupportedError
from fusionroute.decoding.transformer import Span, Transformer
from fusionroute.lm_head import Head, hidden_states
from fusionroute.members import Member

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


class Job(NamedTuple):
    """Bring `member` (0 is the router, i + 1 expert i) to the end of `ids`, all tokens of row `row` so far, drafts
    included; the last `keep` positions are wanted."""

    member: int
    row: int
    ids: Sequence[int]
    keep: int


class Pool(Protocol):
    """Members on one set of weights."""

    head: Head
    device: torch.device
    rewindable: bool
    matrices: list[Tensor]  # that a pass reads

    def run(self, jobs: Sequence[Job]) -> list[Tensor]: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def seen(self, member: int, row: int) -> int: ...
    def rewind(self, row: int, length: int) -> None: ...
    def fork(self, member: int, row: int, copy: int) -> None: ...
    def save(self, member: int, row: int, length: int) -> Any: ...
    def load(self, member: int, row: int, saved: Any, length: int) -> None: ...
    def release(self, row: int) -> None: ...
    def reset(self) -> None: ...
    def nbytes(self, lengths: Sequence[int], *, now: bool) -> int: ...
    @property
    def bytes_per_token(self) -> int: ...
    @property
    def allocated(self) -> int: ...


def _room(length: int) -> int:
    """Tokens to make room for: in steps, since growing copies everything."""
    return -(-length // 256) * 256


class PackedPool:
    """Members as lanes of one `Transformer`: one pass for all of them.

    Args:
        members: by member number.
        head: of their model.
        merge, blocks, compile: as of `Transformer`.
    """

    rewindable = True

    def __init__(self, members: dict[int, Member], head: Head, *, merge: bool, blocks: bool, compile: bool) -> None:
        model = next(iter(members.values())).model
        if hasattr(model.get_output_embeddings(), "lora_A"):
            raise UnsupportedError("an adapter on the LM head")
        lanes = [member.adapter for member in members.values()]
        self.transformer = Transformer(model, lanes, merge=merge, blocks=blocks, compile=compile)
        self.head, self.device = head, self.transformer.device
        self.matrices = [*self.transformer.matrices, head.linear.weight]
        self.lanes = {number: lane for lane, number in enumerate(members)}
        self.cache = self.transformer.new_cache()
        self.slots: dict[tuple[int, int], int] = {}
        self.marks: dict[tuple[int, int], int] = {}

    def run(self, jobs: Sequence[Job]) -> list[Tensor]:
        self.cache.reserve(_room(max(len(job.ids) for job in jobs)))
        spans = []
        for job in jobs:
            key = (job.member, job.row)
            if key not in self.slots:
                self.slots[key] = self.cache.acquire()
            seen = self.marks.get(key, 0)
            spans.append(Span(self.slots[key], self.lanes[job.member], seen, job.ids[seen:]))
        hidden = self.transformer(spans, [job.keep for job in jobs], self.cache)
        for job in jobs:
            self.marks[job.member, job.row] = len(job.ids)
        return list(hidden.split([job.keep for job in jobs]))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def seen(self, member: int, row: int) -> int:
        return self.marks.get((member, row), 0)

    def rewind(self, row: int, length: int) -> None:
        for member in self.lanes:
            if self.marks.get((member, row), 0) > length:
                self.marks[member, row] = length

    def fork(self, member: int, row: int, copy: int) -> None:
        if seen := self.seen(member, row):
            self.slots[member, copy], self.marks[member, copy] = self.cache.acquire(), seen
            self.cache.copy(self.slots[member, row], self.slots[member, copy], seen)

    def save(self, member: int, row: int, length: int) -> Any:
        return self.cache.save(self.slots[member, row], length)

    def load(self, member: int, row: int, saved: Any, length: int) -> None:
        self.cache.reserve(_room(length))
        self.slots[member, row], self.marks[member, row] = self.cache.acquire(), length
        self.cache.load(self.slots[member, row], saved, length)

    def release(self, row: int) -> None:
        for member in self.lanes:
            self.marks.pop((member, row), None)
            if (slot := self.slots.pop((member, row), None)) is not None:
                self.cache.release(slot)

    def reset(self) -> None:
        self.cache = self.transformer.new_cache()
        self.slots.clear()
        self.marks.clear()

    def nbytes(self, lengths: Sequence[int], *, now: bool) -> int:
        """Bytes of keys and values if rows of these lengths visit every member; slots double, and all are as long.

        `now`: in the cache as it is, which shrinks only when it empties.
        """
        slots = 1 << (len(lengths) * len(self.lanes) - 1).bit_length() if lengths else 0
        capacity = max(map(_room, lengths), default=0)
        if now:
            slots, capacity = max(slots, self.cache.slots), max(capacity, self.cache.capacity)
        return slots * capacity * self.cache.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        return self.cache.bytes_per_token

    @property
    def allocated(self) -> int:
        return self.cache.nbytes


class PlainPool:
    """One member of an architecture that the packed pass does not know, run by transformers row by row."""

    def __init__(self, number: int, member: Member, vocab_size: int) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        self.number, self.member, self.device = number, member, member.model.device
        self.head = Head(member.model, vocab_size)
        # PEFT may have wrapped the LM head; which adapter is on is then that of whoever ran last.
        self.adapted_head = member.peft is not None and type(self.head.linear) is not torch.nn.Linear
        self.matrices = list(member.model.parameters())
        self.caches: dict[int, Any] = {}
        self.marks: dict[int, int] = {}
        self.new_cache = lambda: DynamicCache(config=member.config)
        member.activate()
        self.head.check(member.model)
        # A sliding layer drops what has left its window, and a linear one keeps a sum: nothing can be taken back.
        self.rewindable = all(type(layer) is DynamicLayer for layer in self.new_cache().layers)

    def run(self, jobs: Sequence[Job]) -> list[Tensor]:
        self.member.activate()
        kept = []
        for job in jobs:
            if job.row not in self.caches:
                self.caches[job.row] = self.new_cache()
            ids = torch.tensor([list(job.ids[self.seen(self.number, job.row) :])], device=self.device)
            hidden = hidden_states(
                self.member.model, input_ids=ids, past_key_values=self.caches[job.row], use_cache=True
            )
            self.marks[job.row] = len(job.ids)
            kept.append(hidden[0, hidden.shape[1] - job.keep :])
        return kept

    def logits(self, hidden: Tensor) -> Tensor:
        if self.adapted_head:
            self.member.activate()
        return self.head(hidden)

    def seen(self, member: int, row: int) -> int:
        return self.marks.get(row, 0)

    def rewind(self, row: int, length: int) -> None:
        if self.marks.get(row, 0) > length:
            self.caches[row].crop(length - self.marks[row])
            self.marks[row] = length

    def fork(self, member: int, row: int, copy: int) -> None:
        if row in self.caches:
            self.caches[copy], self.marks[copy] = deepcopy(self.caches[row]), self.marks[row]

    def save(self, member: int, row: int, length: int) -> Any:
        return self._cut(self.caches[row], self.marks[row], length)

    def load(self, member: int, row: int, saved: Any, length: int) -> None:
        self.caches[row], self.marks[row] = self._cut(saved, saved.get_seq_length(), length), length

    def _cut(self, cache: Any, seen: int, length: int) -> Any:
        copy = deepcopy(cache)
        if seen > length:
            copy.crop(length - seen)
        return copy

    def release(self, row: int) -> None:
        self.caches.pop(row, None)
        self.marks.pop(row, None)

    def reset(self) -> None:
        self.caches.clear()
        self.marks.clear()

    def nbytes(self, lengths: Sequence[int], *, now: bool) -> int:
        return sum(lengths) * self.bytes_per_token

    @property
    def allocated(self) -> int:
        return sum(self.marks.values()) * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        config = self.member.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * width * self.member.model.dtype.itemsize


class Members:
    """All members of a collection in their pools.

    Args:
        separate: every member has weights of its own, adapters merged into copies; else adapters on one base share it.
        blocks: multiply with copies of the weights, laid out for speed, where the machine has such a layout (CPUs);
            else the weights are those of `model`. None: if a quarter of the free memory holds the copies.
        compile: as of `Transformer`. Steps of a size that was not seen before wait for the compiler.
    """

    def __init__(
        self,
        model: "FusionRouteForCausalLM",
        *,
        separate: bool = False,
        blocks: bool | None = None,
        compile: bool = False,
    ) -> None:
        groups: dict[int, dict[int, Member]] = {}
        for number, member in enumerate(model.members):
            groups.setdefault(number if separate else id(member.model), {})[number] = member
        self.pools: list[Pool] = []
        self.of: list[Pool] = [None] * len(model.members)  # type: ignore[list-item]
        if blocks is None:
            models = [next(iter(group.values())).model for group in groups.values()]
            size = sum(p.nbytes for each in models if each.device.type == "cpu" for p in each.parameters())
            blocks = 0 < size < free_memory(torch.device("cpu")) // 4
        heads: dict[int, Matrix] = {}
        for group in groups.values():
            how = {"merge": separate, "blocks": blocks, "compile": compile}
            for numbers, pool in _pools(group, heads, model.config.vocab_size, **how):
                self.pools.append(pool)
                for number in numbers:
                    self.of[number] = pool
        self.device = self.of[0].device  # the router's, where logits meet
        self.devices = list(dict.fromkeys(pool.device for pool in self.pools))
        # Counted since the start: tokens by member, passes by pool, first visits of a row by a member, tokens that an
        # expert read only because it had missed them, and rows of members run (a batch of four is four).
        self.tokens = [0] * len(self.of)
        self.passes = [0] * len(self.pools)
        self.visits = self.caught_up = self.jobs = 0

    def run(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Hidden states `[keep, d]` of every job, in order; jobs of one pool are one pass."""
        results: list[Tensor] = [None] * len(jobs)  # type: ignore[list-item]
        self.jobs += len(jobs)
        for index, pool in enumerate(self.pools):
            mine = [i for i, job in enumerate(jobs) if self.of[job.member] is pool]
            if not mine:
                continue
            for i in mine:
                seen = pool.seen(jobs[i].member, jobs[i].row)
                self.tokens[jobs[i].member] += len(jobs[i].ids) - seen
                self.visits += seen == 0
                if seen and jobs[i].member:
                    self.caught_up += len(jobs[i].ids) - seen - jobs[i].keep
            for i, hidden in zip(mine, pool.run([jobs[i] for i in mine]), strict=True):
                results[i] = hidden
            self.passes[index] += 1
        return results

    def seen(self, member: int, row: int) -> int:
        """The watermark: how many of the row's tokens the member has seen."""
        return self.of[member].seen(member, row)

    def rewind(self, row: int, length: int) -> None:
        """Forget what any member has seen of the row beyond its first `length` tokens."""
        for pool in self.pools:
            pool.rewind(row, length)

    def fork(self, member: int, row: int, copy: int) -> None:
        """Let row `copy` begin as `row` is: what the member has seen of this, it need not see again in that."""
        self.of[member].fork(member, row, copy)

    def save(self, member: int, row: int, length: int) -> Any:
        """A copy of the member's keys and values of the row's first `length` tokens, which it must have seen."""
        return self.of[member].save(member, row, length)

    def load(self, member: int, row: int, saved: Any, length: int) -> None:
        """Let a row that the member has not seen begin with the first `length` tokens of what `save` gave."""
        self.of[member].load(member, row, saved, length)

    def saved_bytes(self, member: int, length: int) -> int:
        """Bytes of what `save` gives."""
        return length * self.of[member].bytes_per_token

    def release(self, row: int) -> None:
        for pool in self.pools:
            pool.release(row)

    def reset(self) -> None:
        """Forget every row, whatever state its keys and values are in."""
        for pool in self.pools:
            pool.reset()

    def nbytes(self, lengths: Sequence[int], *, now: bool = False, device: torch.device | None = None) -> int:
        """Bytes of keys and values if rows of these lengths visit every member: alone, or in the caches as they are;
        those on one device, or all."""
        return sum(pool.nbytes(lengths, now=now) for pool in self.pools if device in (None, pool.device))

    @property
    def allocated(self) -> int:
        """Bytes of keys and values now."""
        return sum(pool.allocated for pool in self.pools)

    @property
    def rewindable(self) -> bool:
        return all(pool.rewindable for pool in self.pools)

    def logits(self, parts: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        """Logits `[K, V]` of hidden states `[K, d]` by member, on the router's device; those of one pool are one
        product."""
        results: list[Tensor] = [None] * len(parts)  # type: ignore[list-item]
        for pool in self.pools:
            mine = [i for i, (member, _) in enumerate(parts) if self.of[member] is pool]
            if mine:
                logits = pool.logits(torch.cat([parts[i][1] for i in mine])).to(self.device)
                for i, piece in zip(mine, logits.split([len(parts[i][1]) for i in mine]), strict=True):
                    results[i] = piece
        return results


def _pools(
    group: dict[int, Member], heads: dict[int, Matrix], vocab_size: int, *, merge: bool, blocks: bool, compile: bool
) -> list[tuple[list[int], Pool]]:
    """The pools of members on one model, and their numbers; `heads` are the LM heads laid out so far."""
    model = next(iter(group.values())).model
    linear = model.get_output_embeddings()
    if blocks and type(linear) is torch.nn.Linear:
        if id(linear) not in heads:
            heads[id(linear)] = Matrix(linear.weight, linear.bias, blocks=True)
        linear = heads[id(linear)]
    try:
        head = Head(model, vocab_size, linear=linear)
        return [(list(group), PackedPool(group, head, merge=merge, blocks=blocks, compile=compile))]
    except UnsupportedError:
        return [([number], PlainPool(number, member, vocab_size)) for number, member in group.items()]
