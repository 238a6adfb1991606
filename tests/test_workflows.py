"""`annotate`, `train` and `routing` as commands, on the tiny recipe's base and rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusionroute import collection, recipe, tiny
from fusionroute.configuration import MemberSpec
from fusionroute.errors import FusionRouteError
from fusionroute.members import LoadOptions, load_model
from fusionroute.training import phases, processes

SMOLLM2 = Path(__file__).parents[1] / "recipes" / "smollm2.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with its base and rows, and the untrained collection `mine` of two experts."""
    folder = tmp_path_factory.mktemp("workflows")
    tiny.shrink_recipe(recipe.load_recipe(SMOLLM2), folder)
    base = folder / "tiny-base"
    tiny.make_adapter(folder / "adapter", load_model(base, LoadOptions()), seed=1)
    experts = [MemberSpec("general", str(base)), MemberSpec("math", str(base), adapter=str(folder / "adapter"))]
    collection.assemble(folder / "mine", MemberSpec("router", str(base)), experts)
    return folder


@pytest.fixture
def run(place: Path, run: Callable) -> Callable[..., tuple[int, str, str]]:
    """The command line with recipe and data of `place`."""

    def call(*words: object, recipe: str = "recipe.yaml") -> tuple[int, str, str]:
        return run(*words, "--recipe", place / recipe, "--data", place / "tiny-data")

    return call


@pytest.fixture
def sft(run: Callable, place: Path) -> Path:
    """The collection after phase 1; trained by the first test that asks."""
    if not (place / "mine-sft").exists():
        code, _, err = run(
            "train", "sft", place / "mine", "--out", place / "mine-sft", "--annotations", place / "notes"
        )
        assert code == 0, err
    return place / "mine-sft"


@pytest.fixture
def cdpo(run: Callable, place: Path, sft: Path) -> Path:
    """The collection after phase 2."""
    if not (place / "mine-cdpo").exists():
        code, _, err = run("train", "cdpo", sft, "--out", place / "mine-cdpo", "--annotations", place / "notes")
        assert code == 0, err
    return place / "mine-cdpo"


def variant(place: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> str:
    data = yaml.safe_load((place / "recipe.yaml").read_text())
    change(data)
    (place / name).write_text(yaml.safe_dump(data))
    return name


def error_of(result: tuple[int, str, str]) -> str:
    lines = [line for line in result[2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result[2]
    assert "Traceback" not in result[2]
    return lines[0]


# ---- annotate


def test_annotate_prints_a_folder_for_each_expert(run: Callable, place: Path, tmp_path: Path) -> None:
    code, out, err = run("annotate", place / "mine", "--out", tmp_path)
    assert code == 0, err
    folders = [Path(line) for line in out.splitlines()]
    assert [folder.name.rsplit("-", 1)[0] for folder in folders] == ["general", "math"]
    assert all((folder / "00000.safetensors").is_file() for folder in folders)


def test_annotate_again_writes_nothing(run: Callable, place: Path, tmp_path: Path) -> None:
    first = run("annotate", place / "mine", "--out", tmp_path)[1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run("annotate", place / "mine", "--out", tmp_path)[1] == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_annotate_one_member(run: Callable, place: Path, tmp_path: Path) -> None:
    code, out, _ = run("annotate", place / "mine", "--out", tmp_path, "--member", "math", "--phase", "cdpo")
    assert code == 0
    assert [Path(line).name.split("-")[0] for line in out.splitlines()] == ["math"]


def test_annotate_waits_for_other_processes_as_long_as_the_recipe_says(
    run: Callable, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(processes, "join", lambda seconds=processes.TIMEOUT: waits.append(seconds))
    patient = variant(place, "patient.yaml", lambda data: data["sft"]["training"].update(ddp_timeout=7200))
    assert run("annotate", place / "mine", "--out", tmp_path, recipe=patient)[0] == 0
    assert waits[0] == 7200  # whoever joins first decides


@pytest.mark.parametrize(("option", "value", "says"), [("--member", "law", "'law'"), ("--phase", "dpo", "dpo")])
def test_annotate_refuses_what_there_is_not(
    run: Callable, place: Path, tmp_path: Path, option: str, value: str, says: str
) -> None:
    result = run("annotate", place / "mine", "--out", tmp_path / "out", option, value)
    assert result[0] == 2
    assert says in error_of(result)
    assert not (tmp_path / "out").exists()


# ---- train


def test_train_sft_makes_a_collection_with_a_trained_head(sft: Path, place: Path) -> None:
    config = collection.read_config(sft)
    assert config.head_trained
    assert set(config.training) == {"sft"}
    assert config.expert_names == collection.read_config(place / "mine").expert_names


def test_train_leaves_no_working_folder(cdpo: Path, place: Path) -> None:
    assert {p.name for p in place.iterdir() if p.name.endswith(".work")} == set()


def test_train_uses_what_annotate_wrote(run: Callable, place: Path, tmp_path: Path) -> None:
    run("annotate", place / "mine", "--out", tmp_path / "notes")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "notes").rglob("*")}
    code, _, err = run("train", "sft", place / "mine", "--out", tmp_path / "new", "--annotations", tmp_path / "notes")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "notes").rglob("*")} == before


def test_training_twice_gives_the_same_router(run: Callable, place: Path, sft: Path, tmp_path: Path) -> None:
    run("train", "sft", place / "mine", "--out", tmp_path / "again", "--annotations", place / "notes")
    for name in ("adapter_model.safetensors", "route_head.safetensors"):
        first, second = (load_file(folder / "router" / name) for folder in (sft, tmp_path / "again"))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_train_by_another_setting_than_the_recipe_s(run: Callable, place: Path, sft: Path, tmp_path: Path) -> None:
    other = ["--set", "sft.training.route_weight=0.25"]
    code, _, err = run(
        "train", "sft", place / "mine", "--out", tmp_path / "new", "--annotations", place / "notes", *other
    )
    assert code == 0, err
    assert collection.read_config(tmp_path / "new").training["sft"]["route_weight"] == 0.25
    assert collection.read_config(sft).training["sft"]["route_weight"] != 0.25


def test_train_cdpo_goes_on_from_phase_1(cdpo: Path, sft: Path) -> None:
    assert set(collection.read_config(cdpo).training) == {"sft", "cdpo"}
    before, after = (load_file(f / "router" / "adapter_model.safetensors") for f in (sft, cdpo))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    largest = max(float((before[key] - after[key]).abs().max()) for key in before)
    assert largest < 0.05  # three small steps away, not a new adapter


def test_figures_of_the_old_router_are_not_the_new_ones(run: Callable, place: Path, sft: Path, tmp_path: Path) -> None:
    scored = Path(shutil.copytree(sft, tmp_path / "scored"))
    collection.record_scores(scored, {"top-1 on S, fused": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3}})
    code, _, err = run("train", "cdpo", scored, "--out", tmp_path / "new", "--annotations", place / "notes")
    assert code == 0, err
    assert set(collection.read_config(tmp_path / "new").training) == {"sft", "cdpo"}
    assert "top-1 on S" not in (tmp_path / "new" / "README.md").read_text()


def test_train_cdpo_on_an_untrained_head(run: Callable, place: Path, tmp_path: Path) -> None:
    result = run("train", "cdpo", place / "mine", "--out", tmp_path / "new", "--annotations", tmp_path / "notes")
    assert result[0] == 1
    assert "train sft" in error_of(result)
    assert list(tmp_path.iterdir()) == []


def test_train_into_a_folder_with_something_in_it(run: Callable, place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = run("train", "sft", place / "mine", "--out", tmp_path)
    assert result[0] == 2
    assert str(tmp_path) in error_of(result)


def test_train_into_a_file(run: Callable, place: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("mine")
    result = run("train", "sft", place / "mine", "--out", tmp_path / "new")
    assert result[0] == 2
    assert "new is not an empty folder" in error_of(result)


def test_train_a_phase_that_the_recipe_lacks(run: Callable, place: Path, tmp_path: Path) -> None:
    lacking = variant(place, "no-cdpo.yaml", lambda data: data.pop("cdpo"))
    result = run("train", "cdpo", place / "mine", "--out", tmp_path / "new", recipe=lacking)
    assert result[0] == 2
    assert "cdpo" in error_of(result)


def test_train_every_weight_of_the_router(run: Callable, place: Path, tmp_path: Path) -> None:
    whole = variant(place, "full.yaml", lambda data: data.update(router={"lora": None}))
    result = run(
        "train", "sft", place / "mine", "--out", tmp_path / "new", "--annotations", place / "notes", recipe=whole
    )
    assert result[0] == 0, result[2]
    assert collection.read_config(tmp_path / "new").router_spec.adapter is None
    assert (tmp_path / "new" / "router" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(router={"lora": {"r": 3, "alpha": 6}}),
        lambda data: data.update(dtype="bfloat16"),
        lambda data: data["sft"]["training"].update(learning_rate=1e-5),
    ],
    ids=["lora", "dtype", "learning rate"],
)
def test_checkpoints_of_other_settings_are_not_gone_on_from(
    run: Callable, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable
) -> None:
    """A run that was cut short before its export, and the recipe changed since, is a new run."""

    def cut(*_: Any) -> None:
        raise FusionRouteError("as if cut short")

    words = ("train", "sft", place / "mine", "--annotations", place / "notes", "--out")
    with monkeypatch.context() as patch:
        patch.setattr(phases, "export_router", cut)
        assert "cut short" in error_of(run(*words, tmp_path / "new"))
    assert list(tmp_path.rglob("checkpoint-*"))
    changed = variant(place, "changed.yaml", change)
    code, _, err = run(*words, tmp_path / "new", recipe=changed)
    assert code == 0, err
    run(*words, tmp_path / "fresh", recipe=changed)
    for name in ("adapter_model.safetensors", "route_head.safetensors"):
        first, second = (load_file(tmp_path / n / "router" / name) for n in ("fresh", "new"))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_that_was_cut_short_goes_on(
    run: Callable, place: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any) -> None:
        raise FusionRouteError("as if cut short")

    words = ("train", "sft", place / "mine", "--annotations", place / "notes", "--out", tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(phases, "export_router", cut)
        assert "cut short" in error_of(run(*words))
    newest = max(tmp_path.rglob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    shutil.rmtree(newest)
    assert run(*words)[0] == 0
    for name in ("adapter_model.safetensors", "route_head.safetensors"):
        first, second = (load_file(folder / "router" / name) for folder in (sft, tmp_path / "new"))
        assert all(torch.equal(first[key], second[key]) for key in first)


# ---- routing


def test_routing_as_json(run: Callable, cdpo: Path) -> None:
    code, out, err = run("routing", "--collection", cdpo, "--json")
    assert code == 0, err
    figures = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(figures["domains"]) == {"math", "code", "general"}
    assert set(figures["all"]["shares"]) == {"general", "math"}


def test_routing_as_tables(run: Callable, cdpo: Path) -> None:
    code, out, _ = run("routing", "--collection", cdpo)
    assert code == 0
    assert "| fused |" in out
    assert "nan" not in out


def test_routing_without_rows(run: Callable, place: Path) -> None:
    without = variant(place, "no-heldout.yaml", lambda data: data.update(heldout=[]))
    result = run("routing", "--collection", place / "mine", recipe=without)
    assert result[0] == 2
    assert without in error_of(result)
