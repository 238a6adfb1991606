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
from fusionroute.training.logprobs import score_labels
from fusionroute.training.lora import LoraSettings, lora_config, save_adapter
from fusionroute.training.running import Progress, StopOnNan, make_arguments, quiet, train_to_the_end


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
) -> None:
    """Train a LoRA expert on chat rows and write it to `out`.

    Args:
        base: source of the base model (`fusionroute.sources`).
        rows: chat rows; the loss is on the last assistant message alone.
        arguments: any field of `trl.SFTConfig`.
        run: folder for checkpoints; a killed run goes on from the newest whole one.

    Raises:
        FusionRouteError: no rows, trl is missing, or the loss became NaN.
    """
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise FusionRouteError("training an expert needs trl: pip install 'fusionroute[train]'") from error
    import datasets
    from peft import get_peft_model
    from transformers import AutoTokenizer
    from transformers.trainer_callback import PrinterCallback

    if not rows:
        raise FusionRouteError(f"expert {name}: there is no row to train on")
    folder = sources.resolve(base)
    data = datasets.Dataset.from_list(
        [{"prompt": row["messages"][:-1], "completion": [row["messages"][-1]]} for row in rows]
    )
    with quiet():
        model = load_model(folder, LoadOptions(dtype=dtype))
        config = make_arguments(SFTConfig, run, arguments)
        torch.manual_seed(config.seed)  # SFTTrainer seeds itself, but the adapter is initialised before it
        peft_model = get_peft_model(model, lora_config(lora))
        trainer = _trainer_class(SFTTrainer)(
            model=peft_model,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[Progress(f"expert {name}"), StopOnNan()],
        )
        if len(trainer.train_dataset) == 0:
            raise FusionRouteError(
                f"expert {name}: max_length {config.max_length} cuts all {len(rows)} rows short of an answer: raise it"
            )
        trainer.remove_callback(PrinterCallback)
        train_to_the_end(trainer, run)
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
