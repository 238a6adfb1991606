"""Reward models: what is trained is what is loaded; every pair counts; being killed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fusionroute import tiny, weights
from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.reward import RewardModel, pair_accuracy
from fusionroute.training import rewards
from fusionroute.training.lora import LoraSettings

trl = pytest.importorskip("trl")

LORA = LoraSettings(r=4, alpha=8)
STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "bf16": False,
}


def pair(question: str, right: str, wrong: str) -> dict[str, Any]:
    said = [[{"role": role, "content": text}] for role, text in (("user", question), ("assistant", right))]
    return {"prompt": said[0], "chosen": said[1], "rejected": [{"role": "assistant", "content": wrong}], "domain": "x"}


# Of several lengths, the longer answer right as often as the shorter.
PAIRS = [
    pair(f"How many cows has he after {n} more?", *answers)
    for n in range(12)
    for answers in [("The answer is 3" + " and more" * (n % 4), "I do not know" + " at all" * (n % 3))]
]


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tokenizer = tiny.make_tokenizer(made[family])
            tiny.make_model(made[family], family=family, vocab_size=len(tokenizer))
        return made[family]

    return make


@pytest.fixture
def train(tmp_path: Path, make_base: Callable[[str], Path]) -> Callable[..., Path]:
    """Train a reward model; gives the adapter's folder, beside which `run` has the checkpoints."""

    def call(pairs: list[dict] = PAIRS, *, family: str = "llama", out: str = "reward", **more: Any) -> Path:
        dtype = more.pop("dtype", torch.float32)
        rewards.train_reward(
            str(make_base(family)), pairs, tmp_path / out, name="x", lora=LORA, arguments=STEPS | more,
            run=tmp_path / f"run-{out}", dtype=dtype,
        )  # fmt: skip
        return tmp_path / out

    return call


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_scores_of_the_loaded_adapter_are_the_trained_models(
    family: str, train: Any, make_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    save = rewards.save_adapter
    monkeypatch.setattr(rewards, "save_adapter", lambda model, *rest: (trained.append(model), save(model, *rest)))
    adapter = train(family=family)
    tokenizer = AutoTokenizer.from_pretrained(make_base(family))
    chats = [[*row["prompt"], *row[side]] for row in PAIRS for side in ("chosen", "rejected")]
    with torch.no_grad():
        rows = [torch.tensor([tokenizer.apply_chat_template(c, return_dict=True)["input_ids"]]) for c in chats]
        expected = [float(trained[0].eval()(input_ids=row).logits) for row in rows]
    assert len(set(expected)) > 12
    found = RewardModel(f"{make_base(family)}+{adapter}").score_chats(chats, batch=5)
    assert found == pytest.approx(expected, abs=1e-4)


def test_it_learns_what_is_better(train: Any, make_base: Any) -> None:
    adapter = train(max_steps=25)
    found = pair_accuracy(RewardModel(f"{make_base()}+{adapter}"), [({"domain": "x"}, PAIRS)])
    assert found["value"] == 1.0


def test_head_and_adapter_are_stored_in_the_dtype_of_the_base(train: Any) -> None:
    stored = load_file(train(dtype=torch.bfloat16, bf16=True, max_steps=1) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert sum(name.endswith("score.weight") for name in stored) == 1


@pytest.mark.parametrize("bf16", [True, False])
def test_a_base_in_bfloat16_trains(train: Any, make_base: Any, bf16: bool) -> None:
    adapter = train(dtype=torch.bfloat16, bf16=bf16, max_steps=25)
    found = pair_accuracy(RewardModel(f"{make_base()}+{adapter}"), [({"domain": "x"}, PAIRS)])
    assert found["value"] > 0.9


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_an_epoch_meets_every_pair_once(sampling: str, train: Any, make_base: Any) -> None:
    adapter = train(max_steps=-1, num_train_epochs=1, train_sampling_strategy=sampling)
    tokenizer = AutoTokenizer.from_pretrained(make_base())
    sides = [[*row["prompt"], *row[side]] for row in PAIRS for side in ("chosen", "rejected")]
    provenance = json.loads((adapter / "provenance.json").read_text())
    assert provenance["tokens"] == sum(
        len(tokenizer.apply_chat_template(side, return_dict=True)["input_ids"]) for side in sides
    )


def test_provenance_tells_base_pairs_and_what_was_too_long(train: Any, make_base: Any) -> None:
    long = pair("How many?", "He has " * 60, "No")
    provenance = json.loads((train([*PAIRS, long], max_length=60) / "provenance.json").read_text())
    assert provenance["base_digest"] == weights.digest(make_base())
    assert (provenance["pairs"], provenance["too_long"], provenance["steps"]) == (len(PAIRS), 1, 4)


def test_rows_that_are_no_pairs(train: Any, refuses: Any) -> None:
    with refuses(FusionRouteError, "reward model x", "no pairs"):
        train([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}])


def test_pairs_that_are_all_too_long(train: Any, refuses: Any) -> None:
    with refuses(FusionRouteError, "reward model x", "max_length 8"):
        train(max_length=8)


def test_an_unknown_argument(train: Any, refuses: Any) -> None:
    with refuses(FusionRouteError, "learnin_rate", "RewardConfig"):
        train(learnin_rate=1.0)


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_interrupted_and_resumed_is_uninterrupted(
    sampling: str, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": sampling}
    whole = load_file(train(out="whole", **given) / "adapter_model.safetensors")

    class Interrupt(rewards.StopOnNan):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:  # in the second epoch, a step after a checkpoint
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rewards, "StopOnNan", Interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(out="again", **given)
    assert not (tmp_path / "again").exists()
    torch.manual_seed(1234)
    again = load_file(train(out="again", **given) / "adapter_model.safetensors")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
