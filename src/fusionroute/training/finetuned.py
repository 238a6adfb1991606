"""The baseline "Fine-tuned Model": one LoRA on the router's base, trained on the router's data by trl. No routing.

Two phases, as the router has, with its rows, rates, batches, epochs and seeds. trl's DPO knows pairs only, while
Algorithm 1 mixes chat rows into the pairs of phase 2 with weight μ. Here these rows come a phase earlier, with the
other chat rows, at their rate and with weight 1: the baseline sees every row that the router sees, as often where both
phases have as many epochs, and learns rather more from these. The first phase's adapter is DPO's reference, as the
router after phase 1 is CDPO's.
"""

import gc
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fusionroute import sources, weights
from fusionroute.errors import FusionRouteError
from fusionroute.members import LoadOptions, load_model
from fusionroute.progress import quiet
from fusionroute.training.data import tokenize_row
from fusionroute.training.experts import fit_adapter, import_trl
from fusionroute.training.lora import LoraSettings, save_adapter
from fusionroute.training.running import Progress, StopOnNan, grouping, make_arguments, train_to_the_end

_TITLE = "fine-tuned baseline"


def trl_settings(training: dict[str, Any], *, keep: Sequence[str] = ()) -> dict[str, Any]:
    """A phase's `training` for a trl config: without what only `RouterArguments` has, but for `keep`.

    What the phase leaves open is as the router's, not as trl's own defaults have it.
    """
    from transformers import TrainingArguments

    from fusionroute.training.trainer import RouterArguments

    own = {field.name for field in fields(RouterArguments)} - {field.name for field in fields(TrainingArguments)}
    defaults = {f.name: f.default for f in fields(RouterArguments) if f.name in ("learning_rate", "bf16")}
    return {**defaults, **{k: v for k, v in training.items() if k not in own or k in keep}}


def train_finetuned(
    base: str,
    rows: Sequence[dict],
    out: Path,
    *,
    lora: LoraSettings | Path,
    sft: dict[str, Any],
    dpo: dict[str, Any],
    run: Path,
    max_length: int | None,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> None:
    """Train the baseline on chat rows and then on pairs, and write its adapter to `out`.

    Args:
        base: source of the router's base.
        rows: the rows of both phases; without pairs there is no second phase.
        lora: the shape of a new adapter, or the folder of one that is trained on, as the router's is.
        sft: any field of `trl.SFTConfig`.
        dpo: any field of `trl.DPOConfig`.
        run: folder for checkpoints of both phases; a killed run goes on from the newest whole one.
        max_length: longer rows are left out, as from the router's training.

    Raises:
        FusionRouteError: no row is left, trl is missing, a loss became NaN.
    """
    from transformers import AutoTokenizer

    trl = import_trl("training the fine-tuned baseline")
    folder = sources.resolve(base, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kept = [row for row in rows if max_length is None or _tokens(tokenizer, row) <= max_length]
    chat, pairs = [r for r in kept if "messages" in r], [r for r in kept if "messages" not in r]
    if not chat:
        raise FusionRouteError(
            f"{_TITLE}: there is no chat row to train on ({len(rows)} given, max_length {max_length})"
        )
    length = {"max_length": max_length}
    first = run / "adapter"
    provenance = {
        "base": base,
        "base_digest": weights.digest(folder),
        "rows": len(chat),
        "pairs": len(pairs),
        "sft": sft,
        "lora": {"start": weights.digest(lora)} if isinstance(lora, Path) else lora.model_dump(),
    }
    if not first.is_dir() or not pairs:
        with quiet(data=True):
            config = make_arguments(trl.SFTConfig, run / "sft", length | sft)
            trainer = fit_adapter(folder, chat, config, run / "sft", title=f"{_TITLE}, SFT", lora=lora, dtype=dtype)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not pairs:
            return save_adapter(model, out, dtype, provenance)
        # In full precision: the second phase goes on from here, also after a kill.
        save_adapter(model, first, torch.float32, provenance)
        del trainer, model
        gc.collect()
    with quiet(data=True):
        config = make_arguments(trl.DPOConfig, run / "dpo", length | dpo)
        trainer = _prefer(trl.DPOTrainer, folder, first, pairs, config, run / "dpo", tokenizer, dtype)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.delete_adapter("ref")  # trl's copy of the first phase's adapter
    return save_adapter(model, out, dtype, provenance | {"dpo": dpo})


def _tokens(tokenizer: Any, row: dict) -> int:
    return max(len(sequence.ids) for sequence in tokenize_row(tokenizer, row))


def _prefer(
    trainer_class: type,
    folder: Path,
    adapter: Path,
    pairs: list[dict],
    config: Any,
    run: Path,
    tokenizer: Any,
    dtype: torch.dtype,
) -> Any:
    """DPO of an adapter to the end; returns the trainer."""
    import datasets
    from peft import PeftModel

    torch.manual_seed(config.seed)
    model = PeftModel.from_pretrained(load_model(folder, LoadOptions(dtype=dtype)), str(adapter), is_trainable=True)
    sides = ("chosen_ids", "rejected_ids")
    trainer = grouping(trainer_class, lambda row: len(row["prompt_ids"]) + max(len(row[side]) for side in sides))(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(
            [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in pairs]
        ),
        processing_class=tokenizer,
        callbacks=[Progress(f"{_TITLE}, DPO"), StopOnNan()],
    )
    train_to_the_end(trainer, run)
    return trainer
