"""Experts: our loss against trl's own trainer and against transformers' logits; what is written; being killed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionroute import tiny, weights
from fusionroute.errors import FusionRouteError
from fusionroute.training import experts
from fusionroute.training.lora import LoraSettings

trl = pytest.importorskip("trl")

LORA = LoraSettings(r=4, alpha=8)
STEPS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_steps": 3,
    "bf16": False,
}


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


# Of several lengths and turns, so that sums, padding and masks matter.
ROWS = [
    chat("What is 1 + 2?", "3"),
    chat("How many cows has he now?", "He has 12 + 3 = 15 cows. The answer is below."),
    chat("Write a function", "def add(a, b):\n    return a + b", "Call it", "assert add(1, 2) == 3"),
    chat("Hi", "A farmer buys 3 more"),
    chat("A list?", "The sum of a list."),
    chat("Which is the answer to the question that a farmer has?", "No"),
    chat("How many?", "He buys 12"),
    chat("Return", "a + b is the sum, and 3 the answer to it."),
]


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny base of a family, with its tokenizer."""
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
    """Train an expert; gives the adapter's folder, beside which `run` has the checkpoints."""

    def call(rows: list[dict] = ROWS, *, family: str = "llama", lora: LoraSettings = LORA, **more: Any) -> Path:
        given = {"dtype": torch.float32, **{k: more.pop(k) for k in ("dtype", "base") if k in more}}
        base = str(given.pop("base", make_base(family)))
        arguments, run = STEPS | more, tmp_path / "run"
        experts.train_expert(
            base, rows, tmp_path / "adapter", name="math", lora=lora, arguments=arguments, run=run, **given
        )
        return tmp_path / "adapter"

    return call


def logged(run: Path, *keys: str) -> list[list[float]]:
    """The logged figures of each step, from the newest checkpoint."""
    state = json.loads(max(run.glob("checkpoint-*")).joinpath("trainer_state.json").read_text())
    return [[entry[key] for key in keys] for entry in state["log_history"] if "loss" in entry]


def trls_own(base: Path, rows: list[dict], out: Path, **more: Any) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses, gradient norms and the adapter of trl's trainer, set up without fusionroute."""
    given = STEPS | {"gradient_checkpointing": False, "save_strategy": "no"} | more
    config = trl.SFTConfig(output_dir=str(out), report_to="none", disable_tqdm=True, use_cpu=True, **given)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(config.seed)
    shape = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    data = datasets.Dataset.from_list([{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows])
    trainer = trl.SFTTrainer(
        model=get_peft_model(model, shape), args=config, train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    trainer.train()
    history = [[e["loss"], e["grad_norm"]] for e in trainer.state.log_history if "loss" in e]

    return history, {k: v.clone() for k, v in get_peft_model_state_dict(trainer.model).items()}


def assert_as_trl(train: Any, make_base: Any, tmp_path: Path, rows: list[dict], family: str, **more: Any) -> None:
    adapter = train(rows, family=family, **more)
    expected, state = trls_own(make_base(family), rows, tmp_path / "trl", **more)
    assert len(expected) == 3
    for ours, theirs in zip(logged(tmp_path / "run", "loss", "grad_norm"), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
    got = load_file(adapter / "adapter_model.safetensors")
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


# ---- the loss


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_losses_gradients_and_adapter_are_trls(train: Any, make_base: Any, tmp_path: Path, family: str) -> None:
    assert_as_trl(train, make_base, tmp_path, ROWS, family)


@pytest.mark.parametrize(
    "option",
    [
        {"gradient_checkpointing": True},
        {"completion_only_loss": False},
        {"max_length": 24},
        {"label_smoothing_factor": 0.2},
        {"loss_type": "dft"},
        {"packing": True, "max_length": 64},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_of_trls_means_what_it_means_there(
    train: Any, make_base: Any, tmp_path: Path, option: dict[str, Any]
) -> None:
    """`arguments` is any field of SFTConfig; one that cannot be honoured must be refused, not ignored."""
    try:
        assert_as_trl(train, make_base, tmp_path, ROWS, "llama", **option)
    except FusionRouteError as error:
        assert next(iter(option)) in str(error)  # noqa: PT017


def test_a_batch_without_a_token_to_learn_is_survived(train: Any, tmp_path: Path) -> None:
    """Where max_length cuts a prompt, nothing of the completion is left to learn from."""
    rows = [chat("How many cows has the farmer now? " * 4, "3")] * 8
    train([*rows, chat("Hi", "He has")], max_length=24, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    assert all(math.isfinite(loss) for (loss,) in logged(tmp_path / "run", "loss"))


def test_rows_that_max_length_cuts_to_nothing_are_refused(train: Any, refuses: Any) -> None:
    with refuses(FusionRouteError, "expert math"):
        train([chat("How many cows has the farmer now? " * 4, "3")] * 4, max_length=24)


def test_the_first_loss_is_the_last_answers_alone(train: Any, make_base: Any, tmp_path: Path) -> None:
    train(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    model = AutoModelForCausalLM.from_pretrained(make_base()).eval()
    tokenizer = AutoTokenizer.from_pretrained(make_base())
    losses = []
    for row in ROWS:
        turns = row["messages"]
        start = len(
            tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        )
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))]
    assert logged(tmp_path / "run", "loss")[0][0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# ---- precision


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_computes_the_base_in_bfloat16(
    train: Any, monkeypatch: pytest.MonkeyPatch, bf16: bool, dtype: torch.dtype
) -> None:
    seen: dict[str, set[torch.dtype]] = {"layer": set(), "head": set(), "weight": set()}
    load_model = experts.load_model

    def hooked(*arguments: Any) -> Any:
        model = load_model(*arguments)
        layer = model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda module, _, output: seen["layer"].add(output.dtype))
        model.lm_head.register_forward_hook(lambda module, _, output: seen["head"].add(output.dtype))
        seen["weight"].add(layer.weight.dtype)
        return model

    monkeypatch.setattr(experts, "load_model", hooked)
    train(bf16=bf16)
    assert seen == {"layer": {dtype}, "head": {dtype}, "weight": {torch.float32}}


def test_bf16_is_close_to_float32(train: Any, tmp_path: Path) -> None:
    train()
    whole = logged(tmp_path / "run", "loss")
    (tmp_path / "run").rename(tmp_path / "float32")
    train(bf16=True)
    half = logged(tmp_path / "run", "loss")
    assert half != whole
    for (a,), (b,) in zip(half, whole, strict=True):
        assert a == pytest.approx(b, rel=0.02)


# ---- what is written


def test_the_adapter_is_written_whole(train: Any, make_base: Any) -> None:
    adapter = train()
    weights.check_adapter(adapter)
    base = AutoModelForCausalLM.from_pretrained(make_base())
    ids = torch.tensor([[5, 9, 250]])
    with torch.no_grad():
        plain = base(ids).logits
        assert not torch.equal(PeftModel.from_pretrained(base, str(adapter))(ids).logits, plain)


def test_provenance_tells_base_rows_and_settings(train: Any, make_base: Any) -> None:
    provenance = json.loads((train() / "provenance.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(make_base())
    longest = max(len(tokenizer.apply_chat_template(r["messages"], return_dict=True)["input_ids"]) for r in ROWS)
    assert provenance["base_digest"] == weights.digest(make_base())
    assert (provenance["rows"], provenance["steps"]) == (len(ROWS), 3)
    assert 0 < provenance["tokens"] <= 12 * longest
    assert provenance["arguments"] == STEPS
    assert provenance["lora"] == LORA.model_dump()


def test_the_cache_a_base_lies_in_is_named_nowhere(
    train: Any, make_base: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    repo = home / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(make_base(), repo / "snapshots" / ("0" * 40))
    adapter = train(base="org/name", max_steps=1)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    assert [p.name for p in adapter.iterdir() if str(home).encode() in p.read_bytes()] == []


def test_the_configuration_names_no_path_of_this_machine(train: Any, make_base: Any) -> None:
    adapter = train(max_steps=1)
    assert str(make_base()) not in (adapter / "adapter_config.json").read_text()


# ---- refusals


def test_no_rows(train: Any, tmp_path: Path, refuses: Any) -> None:
    with refuses(FusionRouteError, "expert math"):
        train([])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_argument(train: Any, refuses: Any) -> None:
    with refuses(FusionRouteError, "learnin_rate", "SFTConfig"):
        train(learnin_rate=1.0)


@pytest.mark.parametrize("logging_steps", [1, 500])
def test_nan_stops_and_leaves_no_adapter(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_steps: int
) -> None:
    load_model = experts.load_model

    def poisoned(*arguments: Any) -> Any:
        model = load_model(*arguments)
        model.model.norm.weight.data[0] = float("nan")
        return model

    monkeypatch.setattr(experts, "load_model", poisoned)
    with pytest.raises(FusionRouteError, match="stopped at step") as caught:
        train(logging_steps=logging_steps, save_steps=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "adapter").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# ---- being killed


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch, trl, datasets, peft
import torch._dynamo
from fusionroute.training import experts
from fusionroute.training.lora import LoraSettings

top, base, rows = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_steps": 3, "learning_rate": 1e-2,
             "logging_steps": 1, "bf16": False}

def child(folder, kill_at=None):
    pid = os.fork()
    if not pid:
        class Killer(experts.StopOnNan):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        experts.StopOnNan = Killer
        torch.manual_seed(os.getpid())
        code = 1
        try:
            experts.train_expert(base, rows, folder / "adapter", name="x", lora=LoraSettings(r=4, dropout=0.3),
                                 arguments=arguments, run=folder / "run", dtype=torch.float32)
            code = 0
        except BaseException:
            import traceback; traceback.print_exc()
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

assert child(top / "whole") == 0
assert child(top / "killed", 2) == -signal.SIGKILL
assert child(top / "killed", 5) == -signal.SIGKILL  # in the second epoch
assert not (top / "killed" / "adapter").exists()
assert child(top / "killed") == 0
assert child(top / "killed") == 0  # finished; killed before the recipe took note
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, make_base: Any, run_script: Any) -> Path:
    folder = tmp_path_factory.mktemp("killed_expert")
    done = run_script(KILLED, folder, make_base(), json.dumps(ROWS))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder


def test_killed_and_resumed_is_uninterrupted(killed: Path) -> None:
    whole, again = (load_file(killed / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "killed"))
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_a_resumed_expert_has_the_provenance_of_the_uninterrupted(killed: Path) -> None:
    whole, again = (json.loads((killed / n / "adapter" / "provenance.json").read_text()) for n in ("whole", "killed"))
    assert again == whole
    assert whole["steps"] == 8
