"""Adapters folded tensor by tensor, against PEFT's own merge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusionroute.errors import FusionRouteError
from fusionroute.integrations.folding import Folding

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
}


@pytest.fixture
def adapted(models: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Makes a base and a random adapter with these settings on it."""

    def make(target_modules: Any = "all-linear", **settings: Any) -> tuple[Path, Path]:
        base = models("base")
        torch.manual_seed(3)
        config = LoraConfig(target_modules=target_modules, task_type="CAUSAL_LM", **settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return base, tmp_path / "adapter"

    return make


def folded(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    folding = Folding(adapter)
    tensors = {name: folding(name, tensor) for name, tensor in load_file(base / "model.safetensors").items()}
    folding.finish()
    return tensors


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_is_what_peft_merges(adapted: Callable[..., tuple[Path, Path]], settings: dict[str, Any]) -> None:
    base, adapter = adapted(**settings)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    expected = merged.state_dict()
    for name, tensor in folded(base, adapter).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_what_has_no_adapter_stays_the_tensor_it_was(adapted: Callable[..., tuple[Path, Path]]) -> None:
    _, adapter = adapted(["q_proj"], r=2)
    tensor = torch.ones(4, 4, dtype=torch.bfloat16)
    assert Folding(adapter)("model.layers.0.self_attn.k_proj.weight", tensor) is tensor


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_other_kinds_of_adapter_are_refused(
    adapted: Callable[..., tuple[Path, Path]], refuses: Any, setting: dict[str, Any]
) -> None:
    _, adapter = adapted(["q_proj"], r=2)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with refuses(FusionRouteError, next(iter(setting)), "merge it with PEFT"):
        Folding(adapter)


def test_an_adapter_of_a_wider_base_is_refused(adapted: Callable[..., tuple[Path, Path]], refuses: Any) -> None:
    _, adapter = adapted(["q_proj"], r=2)
    with refuses(FusionRouteError, "[32, 32]", "[16, 16]"):
        Folding(adapter)("model.layers.0.self_attn.q_proj.weight", torch.zeros(32, 32))


def test_an_adapter_of_more_layers_is_refused(adapted: Callable[..., tuple[Path, Path]], refuses: Any) -> None:
    base, adapter = adapted(["q_proj"], r=2)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    with refuses(FusionRouteError, "1 of the adapter's modules", "model.layers.1.self_attn.q_proj"):
        folded(base, adapter)


def test_a_quantised_base_is_refused(adapted: Callable[..., tuple[Path, Path]], refuses: Any) -> None:
    _, adapter = adapted(["q_proj"], r=2)
    with refuses(FusionRouteError, "torch.int8"):
        Folding(adapter)("model.layers.0.self_attn.q_proj.weight", torch.zeros(16, 16, dtype=torch.int8))
