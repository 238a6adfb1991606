"""Reward models: a LoRA and a score head on a causal LM's base, trained on preference pairs by trl's RewardTrainer.

Bradley-Terry loss: −log σ(r(chosen) − r(rejected)). Pairs in, an adapter folder out; knows nothing of what is scored
with it (`fusionroute.evaluation.reward` loads it).
"""

from pathlib import Path
from typing import Any

import torch

from fusionroute import sources, weights
from fusionroute.errors import FusionRouteError
from fusionroute.progress import quiet
from fusionroute.training.experts import import_trl
from fusionroute.training.lora import LoraSettings, lora_config, save_adapter
from fusionroute.training.running import Progress, StopOnNan, grouping, make_arguments, train_to_the_end

_HEAD = "score"  # what transformers calls the head of a causal LM that classifies


def train_reward(
    base: str,
    pairs: list[dict],
    out: Path,
    *,
    name: str,
    lora: LoraSettings,
    arguments: dict[str, Any],
    run: Path,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> None:
    """Train a reward model on preference rows and write its adapter, score head included, to `out`.

    Args:
        base: source of the base model; its tokenizer and chat template are the reward model's.
        pairs: preference rows; trl leaves out those longer than `max_length`.
        arguments: any field of `trl.RewardConfig`.
        run: folder for checkpoints; a killed run goes on from the newest whole one.

    Raises:
        FusionRouteError: no pair is left, trl is missing, a row is no pair, the loss became NaN.
    """
    import datasets
    from peft import get_peft_model
    from transformers import AutoTokenizer

    trl = import_trl("training a reward model")
    title = f"reward model {name}"
    strangers = sum("chosen" not in row for row in pairs)
    if strangers or not pairs:
        raise FusionRouteError(f"{title}: {len(pairs)} rows, {strangers} of them no pairs: it trains on pairs")
    folder = sources.resolve(base, revision=revision)
    data = datasets.Dataset.from_list([{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in pairs])
    with quiet(data=True):
        config = make_arguments(trl.RewardConfig, run, arguments)
        torch.manual_seed(config.seed)  # the head and the adapter are initialised before the trainer seeds itself
        model = _load_classifier(folder, dtype)
        settings = lora_config(lora, task_type="SEQ_CLS", modules_to_save=[_HEAD])
        trainer = grouping(trl.RewardTrainer, lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])))(
            model=get_peft_model(model, settings),
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[Progress(title), StopOnNan()],
        )
        left = len(trainer.train_dataset)
        if left == 0:
            raise FusionRouteError(f"{title}: all {len(pairs)} pairs are longer than max_length {config.max_length}")
        train_to_the_end(trainer, run)
    provenance = {
        "base": base,
        "base_digest": weights.digest(folder),
        "pairs": left,
        "too_long": len(pairs) - left,
        "tokens": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step,
        "arguments": arguments,
        "lora": lora.model_dump(),
    }
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), out, dtype, provenance)


def _load_classifier(folder: Path, dtype: torch.dtype) -> Any:
    """The base with a new score head, which trains in float32 as the adapter does."""
    from transformers import AutoModelForSequenceClassification

    weights.check_model(folder)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    absent = [key for key in loading["missing_keys"] if not key.startswith(f"{_HEAD}.")]
    if absent or not hasattr(model, _HEAD):
        raise FusionRouteError(
            f"{folder}: {type(model).__name__} cannot be made a reward model: no {[_HEAD, *absent][-1]}"
        )
    head = getattr(model, _HEAD).float()
    head.register_forward_pre_hook(lambda module, given: (given[0].to(module.weight.dtype),))
    return model.requires_grad_(False)
