"""LoRA experts: a thin step around trl's SFTTrainer. Rows in, an adapter folder out; knows nothing of routing.

Only the loss is ours: the same number, from the frozen LM head of `logprobs.score_labels`. trl's chunked head computes
the logits twice and took half of a step on the CPU measured.
"""

from pathlib import Path
from typing import Any

import torch

from fusionroute import sources, weights
from fusionroute.errors import FusionRouteError
from fusionroute.lm_head import Head, hidden_states
from fusionroute.members import LoadOptions, load_model
from fusionroute.progress import quiet
from fusionroute.training.logprobs import score_labels
from fusionroute.training.lora import LoraSettings, lora_config, save_adapter
from fusionroute.training.running import Progress, StopOnNan, make_arguments, train_to_the_end


def train_expert(
    base: str,
    rows: list[dict],
    out: Path,
    *,
    name: str,
    lora: LoraSettings,
    arguments: dict[str, Any],
    run: Path,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> None:
    """Train a LoRA expert on chat rows and write it to `out`.

    Args:
        base: source of the base model (`fusionroute.sources`).
        rows: chat rows; the loss is on the last assistant message alone.
        arguments: any field of `trl.SFTConfig`.
        run: folder for checkpoints; a killed run goes on from the newest whole one.
        revision: of a base from the Hub.

    Raises:
        FusionRouteError: no rows, trl is missing, or the loss became NaN.
    """
    SFTConfig = import_trl("training an expert").SFTConfig
    if not rows:
        raise FusionRouteError(f"expert {name}: there is no row to train on")
    folder = sources.resolve(base, revision=revision)
    with quiet(data=True):
        config = make_arguments(SFTConfig, run, arguments)
        trainer = fit_adapter(folder, rows, config, run, title=f"expert {name}", lora=lora, dtype=dtype)
    provenance = {
        "base": base,
        "base_digest": weights.digest(folder),
        "rows": len(rows),
        "tokens": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step,
        "arguments": arguments,
        "lora": lora.model_dump(),
    }
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), out, dtype, provenance)


def import_trl(what: str) -> Any:
    """The trl package.

    Raises:
        FusionRouteError: it is missing; `what` needs it.
    """
    try:
        import trl
    except ImportError as error:
        raise FusionRouteError(f"{what} needs trl: pip install 'fusionroute[train]'") from error
    return trl


def fit_adapter(
    folder: Path, rows: list[dict], config: Any, run: Path, *, title: str, lora: LoraSettings | Path, dtype: torch.dtype
) -> Any:
    """Train a LoRA on the model in `folder` by trl's SFTTrainer to the end; returns the trainer.

    Args:
        config: an `SFTConfig`.
        lora: the shape of a new adapter, or the folder of one that is trained on.

    Raises:
        FusionRouteError: `max_length` leaves nothing of any answer, or the loss became NaN.
    """
    import datasets
    from peft import PeftModel, get_peft_model
    from transformers import AutoTokenizer

    data = datasets.Dataset.from_list(
        [{"prompt": row["messages"][:-1], "completion": [row["messages"][-1]]} for row in rows]
    )
    model = load_model(folder, LoadOptions(dtype=dtype))
    torch.manual_seed(config.seed)  # SFTTrainer seeds itself, but the adapter is initialised before it
    adapted: Any
    if isinstance(lora, Path):
        adapted = PeftModel.from_pretrained(model, str(lora), is_trainable=True)
    else:
        adapted = get_peft_model(model, lora_config(lora))
    trainer = _trainer_class(import_trl("training an expert").SFTTrainer)(
        model=adapted,
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Progress(title), StopOnNan()],
    )
    if len(trainer.train_dataset) == 0:
        raise FusionRouteError(
            f"{title}: max_length {config.max_length} cuts all {len(rows)} rows short of an answer: raise it"
        )
    train_to_the_end(trainer, run)
    return trainer


def _trainer_class(sft_trainer: type) -> Any:
    """trl's SFTTrainer with our chunked loss; a function, because trl is imported only when an expert is trained."""

    class ExpertTrainer(sft_trainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # Ours is the plain loss on padded rows; data parallelism hooks into a forward that it does not call.
            plain = self.args.loss_type == "nll" and self.label_smoother is None and "attention_mask" in inputs
            if return_outputs or self.args.world_size > 1 or num_items_in_batch is None or not plain:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            lm = model.get_base_model()
            labels = inputs["labels"][:, 1:]
            where = labels != -100
            # accelerate puts autocast around the model's own forward only.
            with self.accelerator.autocast():
                hidden = hidden_states(lm, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
                scores = score_labels(hidden[:, :-1][where], Head(lm), labels[where])
            return -scores.logprobs.sum() / num_items_in_batch

    return ExpertTrainer
