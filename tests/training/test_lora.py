"""LoRA adapters: what the settings mean in numbers, and what is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from fusionroute.training.lora import PROVENANCE, LoraSettings, lora_config, save_adapter

IDS = torch.tensor([[5, 9, 250, 17, 33]])


@pytest.fixture
def adapted(make_lm: Callable[..., Any]) -> Any:
    """A tiny model with a non-zero adapter of rank 3 and α 12."""
    model = get_peft_model(make_lm(), lora_config(LoraSettings(r=3, alpha=12))).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "settings", [{"r": 0}, {"r": -1}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"rank": 4}, {"r": "many"}]
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        LoraSettings(**settings)


def test_the_update_is_scaled_by_alpha_over_r(adapted: Any, make_lm: Callable[..., Any]) -> None:
    plain = make_lm()
    factors = {name.removeprefix("base_model.model."): p.detach() for name, p in adapted.named_parameters()}
    with torch.no_grad():
        for name, module in plain.named_modules():
            if f"{name}.lora_A.default.weight" in factors:
                b, a = factors[f"{name}.lora_B.default.weight"], factors[f"{name}.lora_A.default.weight"]
                assert a.shape[0] == 3
                module.weight += 12 / 3 * b @ a
    torch.testing.assert_close(logits(adapted), logits(plain), rtol=1e-4, atol=1e-4)


def test_all_linear_is_every_projection_and_not_the_lm_head(adapted: Any) -> None:
    touched = {name.split(".lora_A")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert touched == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_named_modules_alone_are_adapted(make_lm: Callable[..., Any]) -> None:
    model = get_peft_model(make_lm(), lora_config(LoraSettings(target_modules=["q_proj"])))
    touched = {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert touched == {"q_proj"}


def test_dropout_reaches_the_layers(make_lm: Callable[..., Any]) -> None:
    model = get_peft_model(make_lm(), lora_config(LoraSettings(dropout=0.25)))
    rates = {m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora_dropout" in name}
    assert rates == {0.25}


def test_a_new_adapter_changes_nothing(make_lm: Callable[..., Any]) -> None:
    assert torch.equal(logits(get_peft_model(make_lm(), lora_config(LoraSettings())).eval()), logits(make_lm()))


# ---- on disk


def test_a_saved_adapter_computes_what_it_did(adapted: Any, make_lm: Callable[..., Any], tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path / "a", torch.float32, {"base": "org/name"})
    assert torch.equal(logits(PeftModel.from_pretrained(make_lm(), str(tmp_path / "a")).eval()), logits(adapted))


def test_a_saved_adapter_is_rounded_once_to_the_dtype(adapted: Any, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path / "whole", torch.float32, {})
    save_adapter(adapted, tmp_path / "half", torch.bfloat16, {})
    whole, half = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


def test_saving_leaves_the_model_as_it_was(adapted: Any, tmp_path: Path) -> None:
    before = logits(adapted)
    save_adapter(adapted, tmp_path / "a", torch.bfloat16, {})
    assert torch.equal(logits(adapted), before)


def test_the_folder_holds_the_adapter_alone(adapted: Any, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path / "a", torch.float32, {})
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", PROVENANCE
    }  # fmt: skip
    assert [n for n in load_file(tmp_path / "a" / "adapter_model.safetensors") if "lora_" not in n] == []


def test_provenance_is_written_as_given_and_names_the_base(adapted: Any, tmp_path: Path) -> None:
    provenance = {"base": "org/name", "base_digest": "sha256:0", "rows": 3, "lora": {"r": 3}}
    save_adapter(adapted, tmp_path / "a", torch.float32, provenance)
    assert json.loads((tmp_path / "a" / PROVENANCE).read_text()) == provenance
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"


def test_an_older_adapter_is_replaced_whole(adapted: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "left_over.safetensors").write_text("old")
    save_adapter(adapted, tmp_path / "a", torch.float32, {})
    assert not (tmp_path / "a" / "left_over.safetensors").exists()


def test_a_failed_save_keeps_the_older_adapter(adapted: Any, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path / "a", torch.float32, {"rows": 1})
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with pytest.raises(TypeError):
        save_adapter(adapted, tmp_path / "a", torch.float32, {"rows": object()})
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
