"""Tiny random models and a tokenizer, made on the fly: what `--tiny` runs on and what the tests are built from.

They prove wiring, not quality.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionroute.recipe import Recipe

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What the merges are learnt from; any text would do.
_TEXT = (
    "A farmer has 12 cows and buys 3 more. How many cows has he now? He has 12 + 3 = 15 cows.",
    "def add(a, b):\n    return a + b\n\nassert add(1, 2) == 3",
    "Write a function that returns the sum of a list. The answer to the question is below.",
)
# Architectures that `--tiny` takes after, by a part of the base's name: family, and what sets it apart.
_LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3": (
        "llama",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
            },
        },
    ),
    "gemma-2": ("gemma2", {}),
}  # fmt: skip


def make_tokenizer(folder: Path, *, vocab_size: int = 320, eos: str = "<|im_end|>") -> Any:
    """Train a byte-level BPE of `vocab_size` ids and save it, chat template included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _TEXT * 2,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(
    folder: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    vocab_size: int = 320,
    sliding_window: int = 6,
    scale: float = 0.2,
    dtype: Any = None,
    **more: Any,
) -> Any:
    """Make a random causal LM of `family` (llama, qwen2, gemma2), save it beside its tokenizer files and return it.

    Args:
        vocab_size: rows of the embedding; more than the tokenizer has makes a padded vocabulary.
        sliding_window: of Gemma-2; shorter than the tests' texts, so that it matters.
        scale: spread of the weights; the usual 0.02 makes all arg-max ties.
        more: fields of the model's config.
    """
    import torch
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "max_position_embeddings": 512,
        "initializer_range": scale,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        **more,
    }
    torch.manual_seed(seed)
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**common))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common))
    elif family == "gemma2":
        extra = {"sliding_window": sliding_window, "head_dim": width // heads, "query_pre_attn_scalar": width // heads}
        model = Gemma2ForCausalLM(Gemma2Config(**common, **extra))
    else:
        raise ValueError(f"unknown family {family!r}")
    model = model.to(dtype or torch.float32).eval()
    model.save_pretrained(folder)
    return model


def make_adapter(folder: Path, model: Any, *, seed: int = 0, rank: int = 4, scale: float = 0.3) -> None:
    """Make a random LoRA adapter on `model` (both factors non-zero) and save it; `model` is left as it was."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=scale)
    wrapped.save_pretrained(folder, save_embedding_layers=False)


def _pair(a: int, b: int) -> "dict[str, Any]":
    """A sum as a preference row, right and wrong."""
    right, wrong = ([{"role": "assistant", "content": f"It is {v}."}] for v in (a + b, a - b))
    return {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "chosen": right, "rejected": wrong}


def shrink_recipe(recipe: "Recipe", folder: Path) -> "tuple[Recipe, Path]":
    """The recipe shrunk to random models and a few built-in rows under `folder`: every stage, in about a minute."""
    import json
    import random

    import yaml

    from fusionroute.progress import quiet
    from fusionroute.training.rows import DataSpec

    folder = folder.resolve()  # the recipe written below is to be read from anywhere
    family, more = next((like for part, like in _LIKE.items() if part in recipe.base.lower()), ("llama", {}))

    def model(name: str, seed: int) -> str:
        made = folder / f"tiny-{name}"
        if not (made / "config.json").is_file():
            with quiet():
                tokenizer = make_tokenizer(made)
                make_model(made, family=family, seed=seed, vocab_size=len(tokenizer), scale=0.1, **more)
        return str(made)

    data = folder / "tiny-data"
    data.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    chat, pairs = [], []
    for index in range(48):
        a, b = generator.randint(1, 99), generator.randint(1, 99)
        pair = _pair(a, b)
        chat.append({"messages": pair["prompt"] + pair["chosen"], "index": index})
        pairs.append(pair)
    # Of other questions than the pairs above: a reward model must not have seen what the router was trained on.
    rewarded = [_pair(100 + index, 7) for index in range(96)]
    for name, rows in (("chat", chat), ("pairs", pairs), ("reward-pairs", rewarded)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def shrink(specs: list[Any]) -> list[Any]:
        small = []
        for number, spec in enumerate(specs):
            file, kind = ("pairs.jsonl", "preference") if spec.paired else ("chat.jsonl", "messages")
            start = 6 * (number % 6)
            small.append(
                DataSpec(format=kind, path=file, domain=spec.domain, start=start, stop=start + 12)  # type: ignore[arg-type]
            )
        return small

    steps = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_steps": 2,
        "logging_steps": 1,
    }
    small = recipe.model_copy(deep=True)
    small.base, small.revision, small.dtype, small.max_length = model("base", 0), None, "float32", 128
    small.benchmarks = []
    for number, expert in enumerate(small.experts, start=1):
        expert.source = None if expert.source is None else model(expert.name, number)
        expert.revision = expert.adapter = None
        # A high rate, so that three steps make experts that disagree.
        fast = {**steps, "bf16": False, "learning_rate": 0.02}
        expert.data, expert.training = shrink(expert.data), {**expert.training, **fast}
    small.router.source = small.router.revision = None
    for phase in (small.sft, small.cdpo):
        if phase is not None:
            phase.data, phase.training = shrink(phase.data), {**phase.training, **steps, "bf16": False}
    if small.finetuned is not None:
        small.finetuned.training = small.finetuned.dpo = {}
    # Slices of their own for training and for what is held out.
    slices = iter(range(0, len(rewarded), 6))
    for reward in small.rewards:
        reward.training = {**reward.training, **steps, "bf16": False}
        for specs in (reward.data, reward.heldout):
            specs[:] = [
                DataSpec(format="preference", path="reward-pairs.jsonl", domain=s.domain, start=start, stop=start + 6)
                for s, start in zip(specs, slices, strict=False)
            ]
    small.heldout = shrink(small.heldout)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small.model_dump(mode="json", exclude_unset=True)))
    return small, data
