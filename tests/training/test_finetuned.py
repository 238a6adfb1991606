"""The fine-tuned baseline: the router's rows and settings, SFT and then DPO from there; being killed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusionroute import tiny, weights
from fusionroute.errors import FusionRouteError
from fusionroute.training import experts, finetuned
from fusionroute.training.lora import LoraSettings

trl = pytest.importorskip("trl")

STEPS = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "bf16": False}


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": message("user", question) + message("assistant", answer)}


def pair(question: str, right: str, wrong: str) -> dict[str, Any]:
    sides = {side: message("assistant", text) for side, text in (("chosen", right), ("rejected", wrong))}
    return {"prompt": message("user", question), **sides}


CHAT = [chat(f"What is {n} + 2?", f"It is {n + 2}" + "." * (n % 3)) for n in range(8)]
PAIRS = [pair(f"What is {n} + 3?", f"{n + 3}" + "!" * (n % 3), f"It is {n} or so") for n in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.make_model(folder, vocab_size=len(tiny.make_tokenizer(folder)))
    return folder


@pytest.fixture
def train(tmp_path: Path, base: Path) -> Callable[..., Path]:
    def call(rows: list[dict] = CHAT + PAIRS, *, out: str = "adapter", **given: Any) -> Path:
        finetuned.train_finetuned(
            str(base), rows, tmp_path / out, lora=LoraSettings(r=4), sft=STEPS | given.pop("sft", {}),
            dpo=STEPS | given.pop("dpo", {}), run=tmp_path / f"run-{out}", max_length=given.pop("max_length", 100),
            dtype=given.pop("dtype", torch.float32),
        )  # fmt: skip
        return tmp_path / out

    return call


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def differing(one: Path, other: Path) -> list[str]:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def test_settings_are_the_phases_without_the_routers_own() -> None:
    training = {"learning_rate": 1e-5, "route_weight": 0.3, "sft_weight": 0.3, "beta": 0.2, "bias": "sum", "seed": 1}
    assert finetuned.trl_settings(training) == {"learning_rate": 1e-5, "bf16": False, "seed": 1}
    assert finetuned.trl_settings(training, keep=["beta"])["beta"] == 0.2


def test_what_a_phase_leaves_open_is_as_the_routers() -> None:
    from fusionroute.training.trainer import RouterArguments

    settings = finetuned.trl_settings({})
    assert settings == {name: getattr(RouterArguments("x"), name) for name in ("learning_rate", "bf16")}


def test_without_pairs_it_is_an_expert_trained_on_the_rows(train: Any, base: Path, tmp_path: Path) -> None:
    arguments = {**STEPS, "max_length": 100}
    experts.train_expert(
        str(base), CHAT, tmp_path / "expert", name="x", lora=LoraSettings(r=4), arguments=arguments,
        run=tmp_path / "run", dtype=torch.float32,
    )  # fmt: skip
    assert differing(train(CHAT), tmp_path / "expert") == []


def test_the_pairs_are_learnt_from_where_the_rows_led(train: Any) -> None:
    assert differing(train(dpo={"learning_rate": 0.0}), train(CHAT, out="rows")) == []
    assert differing(train(out="learning"), train(CHAT, out="rows")) != []


def test_the_reference_is_the_first_phases_model(train: Any, tmp_path: Path) -> None:
    train()
    states = max((tmp_path / "run-adapter" / "dpo").glob("checkpoint-*")) / "trainer_state.json"
    losses = [entry["loss"] for entry in json.loads(states.read_text())["log_history"] if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01


def test_chat_rows_among_the_pairs_are_trained_on_before_them(train: Any) -> None:
    mixed = train(CHAT[:6] + PAIRS[:4] + CHAT[6:] + PAIRS[4:], out="mixed")
    assert differing(mixed, train()) == []


def test_an_ordinary_adapter_is_written(train: Any, base: Path) -> None:
    from peft import PeftModel

    adapter = train()
    weights.check_adapter(adapter)
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    ]
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[5, 9, 250]])
    with torch.no_grad():
        plain = model(ids).logits
        assert not torch.equal(PeftModel.from_pretrained(model, str(adapter))(ids).logits, plain)


def test_a_base_in_bfloat16_trains(train: Any) -> None:
    adapter = train(sft={"bf16": True}, dpo={"bf16": True}, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors(adapter).values()} == {torch.bfloat16}


def test_rows_too_long_for_the_router_are_left_out(train: Any) -> None:
    long = [chat("How many cows?", "He has " * 60), pair("How many cows?", "Three", "He has " * 60)]
    provenance = json.loads((train(CHAT + PAIRS + long) / "provenance.json").read_text())
    assert (provenance["rows"], provenance["pairs"]) == (len(CHAT), len(PAIRS))


def test_provenance_tells_the_base_and_both_phases(train: Any, base: Path) -> None:
    provenance = json.loads((train(dpo={"beta": 0.5}) / "provenance.json").read_text())
    assert provenance["base_digest"] == weights.digest(base)
    assert (provenance["sft"], provenance["dpo"]) == (STEPS, STEPS | {"beta": 0.5})


def test_pairs_alone_are_refused(train: Any, refuses: Any) -> None:
    with refuses(FusionRouteError, "fine-tuned baseline", "no chat row"):
        train(PAIRS)


@pytest.mark.parametrize("phase", ["SFT", "DPO"])
@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_interrupted_and_resumed_is_uninterrupted(
    phase: str, sampling: str, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"train_sampling_strategy": sampling}
    whole = train(out="whole", sft=given, dpo=given)
    module = experts if phase == "SFT" else finetuned

    class Interrupt(module.StopOnNan):  # type: ignore[name-defined]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:  # a step after a checkpoint
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "StopOnNan", Interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(out="again", sft=given, dpo=given)
    assert not (tmp_path / "again").exists()
    torch.manual_seed(1234)
    assert differing(train(out="again", sft=given, dpo=given), whole) == []


def test_a_finished_phase_is_not_trained_again(train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = train()

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(finetuned, "fit_adapter", forbidden)
    (tmp_path / "first").mkdir()
    first.rename(tmp_path / "first" / "adapter")
    assert differing(train(), tmp_path / "first" / "adapter") == []
