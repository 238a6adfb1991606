"""Members: what is loaded, what is shared, what is refused. Parity with transformers and PEFT on their own."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusionroute import tiny, weights
from fusionroute.configuration import FusionRouteConfig, MemberSpec
from fusionroute.errors import FusionRouteError
from fusionroute.members import LoadOptions, Member, attach_adapter, load_members, load_model

IDS = torch.tensor([[5, 9, 250, 17, 33, 4, 4, 90]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.make_model(tmp_path / "base", width=16)
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes an adapter on `base`."""

    def make(seed: int, on: Path = base) -> Path:
        folder = tmp_path / f"adapter{seed}"
        tiny.make_adapter(folder, AutoModelForCausalLM.from_pretrained(on), seed=seed)
        return folder

    return make


def alone(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """Logits of a model, or of an adapter on it, loaded without fusionroute."""
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def logits(member: Member) -> torch.Tensor:
    with torch.no_grad():
        return member(input_ids=IDS, use_cache=False).logits


def members(*specs: MemberSpec, **options: Any) -> list[Member]:
    return load_members(specs, None, LoadOptions(**options))


def on_base(base: Path, *specs: MemberSpec) -> list[Member]:
    """The members with another base, as a collection loads them."""
    config = FusionRouteConfig()
    config.set_members(specs[0], list(specs[1:]))
    return load_members(config.specs_on(str(base)), None, LoadOptions(other_base=str(base)))


def edit(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})


# ---- sharing


def test_each_of_several_adapters_on_one_base_is_itself(base: Path, adapter: Callable[..., Path]) -> None:
    folders = [adapter(1), adapter(2), None]
    specs = [
        MemberSpec(n, str(base), adapter=f and str(f)) for n, f in zip(["router", "math", "code"], folders, strict=True)
    ]
    loaded = members(*specs)
    # Back and forth: switching must leave nothing behind.
    for index in (0, 1, 2, 1, 0, 2, 0):
        assert torch.allclose(logits(loaded[index]), alone(base, folders[index]), atol=1e-6), specs[index].name


def test_members_on_one_base_hold_one_copy_of_it(base: Path, adapter: Callable[..., Path]) -> None:
    loaded = members(
        MemberSpec("router", str(base), adapter=str(adapter(1))),
        MemberSpec("math", str(base), adapter=str(adapter(2))),
        MemberSpec("code", str(base)),
        MemberSpec("text", str(base)),
    )
    assert len({id(member.model) for member in loaded}) == 1


def test_one_base_written_two_ways_is_loaded_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    first, second = members(MemberSpec("router", "./base"), MemberSpec("math", str(base)))
    assert first.model is second.model


@pytest.mark.parametrize("name", ["model", "base_model", "layers", "weight", "default", "lora", "self_attn", "q_proj"])
def test_adapter_may_have_the_name_of_a_module(name: str, base: Path, adapter: Callable[..., Path]) -> None:
    folder = adapter(1)
    loaded = members(MemberSpec("router", str(base)), MemberSpec(name, str(base), adapter=str(folder)))
    assert torch.allclose(logits(loaded[1]), alone(base, folder), atol=1e-6)


def test_nothing_can_be_trained_by_accident(base: Path, adapter: Callable[..., Path]) -> None:
    loaded = members(
        MemberSpec("router", str(base), adapter=str(adapter(1))),
        MemberSpec("math", str(base), adapter=str(adapter(2))),
        MemberSpec("code", str(base)),
    )
    for member in loaded:
        logits(member)
        assert not member.model.training
        assert [name for name, p in member.model.named_parameters() if p.requires_grad] == []


# ---- options


def test_dtype_reaches_bases_and_adapters(base: Path, adapter: Callable[..., Path]) -> None:
    loaded = members(MemberSpec("router", str(base), adapter=str(adapter(1))), dtype=torch.bfloat16)
    assert {p.dtype for p in loaded[0].parameters()} == {torch.bfloat16}


def test_without_dtype_the_files_decide(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "bf16", width=16, dtype=torch.bfloat16)
    assert {p.dtype for p in load_model(tmp_path / "bf16", LoadOptions()).parameters()} == {torch.bfloat16}


def test_gemma2_runs_eager_beside_sdpa_members(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "gemma2", family="gemma2")
    tiny.make_model(tmp_path / "llama")
    options = LoadOptions(attn_implementation="sdpa")
    implementations = [load_model(tmp_path / f, options).config._attn_implementation for f in ("gemma2", "llama")]
    assert implementations == ["eager", "sdpa"]


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2"])
def test_default_attention_equals_eager(family: str, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, family=family)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        expected = eager(input_ids=IDS).logits
        assert torch.allclose(load_model(tmp_path, LoadOptions())(input_ids=IDS).logits, expected, atol=1e-5)


# ---- another base


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    """A copy of the base with slightly other weights."""
    shutil.copytree(base, tmp_path / "other")
    edit(tmp_path / "other", "model.safetensors", lambda t: {k: v * 1.01 for k, v in t.items()})
    return tmp_path / "other"


def test_another_base_warns_with_both_digests_and_is_used(
    base: Path, other: Path, adapter: Callable[..., Path]
) -> None:
    spec = MemberSpec("router", str(base), adapter=str(adapter(1)), digest=weights.digest(base))
    with pytest.warns(UserWarning, match=rf"{weights.digest(other)}.*{spec.digest}"):
        loaded = on_base(other, spec)
    assert torch.allclose(logits(loaded[0]), alone(other, adapter(1)), atol=1e-6)


def test_a_copy_of_the_base_does_not_warn(base: Path, tmp_path: Path, adapter: Callable[..., Path]) -> None:
    shutil.copytree(base, tmp_path / "copy")
    spec = MemberSpec("router", str(base), adapter=str(adapter(1)), digest=weights.digest(base))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        on_base(tmp_path / "copy", spec)


def test_another_base_is_not_looked_for_at_the_old_place(base: Path, other: Path, adapter: Callable[..., Path]) -> None:
    spec = MemberSpec("router", str(base), adapter=str(adapter(1)))
    shutil.rmtree(base)
    assert torch.allclose(logits(on_base(other, spec)[0]), alone(other, adapter(1, on=other)), atol=1e-6)


def test_another_base_replaces_the_bare_base_too(base: Path, other: Path, adapter: Callable[..., Path]) -> None:
    specs = [MemberSpec("router", str(base)), MemberSpec("math", str(base), adapter=str(adapter(1)))]
    assert torch.allclose(logits(on_base(other, *specs)[0]), alone(other), atol=1e-6)


def test_another_base_excuses_no_other_member(
    base: Path, other: Path, adapter: Callable[..., Path], tmp_path: Path, refuses: Callable
) -> None:
    tiny.make_model(tmp_path / "whole", width=16, seed=5)
    specs = [
        MemberSpec("router", str(base), adapter=str(adapter(1)), digest=weights.digest(base)),
        MemberSpec("math", str(tmp_path / "whole"), digest="sha256:" + "0" * 64),
    ]
    with warnings.catch_warnings(), refuses(FusionRouteError, "math", "sha256:" + "0" * 64):
        warnings.simplefilter("ignore")
        on_base(other, *specs)


# ---- refusals


def test_missing_weights_are_refused(base: Path, refuses: Callable) -> None:
    (base / "model.safetensors").unlink()
    with refuses(FusionRouteError, base):
        members(MemberSpec("router", str(base)))


@pytest.mark.parametrize("left", [0, 100, -1])
def test_half_written_weights_are_refused(base: Path, left: int, refuses: Callable) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with refuses(FusionRouteError, path, "not a whole safetensors file"):
        members(MemberSpec("router", str(base)))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_weight_that_is_not_there_is_never_made_up(base: Path, name: str, refuses: Callable) -> None:
    edit(base, "model.safetensors", lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with refuses(FusionRouteError, base, "missing keys"):
        load_model(base, LoadOptions())


def test_weight_too_many_is_refused(base: Path, refuses: Callable) -> None:
    edit(base, "model.safetensors", lambda tensors: tensors | {"model.extra.weight": torch.ones(2)})
    with refuses(FusionRouteError, base, "unexpected keys", "model.extra.weight"):
        load_model(base, LoadOptions())


def test_weight_of_another_shape_is_refused(base: Path, refuses: Callable) -> None:
    edit(base, "model.safetensors", lambda t: t | {"model.norm.weight": torch.ones(17)})
    with refuses(FusionRouteError, base):
        load_model(base, LoadOptions())


def test_config_of_another_depth_is_refused(base: Path, refuses: Callable) -> None:
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 3}
    (base / "config.json").write_text(json.dumps(config))
    with refuses(FusionRouteError, base):
        load_model(base, LoadOptions())


def test_half_written_model_config_is_refused(base: Path, refuses: Callable) -> None:
    (base / "config.json").write_text((base / "config.json").read_text()[:50])
    with refuses(FusionRouteError, base / "config.json"):
        load_model(base, LoadOptions())


def test_unknown_architecture_is_refused(base: Path, refuses: Callable) -> None:
    config = json.loads((base / "config.json").read_text()) | {"model_type": "no_such_model"}
    (base / "config.json").write_text(json.dumps(config))
    with refuses(FusionRouteError, base, "no_such_model"):
        load_model(base, LoadOptions())


def test_dtype_that_no_model_can_have_is_refused(base: Path, refuses: Callable) -> None:
    with refuses(FusionRouteError, base):
        load_model(base, LoadOptions(dtype=torch.int8))


@pytest.mark.parametrize("value", [{"hidden_size": "wide"}, {"model_type": 5}])
def test_config_with_a_value_of_another_type_is_refused(base: Path, value: dict[str, Any], refuses: Callable) -> None:
    config = json.loads((base / "config.json").read_text()) | value
    (base / "config.json").write_text(json.dumps(config))
    with refuses(FusionRouteError, base / "config.json"):
        load_model(base, LoadOptions())


def test_device_that_is_not_there_is_refused(base: Path, refuses: Callable) -> None:
    with refuses(FusionRouteError, base, "cuda:99"):
        load_model(base, LoadOptions(device="cuda:99"))


def test_attention_that_is_not_installed_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, refuses: Callable
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("FlashAttention2 has been toggled on, but it cannot be used\n")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with refuses(FusionRouteError, base, "FlashAttention2"):
        load_model(base, LoadOptions(attn_implementation="flash_attention_2"))


def test_wrong_digest_is_refused_with_both(base: Path, refuses: Callable) -> None:
    expected = "sha256:" + "1" * 64
    with refuses(FusionRouteError, "router", expected, weights.digest(base)):
        members(MemberSpec("router", str(base), digest=expected))


def test_wrong_adapter_digest_is_refused_with_both(base: Path, adapter: Callable[..., Path], refuses: Callable) -> None:
    expected, folder = "sha256:" + "1" * 64, adapter(1)
    with refuses(FusionRouteError, "router", expected, weights.digest(folder)):
        members(MemberSpec("router", str(base), adapter=str(folder), adapter_digest=expected))


def test_digests_are_compared_before_any_weight_is_loaded(
    base: Path, monkeypatch: pytest.MonkeyPatch, refuses: Callable
) -> None:
    monkeypatch.setattr("fusionroute.members.load_model", lambda *_: pytest.fail("a weight was loaded"))
    with refuses(FusionRouteError, "math"):
        members(MemberSpec("router", str(base)), MemberSpec("math", str(base), digest="sha256:" + "1" * 64))


def test_adapter_of_another_width_is_refused(
    base: Path, tmp_path: Path, adapter: Callable[..., Path], refuses: Callable
) -> None:
    tiny.make_model(tmp_path / "wide", width=32)
    folder = adapter(1, on=tmp_path / "wide")
    with refuses(FusionRouteError, folder, "LlamaForCausalLM", "16"):
        members(MemberSpec("router", str(base), adapter=str(folder)))


def test_adapter_of_another_depth_is_refused(
    base: Path, tmp_path: Path, adapter: Callable[..., Path], refuses: Callable
) -> None:
    tiny.make_model(tmp_path / "deep", width=16, layers=3)
    folder = adapter(1, on=tmp_path / "deep")
    with refuses(FusionRouteError, folder, "unexpected"):
        members(MemberSpec("router", str(base), adapter=str(folder)))


def test_adapter_that_lacks_a_tensor_is_refused(base: Path, adapter: Callable[..., Path], refuses: Callable) -> None:
    folder = adapter(1)
    edit(folder, "adapter_model.safetensors", lambda tensors: dict(list(tensors.items())[1:]))
    with refuses(FusionRouteError, folder, "1 adapter tensors missing"):
        members(MemberSpec("router", str(base), adapter=str(folder)))


def test_second_adapter_that_lacks_a_tensor_is_refused(
    base: Path, adapter: Callable[..., Path], refuses: Callable
) -> None:
    good, bad = adapter(1), adapter(2)
    edit(bad, "adapter_model.safetensors", lambda tensors: dict(list(tensors.items())[1:]))
    with refuses(FusionRouteError, bad, "1 adapter tensors missing"):
        members(MemberSpec("router", str(base), adapter=str(good)), MemberSpec("math", str(base), adapter=str(bad)))


def test_adapter_of_another_family_is_refused(
    base: Path, tmp_path: Path, adapter: Callable[..., Path], refuses: Callable
) -> None:
    """GPT-2's names fit nothing in Llama."""
    folder = adapter(1)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with refuses(FusionRouteError, folder):
        members(MemberSpec("router", str(base), adapter=str(folder)))


def test_adapter_of_another_method_is_refused(base: Path, adapter: Callable[..., Path], refuses: Callable) -> None:
    folder = adapter(1)
    config = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["k_proj"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with refuses(FusionRouteError, folder, "IA3"):
        attach_adapter(load_model(base, LoadOptions()), None, folder, "math")


def test_adapter_of_a_method_that_peft_does_not_know_is_refused(
    base: Path, adapter: Callable[..., Path], refuses: Callable
) -> None:
    folder = adapter(1)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "OF_TOMORROW"}))
    with refuses(FusionRouteError, folder, "OF_TOMORROW"):
        attach_adapter(load_model(base, LoadOptions()), None, folder, "math")


def test_adapter_that_waits_for_tokens_is_refused(base: Path, adapter: Callable[..., Path], refuses: Callable) -> None:
    """It would load, and never be on."""
    folder = adapter(1)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"alora_invocation_tokens": [5, 9]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with refuses(FusionRouteError, folder, "alora_invocation_tokens [5, 9]"):
        attach_adapter(load_model(base, LoadOptions()), None, folder, "math")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_missing_adapter_file_is_refused(
    base: Path, adapter: Callable[..., Path], file: str, refuses: Callable
) -> None:
    folder = adapter(1)
    (folder / file).unlink()
    with refuses(FusionRouteError, folder, file):
        members(MemberSpec("router", str(base), adapter=str(folder)))


def test_half_written_adapter_is_refused(base: Path, adapter: Callable[..., Path], refuses: Callable) -> None:
    path = adapter(1) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with refuses(FusionRouteError, path, "not a whole safetensors file"):
        members(MemberSpec("router", str(base), adapter=str(path.parent)))
