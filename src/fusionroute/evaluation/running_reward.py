"""A reward model that follows answers as they grow: of texts that begin alike it reads the beginning once.

Collab scores several continuations of one answer at every token. Rows keep the reward model's keys and values of what
their texts had in common last time. Texts of a model that cannot work so, or longer than it reads, are scored whole.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from fusionroute.evaluation.reward import RewardModel


class RunningReward:
    """Scores as `RewardModel.score` gives them, for `Collab`.

    Args:
        reward: the model.
    """

    def __init__(self, reward: RewardModel) -> None:
        self.reward = reward
        model = reward.model
        self.backbone: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
        head = getattr(model, "score", None)
        self.head: Any = head if isinstance(head, nn.Linear) and self.backbone is not None else None
        self.known: dict[int, tuple[list[int], Any]] = {}  # by row: ids that are read, and their keys and values

    @torch.inference_mode()
    def __call__(self, row: int, prompt: str, answers: Sequence[str]) -> list[float]:
        """Of one row's answers so far."""
        reward = self.reward
        if self.head is None:
            return reward.score([(prompt, answer) for answer in answers])
        rows = [self._scored(reward.encode(prompt, answer)) for answer in answers]
        if max(map(len, rows)) > reward.max_length:
            return reward.score([(prompt, answer) for answer in answers])
        common = min(_common(rows[0], other) for other in rows)
        common = min(common, *(len(ids) - 1 for ids in rows))  # each has a last token of its own to be scored at
        cache = self._read(row, rows[0][:common])
        cache.batch_repeat_interleave(len(rows))
        tails = [ids[common:] for ids in rows]
        width = max(map(len, tails))
        padded = torch.tensor([tail + [0] * (width - len(tail)) for tail in tails], device=self.head.weight.device)
        # Padding stands behind: what is before it does not see it.
        hidden = self.backbone(input_ids=padded, past_key_values=cache, use_cache=True).last_hidden_state
        last = torch.tensor([len(tail) - 1 for tail in tails], device=hidden.device)
        scores = self.head(hidden[torch.arange(len(tails), device=hidden.device), last])[:, 0]
        return [float(score) for score in scores.float()]

    def _scored(self, ids: list[int]) -> list[int]:
        """As far as the model's own head reads: to the last token that is not padding, which an end may be."""
        length = len(ids)
        while length > 1 and ids[length - 1] == self.reward.tokenizer.pad_token_id:
            length -= 1
        return ids[:length]

    def _read(self, row: int, ids: list[int]) -> Any:
        """Keys and values of `ids`, a copy to go on from; reads what the row's do not have yet."""
        from transformers import DynamicCache

        read, cache = self.known.get(row, ([], DynamicCache()))
        kept = _common(read, ids)
        if kept < len(read):
            cache.crop(kept - len(read))
        if kept < len(ids):
            more = torch.tensor([ids[kept:]], device=self.head.weight.device)
            self.backbone(input_ids=more, past_key_values=cache, use_cache=True)
        self.known[row] = (ids, cache)
        return deepcopy(cache)

    def forget(self, row: int) -> None:
        """A row has ended."""
        self.known.pop(row, None)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first ids agree."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
