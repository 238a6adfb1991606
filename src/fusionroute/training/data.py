"""Rows to tokens, and tokens with annotations to mixed batches (Algorithm 1). Knows no file format and no loss.

A `Tokens` is one sequence: a prompt, and the completion that everything is computed on. An SFT item is one sequence, a
preference item two (chosen, rejected). Annotation columns run beside the completion tokens.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fusionroute.errors import FusionRouteError


@dataclass(frozen=True)
class Tokens:
    """Ids of prompt and completion; the completion starts at `start ≥ 1`."""

    ids: tuple[int, ...]
    start: int

    @property
    def completion(self) -> tuple[int, ...]:
        return self.ids[self.start :]


@dataclass(frozen=True)
class Item:
    """One training item: one sequence (SFT) or two (chosen, rejected).

    Attributes:
        annotations: per sequence, the experts' columns: `logprobs [L, n]` and `greedy [L, n]` for its L completion
            tokens; in phase 2 `reference [L]` and `routes [L]`, label log-probabilities and routes of the
            router after phase 1.
    """

    sequences: tuple[Tokens, ...]
    domain: str
    annotations: tuple[Mapping[str, Tensor], ...] = field(default=())

    @property
    def is_pair(self) -> bool:
        return len(self.sequences) == 2

    @property
    def length(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)


def tokenize_turns(tokenizer: Any, prompt: Sequence[Mapping[str, str]], answer: Sequence[Mapping[str, str]]) -> Tokens:
    """Render prompt and answer with the chat template, once; the completion ends with the end-of-turn token.

    Raises:
        FusionRouteError: the tokenizer has no chat template, or renders an empty completion.
    """
    if tokenizer.chat_template is None:
        raise FusionRouteError(
            f"{tokenizer.name_or_path} has no chat template: training needs the router's to have one"
        )
    head = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
    full = tokenizer.apply_chat_template([*prompt, *answer], return_dict=True)["input_ids"]
    start = next((i for i, (a, b) in enumerate(zip(head, full, strict=False)) if a != b), min(len(head), len(full)))
    # Templates put a line break after the end of a turn; no model is asked to write it.
    # The end of a turn need not be the end of a text: Gemma's is another special token.
    ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    stop = len(full)
    while stop > start and full[stop - 1] not in ends:
        stop -= 1
    full = full[: stop if stop > start else len(full)]
    if start < 1 or start >= len(full):
        raise FusionRouteError(f"the chat template renders nothing for the answer to {prompt[-1]['content'][:60]!r}")
    return Tokens(tuple(full), start)


def tokenize_row(tokenizer: Any, row: Mapping[str, Any]) -> tuple[Tokens, ...]:
    """The one sequence of a chat row, whose completion is the last message, or the two of a pair.

    Raises as `tokenize_turns`.
    """
    if "messages" in row:
        return (tokenize_turns(tokenizer, row["messages"][:-1], row["messages"][-1:]),)
    return tuple(tokenize_turns(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))


def tokenize_rows(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, context: int, max_length: int | None = None
) -> tuple[list[Item], int]:
    """Chat and preference rows to items without annotations, and how many rows `max_length` dropped.

    Args:
        context: the shortest context of the members, in tokens.
        max_length: rows with a longer sequence are dropped; None keeps all and refuses what exceeds `context`.

    Raises:
        FusionRouteError: no row is left, or one exceeds the context.
    """
    items = []
    dropped = 0
    for number, row in enumerate(rows):
        sequences = tokenize_row(tokenizer, row)
        longest = max(len(sequence.ids) for sequence in sequences)
        if max_length is not None and longest > max_length:
            dropped += 1
            continue
        if longest > context:
            raise FusionRouteError(
                f"row {number} ({row.get('domain')}) has {longest} tokens, the members' context is {context}: "
                "set max_length to drop such rows"
            )
        items.append(Item(sequences, row.get("domain", "")))
    if not items:
        raise FusionRouteError(f"no row to train on: {len(rows)} given, {dropped} longer than max_length {max_length}")
    return items, dropped


def digest_sequences(sequences: Sequence[Tokens]) -> str:
    """What an annotation is keyed by: the ids and where completions start, so tokenizer, template and rows at once."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(
            torch.tensor([len(sequence.ids), sequence.start, *sequence.ids], dtype=torch.int32).numpy().tobytes()
        )
    return digest.hexdigest()


class Items(Dataset):
    """A list of items, as torch wants it."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


class LengthGroups(Sampler[int]):
    """Batches of similar length in random order: shuffle, sort within groups of 32 batches, shuffle the batches.

    The order is a function of (seed, epoch), so a resumed run meets the same batches.

    Args:
        lengths: of the items, in tokens.
        batch: items of an optimizer step, over all its micro-batches and processes.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        group = 32 * self.batch
        batches = []
        for start in range(0, len(order), group):
            piece = sorted(order[start : start + group], key=lambda i: self.lengths[i])
            batches += [piece[i : i + self.batch] for i in range(0, len(piece), self.batch)]
        # A short batch must stay last, or the batches after it would be cut elsewhere.
        short = [b for b in batches if len(b) < self.batch]
        whole = [b for b in batches if len(b) == self.batch]
        for index in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[index]
        for piece in short:
            yield from piece


def pack(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Row and offset of each sequence, so that rows of `width` hold them: first fit, in the order given."""
    used: list[int] = []
    places = []
    for length in lengths:
        row = next((r for r, filled in enumerate(used) if filled + length <= width), len(used))
        if row == len(used):
            used.append(0)
        places.append((row, used[row]))
        used[row] += length
    return places


@dataclass(frozen=True)
class Collator:
    """Items to one mixed batch of tensors.

    The batch has S sequences (SFT items first, then pairs as chosen, rejected, chosen, …) in R rows, right-padded to
    the longest of them, T, and N flat completion positions:

        input_ids, attention_mask `[R, T]`
        positions `[N]`   index into the flat `[R·T]` hidden states of what predicts the label
        labels `[N]`, sequence `[N]` (0 … S−1)
        sft_sequences `[1]`, sft_positions `[1]`   how many of S and of N belong to SFT items; they come first
        logprobs `[N, n]`, greedy `[N, n]`, reference `[N]`, routes `[N]`, domain `[N]` (index into `domains`)

    A sequence is a row; with `packing` a row holds as many as fit and there is

        position_ids `[R, T]`   from 0 in each sequence; 0 in padding

    and longer sequences come before shorter ones, SFT items still first.
    """

    domains: tuple[str, ...]
    pad: int
    packing: bool = False

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        ordered = [i for i in items if not i.is_pair] + [i for i in items if i.is_pair]
        if self.packing:
            ordered.sort(key=lambda i: (i.is_pair, -i.length))
        sequences = [(s, item, k) for item in ordered for k, s in enumerate(item.sequences)]
        lengths = [len(s.ids) for s, _, _ in sequences]
        width = max(lengths)
        places = pack(lengths, width) if self.packing else [(row, 0) for row in range(len(sequences))]
        ids = torch.full((1 + max(row for row, _ in places), width), self.pad)
        mask, position_ids = torch.zeros_like(ids), torch.zeros_like(ids)
        columns: dict[str, list[Tensor]] = {
            k: [] for k in ("positions", "labels", "sequence", "domain", "logprobs", "greedy", "reference", "routes")
        }
        for number, ((tokens, item, side), (row, at)) in enumerate(zip(sequences, places, strict=True)):
            here = slice(at, at + len(tokens.ids))
            ids[row, here] = torch.tensor(tokens.ids)
            mask[row, here] = 1
            position_ids[row, here] = torch.arange(len(tokens.ids))
            count = len(tokens.completion)
            annotation = item.annotations[side]
            columns["positions"].append(torch.arange(count) + row * width + at + tokens.start - 1)
            columns["labels"].append(torch.tensor(tokens.completion))
            columns["sequence"].append(torch.full((count,), number))
            columns["domain"].append(torch.full((count,), self.domains.index(item.domain)))
            columns["logprobs"].append(annotation["logprobs"])
            columns["greedy"].append(annotation["greedy"].long())
            # Only pairs have a reference; zeros in its place would be a reference too.
            columns["reference"].append(annotation["reference"] if item.is_pair else torch.zeros(count))
            columns["routes"].append(annotation["routes"].long() if item.is_pair else torch.zeros(count).long())
        batch = {key: torch.cat(values) for key, values in columns.items()}
        sft = [s for s, item, _ in sequences if not item.is_pair]
        batch |= {"input_ids": ids, "attention_mask": mask}
        if self.packing:
            batch["position_ids"] = position_ids
        batch["sft_sequences"] = torch.tensor([len(sft)])
        batch["sft_positions"] = torch.tensor([sum(len(s.completion) for s in sft)])
        return batch


def sequence_count(batch: Mapping[str, Tensor]) -> int:
    """S of a batch: every sequence has a completion."""
    return int(batch["sequence"][-1]) + 1
