"""What each expert thinks of the training data, written beside it: label log-probability and greedy id per token.

One member in memory at a time; afterwards the router trains without any of them. Shards are whole or absent, so a
killed annotation goes on where it stopped, and nobody has to coordinate: a part of the work is every n-th shard, the
processes of a launch share what is missing, and folders of several machines are merged by copying. A folder of shards
is named by all that the numbers depend on: the ids and completion starts (so tokenizer, template, rows), the member's
digests, dtype, attention and the common vocabulary.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionroute import fusion, weights
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.files import read_json, staged_file, write_json
from fusionroute.lm_head import Head, hidden_states
from fusionroute.members import Member
from fusionroute.progress import Meter
from fusionroute.router import RouteHead
from fusionroute.training import processes
from fusionroute.training.data import Item, Tokens, digest_sequences
from fusionroute.training.logprobs import score_labels

SHARD = 256  # sequences in a file: some seconds to minutes of work
BATCH_TOKENS = 2048  # padded tokens in a forward


class Part(NamedTuple):
    """The `number`-th of `of` parts, from 1: every `of`-th shard, so that rows sorted by length are dealt evenly."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From `2/4`.

        Raises:
            UsageError: not two whole numbers, or no such part.
        """
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise UsageError(f"a part is NUMBER/OF, such as 2/4 for the second of four, not {text!r}")
        return cls(int(number), int(of))

    def has(self, shard: int) -> bool:
        return shard % self.of == self.number - 1


WHOLE = Part(1, 1)


def annotation_key(
    member: Member, sequences: Sequence[Tokens], vocab_size: int, route_head: RouteHead | None = None
) -> dict[str, Any]:
    """All that the annotations of `sequences` by `member` depend on."""
    assert member.folder is not None
    return {
        "sequences": digest_sequences(sequences),
        "weights": weights.digest(member.folder),
        "adapter": None if member.adapter_folder is None else weights.digest(member.adapter_folder),
        "dtype": str(member.model.dtype).removeprefix("torch."),
        "attention": member.config._attn_implementation,
        "vocab_size": vocab_size,
        "route_head": None
        if route_head is None
        else hashlib.sha256(route_head.weight.numpy(force=True).tobytes()).hexdigest(),
    }


def batches(sequences: Sequence[Tokens], indices: Sequence[int], budget: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices grouped by length so that rows × longest ≤ `budget` (one row may exceed it)."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda i: len(sequences[i].ids)):
        if batch and (len(batch) + 1) * len(sequences[index].ids) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_batch(sequences: Sequence[Tokens], device: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Right-padded inputs `[R, T]`; of the N completion tokens, the flat positions that predict them and the labels."""
    width = max(len(s.ids) for s in sequences)
    ids = torch.zeros((len(sequences), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens.ids)] = torch.tensor(tokens.ids)
        mask[row, : len(tokens.ids)] = 1
    positions = torch.cat([torch.arange(s.start - 1, len(s.ids) - 1) + row * width for row, s in enumerate(sequences)])
    labels = torch.cat([torch.tensor(s.completion) for s in sequences])
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    return inputs, positions.to(device), labels.to(device)


@torch.no_grad()
def annotate_batch(
    member: Member, head: Head, sequences: Sequence[Tokens], route_head: RouteHead | None = None
) -> list[dict[str, Tensor]]:
    """Columns of each sequence: `logprobs [L]` float32 and `greedy [L]` int32 for its L completion tokens.

    With a route head also `routes [L]` int32: the expert that this router picks for each of them.
    """
    inputs, positions, labels = pad_batch(sequences, member.model.device)
    member.activate()
    hidden = hidden_states(member.model, **inputs).flatten(0, 1)[positions]
    scores = score_labels(hidden, head, labels)
    columns = {"logprobs": scores.logprobs, "greedy": scores.greedy.int()}
    if route_head is not None:
        columns["routes"] = fusion.route(route_head(hidden)).int()
    return _by_sequence({name: values.cpu() for name, values in columns.items()}, sequences)


def _by_sequence(columns: dict[str, Tensor], sequences: Sequence[Tokens]) -> list[dict[str, Tensor]]:
    """Cut flat columns where sequences end."""
    lengths = [len(s.completion) for s in sequences]
    parts = {name: values.split(lengths) for name, values in columns.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(lengths))]


def annotate(
    member: Member,
    sequences: Sequence[Tokens],
    folder: Path,
    vocab_size: int,
    *,
    route_head: RouteHead | None = None,
    part: Part = WHOLE,
) -> Path:
    """Annotate `sequences` into a sub-folder of `folder` and return it; shards that are there are kept.

    With `route_head` the routes are written too, which makes it the reference annotation of phase 2. In a launch of
    several processes each takes its share of the missing shards, and all return when there are none.

    Args:
        part: write only the shards of this part. The parts know nothing of each other: a shard is the same bytes
            whoever writes it, and when the folders of all are copied together nothing is missing.

    Raises:
        FusionRouteError: an id lies outside the common vocabulary, a label log-probability is not finite, the member's
            logits are of an unknown kind (`Head.check`), or the disk is full.
    """
    key = annotation_key(member, sequences, vocab_size, route_head)
    target = folder / f"{member.name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    largest = max((max(s.ids) for s in sequences), default=0)
    if largest >= vocab_size:
        raise FusionRouteError(
            f"{member.name}: the data has token id {largest}, the common vocabulary {vocab_size} ids: "
            "it was tokenized with another tokenizer"
        )
    if not (target / "key.json").is_file():
        write_json(target / "key.json", key)
    shards = [range(i, min(i + SHARD, len(sequences))) for i in range(0, len(sequences), SHARD)]
    # What one process lists is what all share out: while they look, files appear.
    missing = processes.agree([n for n in range(len(shards)) if part.has(n) and not _shard(target, n).is_file()])
    mine = [(n, shards[n]) for n in missing[processes.rank() :: processes.world()]]
    if mine:
        _annotate_shards(member, sequences, target, mine, vocab_size, route_head)
    processes.wait()
    return target


def _annotate_shards(
    member: Member,
    sequences: Sequence[Tokens],
    target: Path,
    shards: Sequence[tuple[int, range]],
    vocab_size: int,
    route_head: RouteHead | None,
) -> None:
    head = Head(member.model, vocab_size)
    member.activate()
    head.check(member.model)
    total = sum(len(sequences[i].ids) for _, shard in shards for i in shard)
    with Meter(f"annotating with {member.name}", total) as meter:
        for number, shard in shards:
            columns: dict[int, dict[str, Tensor]] = {}
            for batch in batches(sequences, shard):
                done = annotate_batch(member, head, [sequences[i] for i in batch], route_head)
                columns |= dict(zip(batch, done, strict=True))
                meter.advance(sum(len(sequences[i].ids) for i in batch))
            _write_shard(_shard(target, number), [columns[i] for i in shard])


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _write_shard(path: Path, columns: Sequence[dict[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    tensors = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
    if not torch.isfinite(tensors["logprobs"]).all():
        raise FusionRouteError(f"{path.parent.name}: a label log-probability is not finite; try dtype float32")
    with staged_file(path) as scratch:
        save_file(tensors, scratch)


def read_columns(folder: Path, sequences: Sequence[Tokens]) -> list[dict[str, Tensor]]:
    """The columns of every sequence from a folder of shards.

    Raises:
        FusionRouteError: the folder is incomplete, or belongs to other data.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    lengths = [len(s.completion) for s in sequences]
    shards: list[dict[str, Tensor]] = []
    for number in range((len(sequences) + SHARD - 1) // SHARD):
        path = _shard(folder, number)
        try:
            shards.append(load_file(path))
        except FileNotFoundError:
            raise FusionRouteError(
                f"{path} is missing: run `fusionroute annotate` again, with the --part that lacks it if it was "
                "split; it goes on from there"
            ) from None
        except SafetensorError as error:
            raise FusionRouteError(f"{path} is not whole ({error}): remove it and annotate again") from None
    columns = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    found = len(columns["logprobs"])
    if found != sum(lengths):
        raise FusionRouteError(f"{folder} annotates {found} tokens, the data has {sum(lengths)}: annotate again")
    if read_json(folder / "key.json")["sequences"] != digest_sequences(sequences):
        raise FusionRouteError(f"{folder} annotates other rows, or the same ones in another order: annotate again")
    return _by_sequence(columns, sequences)


def sequences_of(items: Sequence[Item]) -> list[Tokens]:
    """Every sequence of every item, in order."""
    return [sequence for item in items for sequence in item.sequences]


def with_annotations(items: Sequence[Item], experts: Sequence[Path], reference: Path | None = None) -> list[Item]:
    """Items with the experts' columns (folders in route order) and, for phase 2, those of the router after phase 1."""
    sequences = sequences_of(items)
    columns = [read_columns(folder, sequences) for folder in experts]
    references = None if reference is None else read_columns(reference, sequences)
    annotated, at = [], 0
    for item in items:
        sides = []
        for index in range(at, at + len(item.sequences)):
            side = {name: torch.stack([c[index][name] for c in columns], dim=-1) for name in ("logprobs", "greedy")}
            if references is not None:
                side |= {"reference": references[index]["logprobs"], "routes": references[index]["routes"]}
            sides.append(side)
        at += len(item.sequences)
        annotated.append(Item(item.sequences, item.domain, tuple(sides)))
    return annotated
