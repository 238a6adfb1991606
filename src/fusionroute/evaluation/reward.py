"""A reward model: text in, a number out, for selection among answers and for judging them offline.

Any sequence-classification model of transformers with one label, with a tokenizer of its own; it need not know the
collection's. How often it prefers the better of two held-out answers stands beside it, in `reward.json`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusionroute import sources, weights
from fusionroute.errors import FusionRouteError, first_line
from fusionroute.files import read_json


class RewardModel:
    """How good answers are.

    Args:
        source: as a member's: path, Hub id, …; SOURCE+ADAPTER for a LoRA on a base.
        max_length: tokens of prompt and answer; of longer ones the prompt's beginning is cut off.

    Raises:
        FusionRouteError: it is no sequence-classification model with one label.
    """

    def __init__(self, source: str, *, dtype: torch.dtype = torch.float32, max_length: int = 1024) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.source, self.max_length = source, max_length
        base, _, adapter = source.partition("+")
        folder = sources.resolve(base)
        adapter_folder = sources.resolve(adapter, what="adapter") if adapter else None
        self.digest = [weights.digest(folder), None if adapter_folder is None else weights.digest(adapter_folder)]
        try:
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype=dtype, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise FusionRouteError(f"{source} is no sequence-classification model: {first_line(error)}") from error
        if adapter_folder is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload()
        elif not _has_score_head(folder):
            raise FusionRouteError(f"{source} has no trained score head: name a reward model, not a language model")
        self.tokenizer = AutoTokenizer.from_pretrained(adapter_folder or folder)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The answer is at the end, so what is too long loses its beginning.
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.eval()
        about = (adapter_folder or folder) / "reward.json"
        self.accuracy: dict[str, Any] | None = read_json(about) if about.is_file() else None

    @torch.inference_mode()
    def score(self, answers: Sequence[tuple[str, str]], batch: int = 16) -> list[float]:
        """Of (prompt, answer) pairs; those of like length share a pass."""
        texts = [self._text(prompt, answer) for prompt, answer in answers]
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

    def _text(self, prompt: str, answer: str) -> str:
        if self.tokenizer.chat_template is None:
            return f"{prompt}\n\n{answer}"
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))


def _has_score_head(folder: Path) -> bool:
    heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "v_head.summary.weight")
    return any(name.endswith(heads) for name in weights.read_tensors(folder))
