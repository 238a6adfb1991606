"""What every training run shares: whole checkpoints only, progress with tokens/s, a stop at the first NaN."""

import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fusionroute.errors import FusionRouteError
from fusionroute.files import disk_errors
from fusionroute.training import processes
from fusionroute.training.sharding import gathered


def make_arguments(kind: type, run: Path, given: dict[str, Any]) -> Any:
    """A `TrainingArguments` of class `kind` with this project's defaults under what the recipe gives.

    Defaults: no reports, the two newest checkpoints kept, our own progress, CPU where there is nothing better, and no
    activation checkpointing (trl turns it on, which costs a third of the speed where memory is not short). A process
    uses one device, however many it sees.

    Raises:
        FusionRouteError: an argument that `kind` does not have, or a value that it refuses.
    """
    check_arguments(kind, given)
    # YAML reads 1e-5, without a point, as text.
    floats = {field.name for field in fields(kind) if "float" in str(field.type)}
    given = {k: _number(v) if k in floats and isinstance(v, str) else v for k, v in given.items()}
    processes.join(float(given.get("ddp_timeout", processes.TIMEOUT)))
    defaults = {
        "output_dir": str(run),
        "report_to": "none",
        "save_strategy": "steps",
        "save_total_limit": 2,
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        "logging_nan_inf_filter": False,  # it would replace a NaN by the running mean and go on
        "gradient_checkpointing": False,
    }
    with warnings.catch_warnings():
        # transformers 5.2x renamed gradient_checkpointing; the old name is the one that every supported version has.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            arguments: Any = kind(**{**defaults, **given})
        except (ValueError, TypeError) as error:
            raise FusionRouteError(f"training arguments: {' '.join(str(error).split())}") from error
    # With several GPUs in sight transformers would wrap the model in DataParallel, which cuts every tensor of a batch
    # along its first axis (ours have rows and flat positions there) and multiplies the batch that the recipe says.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def check_arguments(kind: type, given: Iterable[str]) -> None:
    """Refuse names that are no arguments of `kind`; makes none, which would set up devices.

    Raises:
        FusionRouteError: the message lists them.
    """
    unknown = sorted(set(given) - {field.name for field in fields(kind)})
    if unknown:
        raise FusionRouteError(
            f"{', '.join(unknown)}: no such training argument ({kind.__name__} has none of that name)"
        )


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to the end; half-written ones are removed.

    transformers writes `trainer_state.json` last, so a folder in which it parses is whole.
    """
    whole: list[tuple[int, Path]] = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
            whole.append((step, checkpoint))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return max(whole)[1] if whole else None


def train_to_the_end(trainer: Any, run: Path) -> None:
    """`trainer.train()`, from the newest whole checkpoint in `run` if there is one; it prints nothing of its own.

    A run killed after its last checkpoint is only loaded: transformers would take one more step.
    """
    trainer.remove_callback(PrinterCallback)
    checkpoint = processes.agree(last_checkpoint(run) if processes.is_main() else None)
    try:
        with processes.lost_peers(), disk_errors(run):
            _train_from(checkpoint, trainer)
    finally:
        # A bar hides the cursor until it is stopped, and a run that fails or is interrupted does not get to its end.
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Progress):
                callback.close()


def _train_from(checkpoint: Path | None, trainer: Any) -> None:
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    args = trainer.args
    more = args.max_steps > state.global_step or (args.max_steps <= 0 and args.num_train_epochs > (state.epoch or 0))
    if more:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state


def grouping(trainer_class: type, length: Callable[[Any], int]) -> Any:
    """A trainer of pairs whose `group_by_length` works: transformers' own looks for `input_ids`, which they lack.

    Args:
        length: of a row of its data set, in tokens.
    """
    from fusionroute.training.data import LengthGroups

    class Grouping(trainer_class):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if self.args.train_sampling_strategy != "group_by_length":
                return super()._get_train_sampler(train_dataset)
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroups([length(row) for row in self.train_dataset], batch, self.args.seed)

    return Grouping


class StopOnNan(TrainerCallback):
    """Ends a run whose loss or gradient is no longer a number, before that reaches a weight or a checkpoint.

    With `fp16` only the loss counts: its scaler raises the scale until a gradient is infinite, skips that step, which
    therefore reaches no weight, and goes on with a lower one.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if args.fp16:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(gathered(torch.nn.utils.get_total_norm(gradients))) if gradients else 0.0
        if not math.isfinite(norm):
            raise self._error("grad_norm", norm, state.global_step + 1, args)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        for key in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            value = (logs or {}).get(key)
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise self._error(key, value, state.global_step, args)

    @staticmethod
    def _error(what: str, value: float, step: int, args: TrainingArguments) -> FusionRouteError:
        return FusionRouteError(
            f"training stopped at step {step}: {what} is {value}; lower the learning rate (it is "
            f"{args.learning_rate:.3g}) or look at the data near there"
        )


class Progress(TrainerCallback):
    """A bar with loss, tokens/s and time left on a terminal; one line per log interval elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = 0.0
        self.first_step = 0
        self.first_tokens = 0
        self.bar: Any = None
        self.task: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        self.first_tokens = int(state.num_input_tokens_seen or 0)
        if sys.stderr.isatty() and state.is_world_process_zero:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, note="")
            self.bar.start()

    def _rate(self, state: TrainerState) -> float:
        return (int(state.num_input_tokens_seen or 0) - self.first_tokens) / max(time.monotonic() - self.started, 1e-9)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, note=f"{self._rate(state):.0f} tokens/s")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        elapsed = time.monotonic() - self.started
        done = max(state.global_step - self.first_step, 1)
        left = elapsed / done * (state.max_steps - state.global_step)
        text = (
            f"{self.title}: step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"{self._rate(state):.0f} tokens/s  {left / 60:.0f} min left"
        )
        if self.bar is None:
            print(text, file=sys.stderr, flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar; also where training ended early, which `on_train_end` does not hear of."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
