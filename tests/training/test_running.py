"""Arguments, whole checkpoints and the stop at a NaN, apart from any model."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from bars import Bar
from fusionroute.errors import FusionRouteError
from fusionroute.training.running import (
    Progress,
    StopOnNan,
    last_checkpoint,
    make_arguments,
    train_to_the_end,
)
from fusionroute.training.trainer import RouterArguments


def one_line(error: pytest.ExceptionInfo[FusionRouteError]) -> bool:
    return "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("kind", [TrainingArguments, RouterArguments])
def test_unknown_argument(tmp_path: Path, kind: type) -> None:
    with pytest.raises(FusionRouteError, match="learning_rat, zeta") as error:
        make_arguments(kind, tmp_path, {"zeta": 1, "learning_rat": 1, "max_steps": 3})
    assert one_line(error)


def test_arguments_of_the_router_are_unknown_to_others(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match="beta"):
        make_arguments(TrainingArguments, tmp_path, {"beta": 0.1})


def test_defaults(tmp_path: Path) -> None:
    args = make_arguments(RouterArguments, tmp_path, {})
    assert args.output_dir == str(tmp_path)
    assert args.report_to == []
    assert (args.save_strategy, args.save_total_limit) == ("steps", 2)
    assert args.disable_tqdm
    assert args.use_cpu != torch.accelerator.is_available()
    assert args.logging_nan_inf_filter is False
    assert not args.gradient_checkpointing
    assert args.remove_unused_columns is False
    assert (args.route_weight, args.sft_weight, args.beta) == (pytest.approx(1 / 3), 1.0, 0.1)
    assert (args.route_loss, args.bias, args.routing) == ("geometric", "sum", "current")
    assert args.route_head_learning_rate is None


def test_given_arguments_beat_defaults(tmp_path: Path) -> None:
    given = {"save_total_limit": 7, "gradient_checkpointing": True, "beta": 0.5, "output_dir": str(tmp_path / "x")}
    args = make_arguments(RouterArguments, tmp_path, given)
    assert (args.save_total_limit, args.gradient_checkpointing, args.beta) == (7, True, 0.5)
    assert args.output_dir == str(tmp_path / "x")


def test_a_process_uses_one_of_the_gpus_it_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # More than one would be DataParallel, which cuts flat positions and rows at the same places.
    own: Any = vars(TrainingArguments)["_setup_devices"]  # cached by functools or, in older versions, by transformers
    setup = getattr(own, "func", None) or own.fget

    def four(args: TrainingArguments) -> torch.device:
        device = setup(args)
        args._n_gpu = 4
        return device

    seen = cached_property(four)
    seen.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", seen)
    assert TrainingArguments(str(tmp_path), use_cpu=True).train_batch_size == 4 * 8
    args = make_arguments(RouterArguments, tmp_path, {"per_device_train_batch_size": 8})
    assert (args.n_gpu, args.train_batch_size) == (1, 8)


@pytest.mark.parametrize("name", ["route_loss", "bias", "routing"])
def test_unknown_choice(tmp_path: Path, name: str) -> None:
    with pytest.raises(FusionRouteError, match=f"{name} must be one of .* not 'odd'") as error:
        make_arguments(RouterArguments, tmp_path, {name: "odd"})
    assert one_line(error)


@pytest.mark.parametrize(
    "given", [{"save_strategy": "sometimes"}, {"lr_scheduler_type": "spiral"}, {"optim": "magic"}], ids=str
)
def test_value_that_transformers_refuses_is_one_line(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(FusionRouteError, match=next(iter(given.values()))) as error:
        make_arguments(RouterArguments, tmp_path, given)
    assert one_line(error)


@pytest.mark.parametrize("name", ["learning_rate", "route_head_learning_rate", "route_weight", "beta"])
def test_number_in_the_form_that_yaml_reads_as_text(tmp_path: Path, name: str) -> None:
    # YAML 1.1 reads 1e-5 (no point) as a string; as such it would fail in the first step.
    value = getattr(make_arguments(RouterArguments, tmp_path, {name: "1e-5"}), name)
    assert isinstance(value, float)
    assert value == 1e-5


# ------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(folder: Path, step: int, state: str | None = "whole") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"x")
    if state is not None:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}) if state == "whole" else state)
    return path


def test_no_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "missing") is None


def test_newest_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("state", [None, "", '{"global_step": 1', "{}"], ids=repr)
def test_half_written_is_ignored_and_removed(tmp_path: Path, state: str | None) -> None:
    whole, half = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6, state)
    assert last_checkpoint(tmp_path) == whole
    assert not half.exists()
    assert whole.exists()


def test_only_half_written(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3, None)
    assert last_checkpoint(tmp_path) is None
    assert not any(tmp_path.iterdir())


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    (tmp_path / "log.json").write_text("[]")
    checkpoint(tmp_path, 3)
    last_checkpoint(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"lm", "log.json", "checkpoint-3"}


# --------------------------------------------------------------------------------------------------------- NaN


@dataclass
class Args:
    learning_rate: float = 0.5
    fp16: bool = False


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_stop_on_nan(key: str, value: float) -> None:
    state = TrainerState(global_step=7)
    with pytest.raises(FusionRouteError, match=rf"step 7: {key} is {value}") as error:
        StopOnNan().on_log(Args(), state, TrainerControl(), logs={key: value, "learning_rate": 0.25})  # type: ignore[arg-type]
    assert one_line(error)


@pytest.mark.parametrize("logs", [None, {}, {"loss": 1.0, "grad_norm": 2.0}, {"eval_loss": 3.0}])
def test_no_stop_without_nan(logs: dict[str, float] | None) -> None:
    StopOnNan().on_log(Args(), TrainerState(global_step=7), TrainerControl(), logs=logs)  # type: ignore[arg-type]


def test_an_infinite_gradient_is_the_scalers_business_in_float16() -> None:
    """It raises the scale until that happens, and skips the step; a loss that is no number is still the end."""
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.full_like(model.weight, float("inf"))
    half: Any = Args(fp16=True)
    state = TrainerState(global_step=7)
    with pytest.raises(FusionRouteError, match="step 8: grad_norm is inf"):
        StopOnNan().on_pre_optimizer_step(Args(), state, TrainerControl(), model=model)  # type: ignore[arg-type]
    StopOnNan().on_pre_optimizer_step(half, state, TrainerControl(), model=model)
    StopOnNan().on_log(half, state, TrainerControl(), logs={"loss": 1.0, "grad_norm": float("inf")})
    with pytest.raises(FusionRouteError, match="loss is nan"):
        StopOnNan().on_log(half, state, TrainerControl(), logs={"loss": float("nan")})


# ---------------------------------------------------------------------------------------------------- progress


def test_a_run_that_is_interrupted_gives_the_terminal_back(tmp_path: Path) -> None:
    progress, bar = Progress("router"), Bar()

    def train() -> None:
        progress.bar = bar
        bar.start()
        raise KeyboardInterrupt

    trainer = SimpleNamespace(
        train=train, remove_callback=lambda _: None, callback_handler=SimpleNamespace(callbacks=[progress])
    )
    with pytest.raises(KeyboardInterrupt):
        train_to_the_end(trainer, tmp_path)
    assert not bar.shown


def test_progress_writes_a_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress, state = Progress("router"), TrainerState(global_step=0, max_steps=10, num_input_tokens_seen=0)
    args: Any = Args()
    progress.on_train_begin(args, state, TrainerControl())
    state.global_step, state.num_input_tokens_seen = 4, 1000
    progress.on_log(args, state, TrainerControl(), logs={"loss": 1.25})
    progress.on_log(args, state, TrainerControl(), logs={"train_runtime": 1.0})
    progress.on_train_end(args, state, TrainerControl())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("router: step 4/10  loss 1.2500  ")
    assert "tokens/s" in line
    assert "min left" in line
