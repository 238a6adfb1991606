"""Runs of the trainer in one launch: `launched.py OUT RUNS`, with RUNS as JSON. The tests start it with torchrun.

A run is {"name": …, "lora": bool, "kinds": "sspp…" (SFT items and pairs), "family": …, "kill": [rank, step],
"stop": [rank, step], "arguments": {…}}. The main process writes OUT/NAME.json (log, heads by step, bytes of state)
and OUT/NAME/ (the router).
"""

import hashlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fusionroute import tiny
from fusionroute.errors import FusionRouteError
from fusionroute.files import write_json
from fusionroute.progress import quiet
from fusionroute.router import RouteHead
from fusionroute.training import processes
from fusionroute.training.data import Item, Tokens
from fusionroute.training.lora import LoraSettings, lora_config
from fusionroute.training.model import RouterForTraining
from fusionroute.training.running import last_checkpoint, make_arguments, train_to_the_end
from fusionroute.training.sharding import gathered
from fusionroute.training.trainer import RouterArguments, RouterTrainer


def make_items(kinds: str) -> list[Item]:
    generator = torch.Generator().manual_seed(0)
    items = []
    for number, kind in enumerate(kinds):
        sides = []
        for _ in range(1 if kind == "s" else 2):
            prompt, length = torch.randint(1, 12, (2,), generator=generator).tolist()
            columns = {
                "logprobs": -4 * torch.rand(length, 3, generator=generator),
                "greedy": torch.randint(5, 7, (length, 3), generator=generator),
                "reference": -4 * torch.rand(length, generator=generator),
                "routes": torch.zeros(length, dtype=torch.int32),
            }
            ids = torch.randint(0, 300, (prompt + length,), generator=generator).tolist()
            sides.append((Tokens(tuple(ids), prompt), columns))
        items.append(Item(tuple(s for s, _ in sides), "ab"[number % 2], tuple(c for _, c in sides)))
    return items


class Signal(TrainerCallback):
    """Sends one rank a signal before a step."""

    def __init__(self, rank: int, step: int, number: int) -> None:
        self.rank, self.step, self.number = rank, step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and processes.rank() == self.rank:
            os.kill(os.getpid(), self.number)


class Held(TrainerCallback):
    """Bytes of parameters, gradients and moments that this process holds when it has them all."""

    def __init__(self) -> None:
        self.bytes = 0
        self.heads: list[str] = []

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        parameters = list(model.parameters())
        tensors = parameters + [p.grad for p in parameters if p.grad is not None]
        tensors += [v for p in parameters for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        head = gathered(model.route_head.weight.detach())
        self.heads.append(hashlib.sha256(head.numpy().tobytes()).hexdigest())
        self.bytes = max(self.bytes, sum(t.numel() * t.element_size() for t in local))


def make_router(spec: dict[str, Any]) -> RouterForTraining:
    with tempfile.TemporaryDirectory() as folder:
        lm: Any = tiny.make_model(Path(folder), family=spec.get("family", "llama"))
    if spec.get("base"):
        lm = lm.to(getattr(torch, spec["base"]))
    if spec["lora"]:
        from peft import get_peft_model

        lm.requires_grad_(False)
        torch.manual_seed(7)
        lm = get_peft_model(lm, lora_config(LoraSettings(r=4)))
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    else:
        lm.requires_grad_(True)
    head = RouteHead(32, ["a", "b", "c"])
    head.weight.data.copy_(torch.randn(3, 32, generator=torch.Generator().manual_seed(3)))
    return RouterForTraining(lm, head, 300)


def train(spec: dict[str, Any], out: Path) -> None:
    name, run = spec["name"], out / "runs" / spec["name"]
    given = {
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "route_head_learning_rate": 5e-2,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "max_grad_norm": 0.5,
    }
    given["per_device_train_batch_size"] = 4 // processes.world()
    args = make_arguments(RouterArguments, run, given | spec.get("arguments", {}))
    held, callbacks = Held(), []
    for key, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        if key in spec:
            callbacks.append(Signal(*spec[key], number))
    router = make_router(spec)
    trainer = RouterTrainer(router, args, make_items(spec["kinds"]), callbacks=[held, *callbacks])
    start = last_checkpoint(run)
    dtypes: set[str] = set()
    # Put there before the sharding's own, it sees what the head multiplies with.
    router.route_head.register_forward_hook(lambda head, *_: dtypes.add(str(head.weight.dtype)))
    with quiet(data=True):
        train_to_the_end(trainer, run)
    trained = trainer.trained()

    def write() -> None:
        router.save(out / name, trained)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        write_json(
            out / f"{name}.json",
            {
                "log": log,
                "bytes": held.bytes,
                "heads": held.heads,
                "dtypes": sorted(dtypes),
                "from": start and start.name,
            },
        )

    processes.once(write)


def main() -> None:
    out = Path(sys.argv[1])
    for spec in json.loads(sys.argv[2]):
        train(spec, out)


if __name__ == "__main__":
    try:
        main()
    except FusionRouteError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
