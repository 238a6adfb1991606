"""A run of the trainer: what it logs, where it stops, and that a kill changes nothing."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from equations import terms_of
from transformers import TrainerCallback

from fusionroute.errors import FusionRouteError
from fusionroute.training.data import Item
from fusionroute.training.running import last_checkpoint, train_to_the_end
from fusionroute.training.trainer import RouterArguments, RouterForTraining

# ------------------------------------------------------------------------------------------------------ figures


def naive_figures(model: RouterForTraining, data: Sequence[Item], args: RouterArguments) -> dict[str, float]:
    terms = terms_of(model, data, args)
    figures: dict[str, float] = {}
    if terms["lm"]:
        figures |= {
            "lm_loss": float(sum(terms["lm"])) / len(terms["lm"]),
            "route_loss": float(sum(terms["route"])) / len(terms["route"]),
            "route_loss_hard": statistics.fmean(terms["hard"]),
            "route_accuracy": statistics.fmean(terms["right"]),
            "informative": statistics.fmean(terms["informative"]),
        }
    if terms["pairs"]:
        biases = [p[2] for p in terms["pairs"]]
        odds = [args.beta * (p[1] + p[2]) for p in terms["pairs"]]
        sigma = [1 / (1 + math.exp(-x)) for x in odds]
        figures |= {
            "cdpo_loss": statistics.fmean(-math.log(s) for s in sigma),
            "cdpo_margin": statistics.fmean(p[1] for p in terms["pairs"]),
            "cdpo_bias": statistics.fmean(biases),
            "cdpo_bias_std": statistics.pstdev(biases),
            "cdpo_slope": statistics.fmean(s * (1 - s) for s in sigma),
            "preference_accuracy": statistics.fmean(float(p[1] > 0) for p in terms["pairs"]),
        }
    domains = {domain for domain, _ in terms["routes"]}
    for domain, (index, expert) in itertools.product(domains, enumerate(model.route_head.experts)):
        here = [route for d, route in terms["routes"] if d == domain]
        figures[f"share_{domain}/{expert}"] = here.count(index) / len(here)
    return figures


OTHER_KEYS = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_input_tokens_seen", "train_runtime"}


def assert_figures(entry: dict[str, float], expected: dict[str, float]) -> None:
    assert set(expected) <= set(entry)
    for name, value in expected.items():
        assert entry[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    extra = set(entry) - set(expected) - OTHER_KEYS
    assert not {k for k in extra if k.startswith(("cdpo", "route", "share", "lm_", "informative", "preference"))}


@pytest.mark.parametrize(("sft", "pairs"), [(6, 0), (0, 6), (6, 4)], ids=["sft", "pairs", "mix"])
def test_logged_figures(make_router: Any, make_trainer: Any, items: Any, sft: int, pairs: int) -> None:
    data, model = items(sft, pairs, seed=2), make_router()
    trainer = make_trainer(model, data)
    trainer.train()
    assert_figures(trainer.state.log_history[0], naive_figures(model, data, trainer.args))


def test_figures_are_means_over_the_interval_not_of_batches(make_router: Any, make_trainer: Any, items: Any) -> None:
    data, model = items(8, 4, seed=2), make_router()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 3}
    trainer = make_trainer(model, data, **options)
    trainer.train()
    assert_figures(trainer.state.log_history[0], naive_figures(model, data, trainer.args))


def test_figures_start_anew_after_each_line(make_router: Any, make_trainer: Any, items: Any) -> None:
    data, model = items(8, 0, seed=2), make_router()
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(model, data, **options)
    trainer.train()
    for entry, piece in zip(trainer.state.log_history, (data[:4], data[4:]), strict=False):
        assert_figures(entry, naive_figures(model, piece, trainer.args))


def test_no_items(make_router: Any, make_trainer: Any) -> None:
    with pytest.raises(FusionRouteError, match="no item"):
        make_trainer(make_router(), [], per_device_train_batch_size=1)


# ---------------------------------------------------------------------------------------------------------- NaN


def tensors_in(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()]


@pytest.mark.parametrize("logging_steps", [1, 3, 500])
@pytest.mark.parametrize("poison", ["annotation", "parameter"])
def test_nan_stops_the_run_and_is_in_no_checkpoint(
    make_router: Any, make_trainer: Any, items: Any, tmp_path: Path, poison: str, logging_steps: int
) -> None:
    data, model = items(16, 0), make_router()

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3 and poison == "parameter":
                next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")

    if poison == "annotation":
        data[13].annotations[0]["logprobs"].fill_(float("nan"))
        data[13].annotations[0]["greedy"][:] = torch.tensor([5, 6, 6])
    trainer = make_trainer(
        model,
        data,
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        logging_steps=logging_steps,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=None,
        train_sampling_strategy="sequential",
    )
    trainer.add_callback(Poison())
    try:
        with pytest.raises(FusionRouteError, match="stopped at step") as error:
            trainer.train()
        assert "\n" not in str(error.value)
    finally:
        checkpoints = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
        bad = [c for c in checkpoints if not all(t.isfinite().all() for t in tensors_in(tmp_path / "run" / c))]
    assert bad == []
    assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("logging_steps", [1, 500])
def test_nan_in_the_gradient_alone_stops_the_run(
    make_router: Any, make_trainer: Any, items: Any, tmp_path: Path, logging_steps: int
) -> None:
    # A finite loss can have an infinite gradient; the step that uses it must not be saved, least of all as the last.
    data, model = items(4, 0), make_router()
    parameter = next(p for n, p in model.named_parameters() if "lora_A" in n)
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    options = {"max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 1.0, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(model, data, logging_steps=logging_steps, **options)
    with pytest.raises(FusionRouteError, match="grad_norm is nan"):
        trainer.train()
    assert last_checkpoint(tmp_path / "run") is None


# ------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("lora", [True, False])
def test_a_router_is_loaded_as_it_was_saved(make_router: Any, tmp_path: Path, lora: bool) -> None:
    model, other = make_router(lora=lora), make_router(lora=lora)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    other.save(tmp_path)
    model.load(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_without_some_weights_is_refused(make_router: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_router()
    model.save(tmp_path)
    path = tmp_path / "lm" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with pytest.raises(FusionRouteError):
        model.load(tmp_path)


def test_a_finished_run_is_trained_no_further(make_router: Any, make_trainer: Any, items: Any, tmp_path: Path) -> None:
    data, run = items(4, 0), tmp_path / "run"
    options = {"max_steps": 3, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    first, second = make_router(), make_router()
    train_to_the_end(make_trainer(first, data, **options), run)
    trainer = make_trainer(second, data, **options)
    train_to_the_end(trainer, run)
    assert trainer.state.global_step == 3
    assert trainer.watch.gradients == []
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_a_finished_run_goes_on_when_more_steps_are_asked(
    make_router: Any, make_trainer: Any, items: Any, tmp_path: Path
) -> None:
    data, model = items(4, 0), make_router()
    options = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    train_to_the_end(make_trainer(make_router(), data, max_steps=2, **options), tmp_path / "run")
    trainer = make_trainer(model, data, max_steps=5, **options)
    train_to_the_end(trainer, tmp_path / "run")
    assert trainer.state.global_step == 5


RESUMED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # imported by the first step; here once for all children
from peft import LoraConfig, get_peft_model
from transformers import Gemma2ForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM, TrainerCallback
from fusionroute import tiny
from fusionroute.router import RouteHead
from fusionroute.training.data import Item, Tokens
from fusionroute.training.running import last_checkpoint, make_arguments, train_to_the_end
from fusionroute.training.trainer import RouterArguments, RouterForTraining, RouterTrainer

top = Path(sys.argv[1])

def make_items():
    g = torch.Generator().manual_seed(0)
    items = []
    for number in range(23):  # 12 batches of 2 (the last is short), 6 steps an epoch
        sides = []
        for _ in range(1 + number % 2):
            prompt, length = torch.randint(1, 12, (2,), generator=g).tolist()
            columns = {"logprobs": -4 * torch.rand(length, 3, generator=g),
                       "greedy": torch.randint(5, 7, (length, 3), generator=g),
                       "reference": -4 * torch.rand(length, generator=g),
                       "routes": torch.zeros(length, dtype=torch.int32)}
            ids = torch.randint(0, 320, (prompt + length,), generator=g).tolist()
            sides.append((Tokens(tuple(ids), prompt), columns))
        items.append(Item(tuple(s for s, _ in sides), "ab"[number % 2], tuple(c for _, c in sides)))
    return items

class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

class Trainer(RouterTrainer):
    kill_in_save = None
    def _save_rng_state(self, folder):
        if self.state.global_step == self.kill_in_save:
            os.kill(os.getpid(), signal.SIGKILL)  # weights and optimizer are written, trainer_state.json is not
        super()._save_rng_state(folder)

def train(run, kill_at=None, kill_in_save=None):
    torch.manual_seed(os.getpid())  # a resumed process starts from other noise
    model = tiny.make_model(root / f"model{os.getpid()}")
    torch.manual_seed(7)
    if lora:
        shape = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.3)
        model = get_peft_model(model, shape)
    else:
        model.requires_grad_(True)
        model.config.attention_dropout = 0.2
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_steps": 3,
             "learning_rate": 1e-2, "route_head_learning_rate": 5e-2, "weight_decay": 0.01, "logging_steps": 2,
             "train_sampling_strategy": strategy}
    args = make_arguments(RouterArguments, run, given)
    router = RouterForTraining(model, RouteHead(32, ["a", "b", "c"]), 320)
    trainer = Trainer(router, args, make_items(), callbacks=[KillAt(kill_at)])
    trainer.kill_in_save = kill_in_save
    checkpoint = last_checkpoint(run)
    print("from", checkpoint and checkpoint.name, flush=True)
    train_to_the_end(trainer, run)
    assert trainer.state.global_step == 12
    router.save(run / "final")

def child(*args, patience=None, **kwargs):
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            train(*args, **kwargs)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if patience is not None:
        time.sleep(patience)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

for mode in sys.argv[2:]:
    strategy, lora, root = mode.split("-")[0], mode.endswith("lora"), top / mode
    print("mode", mode)
    assert child(root / "whole") == 0
    run = root / "planned"
    assert child(run, kill_at=4) == -signal.SIGKILL  # in epoch 1
    assert child(run, kill_in_save=9) == -signal.SIGKILL  # from the end of epoch 1, while saving in epoch 2
    assert (run / "checkpoint-9").is_dir() and not (run / "checkpoint-9" / "trainer_state.json").exists()
    assert child(run, kill_at=11) == -signal.SIGKILL  # in epoch 2
    state = run / "checkpoint-9" / "trainer_state.json"
    if strategy == "random":
        state.write_text(state.read_text()[:100])
    assert child(run) == 0
    last = run / "checkpoint-12" / "trainer_state.json"
    written = last.stat().st_mtime_ns
    assert child(run) == 0  # killed after the last checkpoint, before the router was exported
    assert last.stat().st_mtime_ns == written
    run, patience = root / "chance", random.uniform(0.5, 1.5)
    while not any(run.glob("checkpoint-*")) and child(run, patience=patience) != 0:
        patience *= 1.5
    assert child(run) == 0
"""


MODES = ("random-lora", "group_by_length-lora", "random-full")


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory, run_script: Any) -> tuple[Path, str]:
    """Runs of every mode: `whole`, and `planned` and `chance`, which were killed and resumed; and what they printed."""
    folder = tmp_path_factory.mktemp("killed")
    done = run_script(RESUMED, folder, *MODES)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize("run", ["planned", "chance"])
@pytest.mark.parametrize("mode", MODES)
def test_killed_training_ends_as_the_uninterrupted(killed_runs: tuple[Path, str], mode: str, run: str) -> None:
    from safetensors.torch import load_file

    whole = killed_runs[0] / mode / "whole"
    for path in (whole / "final").rglob("*.safetensors"):
        expected, got = load_file(path), load_file(whole.parent / run / path.relative_to(whole))
        assert expected.keys() == got.keys()
        different = [name for name in expected if not torch.equal(expected[name], got[name])]
        assert not different, different[:3]


@pytest.mark.parametrize("mode", MODES)
def test_resumed_from_the_newest_whole_checkpoint(killed_runs: tuple[Path, str], mode: str) -> None:
    printed = killed_runs[1].split(f"mode {mode}\n")[1].splitlines()
    # Of random sampling, the trainer_state.json of checkpoint 9 was truncated before the last resume.
    last = "checkpoint-6" if mode.startswith("random") else "checkpoint-9"
    assert printed[:6] == [f"from {c}" for c in (None, None, "checkpoint-3", "checkpoint-6", last, "checkpoint-12")]
