"""A reward model: text in, a number out, for selection among answers and for judging them offline.

Any sequence-classification model of transformers with one label, with a tokenizer of its own; it need not know the
collection's. How often it prefers the better of two held-out answers stands beside it, in `reward.json`.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusionroute import sources, weights
from fusionroute.baselines.carried import REWARD_FILE, split_adapter
from fusionroute.copying import PROVENANCE
from fusionroute.errors import FusionRouteError, first_line
from fusionroute.evaluation.statistics import proportion_of
from fusionroute.files import read_json
from fusionroute.placement import best_device
from fusionroute.progress import Meter, quiet


class RewardModel:
    """How good answers are.

    Args:
        source: as a member's: path, Hub id, …; SOURCE+ADAPTER for a LoRA with a score head on a base.
        max_length: tokens of prompt and answer; of longer ones the prompt's beginning is cut off.

    Raises:
        FusionRouteError: it is no sequence-classification model with one label, or an adapter without a score head.

    Attributes:
        accuracy: what `reward.json` says of held-out pairs (`pair_accuracy`), or None.
    """

    def __init__(self, source: str, *, dtype: torch.dtype = torch.float32, max_length: int = 1024) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.source, self.max_length = source, max_length
        base, adapter = split_adapter(source)
        folder = sources.resolve(base)
        adapter_folder = sources.resolve(adapter, what="adapter") if adapter else None
        self.digest = [weights.digest(folder), None if adapter_folder is None else weights.digest(adapter_folder)]
        if not _has_score_head(adapter_folder or folder):
            raise FusionRouteError(f"{source} has no trained score head: name a reward model, not a language model")
        try:
            with quiet():  # a base has no head, and transformers says so at length
                model: Any = AutoModelForSequenceClassification.from_pretrained(
                    folder, num_labels=1, dtype=dtype, trust_remote_code=False
                )
        except (OSError, ValueError, RuntimeError) as error:  # the last: a head of another shape
            reason = first_line(error)
            raise FusionRouteError(f"{source} is no sequence-classification model with one label: {reason}") from error
        if adapter_folder is not None:
            from peft import PeftModel

            self._warn_of_another_base(adapter_folder)
            model = PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload()
        # An adapter has its base's tokenizer, unless it brings one.
        own = adapter_folder is not None and (adapter_folder / "tokenizer_config.json").is_file()
        self.tokenizer = AutoTokenizer.from_pretrained(adapter_folder if own else folder)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The answer is at the end, so what is too long loses its beginning.
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(best_device()).eval()
        about = (adapter_folder or folder) / REWARD_FILE
        found = read_json(about) if about.is_file() else None
        # Somebody else's file of that name says something else.
        ours = isinstance(found, dict) and {"value", "low", "high", "n", "sources"} <= found.keys()
        self.accuracy: dict[str, Any] | None = found if ours else None

    def score(self, answers: Sequence[tuple[str, str]], batch: int = 16) -> list[float]:
        """One number for each (prompt, answer) pair, in order; more is better."""
        return self.score_chats(
            [[_message("user", prompt), _message("assistant", answer)] for prompt, answer in answers], batch
        )

    @torch.inference_mode()
    def score_chats(self, chats: Sequence[Sequence[Mapping[str, str]]], batch: int = 16) -> list[float]:
        """One number for each conversation that ends with the assistant; those of like length share a pass."""
        texts = [self._text(messages) for messages in chats]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        values = [0.0] * len(texts)
        for first in range(0, len(order), batch):
            mine = order[first : first + batch]
            inputs = self.tokenizer(
                [texts[i] for i in mine],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                add_special_tokens=self.tokenizer.chat_template is None,
                return_tensors="pt",
            ).to(self.model.device)
            for i, value in zip(mine, self.model(**inputs).logits[:, 0].float().tolist(), strict=True):
                values[i] = value
        return values

    def encode(self, prompt: str, answer: str) -> list[int]:
        """Ids of one pair as `score` reads them, but for what is cut off of too long ones."""
        text = self._text([_message("user", prompt), _message("assistant", answer)])
        return list(self.tokenizer(text, add_special_tokens=self.tokenizer.chat_template is None)["input_ids"])

    def _text(self, messages: Sequence[Mapping[str, str]]) -> str:
        if self.tokenizer.chat_template is None:
            return "\n\n".join(message["content"] for message in messages)
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False))

    def _warn_of_another_base(self, adapter: Path) -> None:
        trained_on = read_json(adapter / PROVENANCE).get("base_digest") if (adapter / PROVENANCE).is_file() else None
        if trained_on not in (None, self.digest[0]):
            warnings.warn(
                f"reward model {adapter}: its base has digest {self.digest[0]}, it was trained on {trained_on}; "
                "its held-out accuracy was measured with the latter",
                stacklevel=3,
            )


def pair_accuracy(model: RewardModel, groups: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> dict:
    """How often the better of two answers is scored higher, with 95 % intervals: what `reward.json` holds.

    Args:
        groups: where pairs come from, told in any form with a `domain`, and the preference rows.

    Returns:
        `{"value", "low", "high", "n"}` over all pairs, the same in `domains` by name and in `sources` by group.
    """
    with Meter("scoring held-out pairs", sum(len(rows) for _, rows in groups), "pairs") as meter:
        right: list[list[float]] = []
        for _, rows in groups:
            found: list[float] = []
            for first in range(0, len(rows), 32):
                part = rows[first : first + 32]
                scores = model.score_chats(
                    [[*row["prompt"], *row[side]] for row in part for side in ("chosen", "rejected")]
                )
                found += [float(chosen > rejected) for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
                meter.advance(len(part))
            right.append(found)
    domains = dict.fromkeys(str(where["domain"]) for where, _ in groups)
    return {
        **_estimate(right),
        "domains": {
            name: _estimate([part for (where, _), part in zip(groups, right, strict=True) if where["domain"] == name])
            for name in domains
        },
        "sources": [{**_estimate([part]), "data": dict(where)} for (where, _), part in zip(groups, right, strict=True)],
    }


def _estimate(parts: Sequence[Sequence[float]]) -> dict[str, Any]:
    found = proportion_of([value for part in parts for value in part])
    return {"value": found.mean, "low": found.low, "high": found.high, "n": found.n}


def describe(accuracy: Mapping[str, Any]) -> str:
    """What `reward.json` holds as words: the better of two held-out answers preferred in so many per cent."""
    value, low, high = (f"{100 * accuracy[key]:.1f}" for key in ("value", "low", "high"))
    parts = ", ".join(
        f"{100 * part['value']:.1f} % of {part['n']} from {part['data'].get('path')}" for part in accuracy["sources"]
    )
    return f"prefers the better answer in {value} % [{low}, {high}] of {accuracy['n']} held-out pairs ({parts})"


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _has_score_head(folder: Path) -> bool:
    heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "v_head.summary.weight")
    adapter = folder / "adapter_model.safetensors"
    tensors = weights.read_header(adapter) if adapter.is_file() else weights.read_tensors(folder)
    return any(name.endswith(heads) for name in tensors)
