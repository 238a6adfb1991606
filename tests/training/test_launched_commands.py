"""`fusionroute annotate` and `train` under torchrun and accelerate do what one process does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusionroute import collection, recipe, tiny
from fusionroute.configuration import MemberSpec
from fusionroute.members import LoadOptions, load_model

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with its base and rows, and a collection of two experts."""
    folder = tmp_path_factory.mktemp("launched")
    tiny.shrink_recipe(recipe.load_recipe(RECIPES / "smollm2.yaml"), folder)
    base = folder / "tiny-base"
    tiny.make_adapter(folder / "adapter", load_model(base, LoadOptions()), seed=1)
    experts = [MemberSpec("general", str(base)), MemberSpec("math", str(base), adapter=str(folder / "adapter"))]
    collection.assemble(folder / "start", MemberSpec("router", str(base)), experts)
    settings = yaml.safe_load((folder / "recipe.yaml").read_text())
    for phase in ("sft", "cdpo"):
        settings[phase]["training"] |= {"per_device_train_batch_size": 4, "max_steps": 4, "num_train_epochs": 1}
        settings[phase]["training"] |= {
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
        }
    (folder / "one.yaml").write_text(yaml.safe_dump(settings))
    for phase in ("sft", "cdpo"):
        settings[phase]["training"]["per_device_train_batch_size"] = 2
    (folder / "two.yaml").write_text(yaml.safe_dump(settings))
    return folder


def accelerate(config: str) -> list[object]:
    """`accelerate launch` with two processes on the CPU in place of eight GPUs."""
    command = ["-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate" / config]
    return [*command, "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def trained(place: Path, launch: Callable) -> Callable[[str], Path]:
    """The folder of both phases' collections and annotations, made by one process or by two under a launcher."""

    def make(how: str) -> Path:
        out = place / how
        if out.exists():
            return out
        words = {
            "one": ["-m", "fusionroute"],
            "torchrun": ["-m", "fusionroute"],
            "ddp": [*accelerate("ddp.yaml"), "-m", "fusionroute"],
        }[how]
        common = ["--recipe", place / ("one.yaml" if how == "one" else "two.yaml"), "--data", place / "tiny-data"]
        common += ["--annotations", out / "notes"]
        for phase, start in (("sft", place / "start"), ("cdpo", out / "sft"))[: 1 if how == "ddp" else 2]:
            done = launch(
                *words, "train", phase, start, "--out", out / phase, *common,
                processes=2 if how == "torchrun" else 1,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.split() == [str(out / phase)]
        return out

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}:{k}": v
        for path in folder.rglob("*.safetensors")
        for k, v in load_file(path).items()
    }


@pytest.mark.parametrize(("how", "phase"), [("torchrun", "sft"), ("torchrun", "cdpo"), ("ddp", "sft")])
def test_a_launch_trains_the_collection_of_one_process(trained: Callable[[str], Path], phase: str, how: str) -> None:
    one, two = (tensors(trained(name) / phase) for name in ("one", how))
    assert one.keys() == two.keys()
    for name, value in one.items():
        # Not number by number: where a gradient is all rounding, so is Adam's first step.
        assert float((two[name] - value).norm()) <= 0.02 * float(value.norm()), name
    assert not list(trained(how).glob("*.work"))


def test_a_launch_annotates_what_one_process_does(trained: Callable[[str], Path]) -> None:
    # Of phase 1: the reference of phase 2 is another router.
    one, two = (trained(name) / "notes" for name in ("one", "torchrun"))
    names = [folder.name for folder in one.iterdir() if not folder.name.startswith("router")]
    assert names
    for name in names:
        files = {path.name: path.read_bytes() for path in (one / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (two / name).iterdir()} == files


def test_the_processes_of_a_launch_share_the_shards(tmp_path: Path, launch: Callable) -> None:
    source = tmp_path / "share.py"
    source.write_text(SHARE)
    done = launch(source, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == ["rank 0 wrote 00001 00003", "rank 1 wrote 00002 00004"]


SHARE = """
import os
import sys
from pathlib import Path
import torch
from fusionroute import tiny
from fusionroute.configuration import MemberSpec
from fusionroute.members import LoadOptions, load_members
from fusionroute.training import annotation, processes
from fusionroute.training.data import Tokens

top, annotation.SHARD = Path(sys.argv[1]), 2
model = top / f"model{processes.rank()}"
tiny.make_model(model, seed=4)
processes.join()
(member,) = load_members([MemberSpec("math", str(model))], None, LoadOptions(dtype=torch.float32))
sequences = [Tokens(tuple(range(1, 6 + i)), 2) for i in range(9)]
written = []
write = annotation._write_shard
annotation._write_shard = lambda path, columns: (written.append(path.stem), write(path, columns))
folder = top / "notes"
if processes.is_main():
    # One shard is there before.
    world, processes.world = processes.world, lambda: 1
    annotation.annotate(member, sequences, folder, 320, part=annotation.Part(1, 5))
    processes.world = world
    written.clear()
processes.wait()
annotation.read_columns(annotation.annotate(member, sequences, folder, 320), sequences)
# At once, since both write to one pipe.
os.write(1, f"rank {processes.rank()} wrote {' '.join(written)}{chr(10)}".encode())
"""


def test_an_accelerate_configuration_shards(tmp_path: Path, launch: Callable) -> None:
    script, held = Path(__file__).parent / "launched.py", {}
    for words, out in (([], "one"), (accelerate("fsdp2.yaml"), "two")):
        run = {"name": "run", "lora": False, "kinds": "sspp" * 2}
        done = launch(*words, script, tmp_path / out, json.dumps([run]), processes=1)
        assert done.returncode == 0, done.stderr[-3000:]
        held[out] = json.loads((tmp_path / out / "run.json").read_text())
    assert held["two"]["bytes"] <= 0.55 * held["one"]["bytes"]
    assert held["two"]["log"][0]["loss"] == pytest.approx(held["one"]["log"][0]["loss"], rel=1e-5)


@pytest.mark.parametrize(("part", "code"), [("2/2", 0), ("3/2", 2)])
def test_annotate_takes_a_part(place: Path, launch: Callable, tmp_path: Path, part: str, code: int) -> None:
    words = ["annotate", place / "start", "--recipe", place / "one.yaml", "--data", place / "tiny-data"]
    done = launch("-m", "fusionroute", *words, "--out", tmp_path / "notes", "--part", part, processes=1)
    assert done.returncode == code, done.stderr[-3000:]
    if code == 0:
        # The tiny recipe's rows are one shard, the first part's.
        assert len(done.stdout.split()) == 2
        assert not list(tmp_path.rglob("*.safetensors"))
    else:
        assert "a part is NUMBER/OF" in done.stderr


def test_run_refuses_to_be_launched(place: Path, launch: Callable) -> None:
    done = launch("-m", "fusionroute", "run", place / "recipe.yaml", "--out", place / "never")
    assert done.returncode != 0
    assert "`fusionroute run` is one process, and was launched as 2" in done.stderr
    assert not (place / "never").exists()


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml", "zero3.yaml"])
def test_every_key_of_a_config_is_accelerates(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(RECIPES / "accelerate" / name)).num_processes == 8


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version is 1; say fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "offloading"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing: true"),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], says: str
) -> None:
    from fusionroute.errors import FusionRouteError
    from fusionroute.training.running import make_arguments
    from fusionroute.training.trainer import RouterArguments

    for key, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | changed).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(FusionRouteError, match=says):
        make_arguments(RouterArguments, tmp_path, {})


@pytest.mark.parametrize("given", [{"fp16": True, "sharded": True}, {"fsdp": "full_shard"}])
def test_arguments_that_exclude_sharding(tmp_path: Path, given: dict[str, Any]) -> None:
    from fusionroute.errors import FusionRouteError
    from fusionroute.training.running import make_arguments
    from fusionroute.training.trainer import RouterArguments

    with pytest.raises(FusionRouteError, match=r"not with this trainer|fp16"):
        make_arguments(RouterArguments, tmp_path, given)
