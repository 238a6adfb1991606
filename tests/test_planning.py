"""What `run --plan` says of a recipe, and that the paper's recipes run through every stage it names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusionroute import planning, recipe, tiny, weights
from fusionroute.collection import read_config
from fusionroute.errors import FusionRouteError, UsageError

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = ("llama-3.1-8b", "gemma-2-2b")


@pytest.fixture(scope="module", params=PAPER)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe of the paper's and the folder of its finished tiny run."""
    out = tmp_path_factory.mktemp("run") / request.param
    recipe.execute(RECIPES / f"{request.param}.yaml", out, None, tiny=True)
    return request.param, out


def plan_of(name: str, out: Path, **changes: Any) -> dict[str, Any]:
    loaded = recipe.load_recipe(RECIPES / f"{name}.yaml")
    return planning.make_plan(loaded.model_copy(update=changes, deep=True), out)


def stage(plan: dict[str, Any], name: str, work: str) -> dict[str, Any]:
    return next(s for s in plan["stages"] if (s["name"], s["work"]) == (name, work))


def write_recipe(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    data = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    change(data)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


# ---- the paper's recipes, run on tiny members


def test_a_tiny_run_has_the_stages_of_the_plan(ran: tuple[str, Path]) -> None:
    name, out = ran
    planned = {s["name"].replace("/", "-") for s in plan_of(name, out)["stages"]}
    # A whole router is too large to be carried beside the collection twice.
    assert {path.stem for path in (out / "stages").iterdir()} == planned


def test_a_tiny_run_has_members_of_the_papers_architectures(ran: tuple[str, Path]) -> None:
    name, out = ran
    config = read_config(out / "collection")
    assert config.expert_names == ["instruction", "math", "code"]
    assert config.head_trained
    folders = [Path(spec.source) for spec in config.member_specs[1:]] + [out / "cdpo" / "router" / "model"]
    kinds = {json.loads((folder / "config.json").read_text())["model_type"] for folder in folders}
    assert kinds == {"gemma2" if name == "gemma-2-2b" else "llama"}
    assert ("lm_head.weight" in weights.read_tensors(folders[-1])) == (name == "llama-3.1-8b")
    assert len({spec.digest for spec in config.member_specs}) == 4


def test_a_tiny_run_trains_both_phases(ran: tuple[str, Path]) -> None:
    _, out = ran
    for phase, figure in (("sft", "route_loss"), ("cdpo", "cdpo_loss")):
        logged = json.loads((out / phase / "router" / "log.json").read_text())
        assert [entry[figure] for entry in logged if figure in entry]
    # Experts that never disagreed would leave nothing to route.
    assert any(e.get("informative", 0) > 0 for e in json.loads((out / "sft" / "router" / "log.json").read_text()))


# ---- numbers


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_can_be_planned_before_anything_is_here(name: str, home: Path, tmp_path: Path) -> None:
    plan = plan_of(name, tmp_path)
    assert not any(entry["here"] for entry in plan["downloads"])
    assert all(s["memory"] > 0 for s in plan["stages"] if s["flops"])
    assert {"sft", "cdpo", "collection", "heldout"} <= {s["name"] for s in plan["stages"]}


def test_the_papers_numbers(home: Path, tmp_path: Path) -> None:
    """Phase 1 on Llama, by hand: 200,000 rows of 520 tokens, 7,504,924,672 numbers multiplied, and attention."""
    plan = plan_of("llama-3.1-8b", tmp_path)
    tokens = 200_000 * 520
    forward = tokens * 2 * 7_504_924_672 + tokens * 2 * 32 * 4096 * 520
    annotated, trained = stage(plan, "sft", "annotation by math"), stage(plan, "sft", "training")
    assert annotated["tokens"] == trained["tokens"] == tokens
    assert annotated["flops"] == forward
    assert trained["flops"] == 4 * forward  # forward, backward twice that, and forward again for checkpointing
    assert trained["hours"]["A100"] == pytest.approx(4 * forward / (0.4 * 312e12) / 3600)
    assert annotated["memory"] == pytest.approx(16.06e9, rel=0.1)
    assert trained["memory"] == pytest.approx(18 * 8.03e9, rel=0.1)
    assert trained["checkpoints"] == 36 * 8_030_261_248
    assert trained["shared"] < 80e9 < trained["memory"]


def test_phase_2_annotates_the_reference_and_counts_pairs_and_rows(home: Path, tmp_path: Path) -> None:
    plan = plan_of("gemma-2-2b", tmp_path)
    works = [s["work"] for s in plan["stages"] if s["name"] == "cdpo"]
    assert works == [*(f"annotation by {m}" for m in ("instruction", "math", "code", "router")), "training"]
    assert stage(plan, "cdpo", "training")["tokens"] == 100_000 * (850 + 520)
    assert stage(plan, "cdpo", "training")["rows"] == 200_000


def test_checkpointing_costs_time_and_saves_memory(home: Path, tmp_path: Path) -> None:
    loaded = recipe.load_recipe(RECIPES / "gemma-2-2b.yaml")
    found = []
    for checkpointing in (True, False):
        loaded.sft.training["gradient_checkpointing"] = checkpointing
        found.append(stage(planning.make_plan(loaded, tmp_path), "sft", "training"))
    assert found[0]["flops"] == pytest.approx(4 / 3 * found[1]["flops"])
    assert found[0]["memory"] < found[1]["memory"]


def test_more_gpus_share_only_what_is_trained_whole(home: Path, tmp_path: Path) -> None:
    loaded = recipe.load_recipe(RECIPES / "llama-3.1-8b.yaml")
    few, many = (planning.make_plan(loaded, tmp_path, gpus=count) for count in (2, 16))
    assert stage(many, "sft", "training")["shared"] < stage(few, "sft", "training")["shared"]
    assert stage(many, "sft", "annotation by math")["shared"] == stage(few, "sft", "annotation by math")["memory"]


def test_a_lora_router_trains_a_fraction(home: Path, tmp_path: Path) -> None:
    whole = recipe.load_recipe(RECIPES / "llama-3.1-8b.yaml")
    adapter = whole.model_copy(deep=True)
    adapter.router.lora = planning.LoraSettings(r=16, alpha=32)
    ours, theirs = (stage(planning.make_plan(r, tmp_path), "sft", "training") for r in (adapter, whole))
    assert ours["memory"] < theirs["memory"] / 4
    assert ours["flops"] == pytest.approx(3 / 4 * theirs["flops"], rel=0.02)
    assert ours["checkpoints"] < theirs["checkpoints"] / 100


def test_rows_at_hand_are_read(home: Path, tmp_path: Path) -> None:
    small, folder = tiny.shrink_recipe(recipe.load_recipe(RECIPES / "llama-3.1-8b.yaml"), tmp_path / "run")
    plan = planning.make_plan(small, tmp_path, folder)
    rows = [json.loads(line)["messages"] for line in (folder / "chat.jsonl").read_text().splitlines()]
    characters = sum(len(message["content"]) for row in rows[:12] for message in row)
    entry = next(e for e in plan["data"] if (e["path"], e["paired"]) == ("chat.jsonl", False))
    assert (entry["rows"], entry["tokens"], entry["tokens_from"]) == (12, characters / 4, "read")


def test_without_a_data_folder_no_relative_path_is_at_hand(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` would not find it either, also where the working folder has such a file."""
    small, folder = tiny.shrink_recipe(recipe.load_recipe(RECIPES / "llama-3.1-8b.yaml"), tmp_path / "run")
    monkeypatch.chdir(folder)
    assert {entry["tokens_from"] for entry in planning.make_plan(small, tmp_path)["data"]} == {"assumed"}


def test_what_a_plan_does_not_count_is_said(home: Path, tmp_path: Path) -> None:
    loaded = recipe.load_recipe(RECIPES / "llama-3.1-8b.yaml")
    before = planning.make_plan(loaded, tmp_path)["notes"]
    loaded.sft.training["route_loss"] = "renormalized"
    (added,) = [note for note in planning.make_plan(loaded, tmp_path)["notes"] if note not in before]
    assert added.startswith("sft: route_loss renormalized")


def test_the_default_recipe_has_its_experts_baselines_and_reward_models(home: Path, tmp_path: Path) -> None:
    names = [s["name"] for s in plan_of("smollm2", tmp_path)["stages"]]
    assert list(dict.fromkeys(names)) == [
        "experts/general", "experts/math", "experts/code", "collection-untrained", "sft", "collection-sft", "cdpo",
        "collection", "finetuned", "rewards/selection", "rewards/judge", "collection/baselines", "heldout",
    ]  # fmt: skip


# ---- what is checked


def test_nothing_is_fetched_or_written(home: Path, tmp_path: Path, run: Callable) -> None:
    run("run", RECIPES / "gemma-2-2b.yaml", "--plan", "--out", tmp_path / "run")
    assert not home.exists()
    assert not (tmp_path / "run").exists()


def test_the_printed_plan_fits_eighty_columns(home: Path, tmp_path: Path, run: Callable) -> None:
    _, out, _ = run("run", RECIPES / "llama-3.1-8b.yaml", "--plan", "--out", tmp_path / "run")
    assert max(map(len, out.splitlines())) <= 80
    for part in (
        "sft: training",
        "cdpo: annotation × 4",
        "A100 h",
        "MergeBench/Llama-3.1-8B-Instruct_math",
        "Disk:",
    ):
        assert part in " ".join(out.split())


def test_json_is_one_object(home: Path, tmp_path: Path, run: Callable) -> None:
    _, out, _ = run("run", RECIPES / "gemma-2-2b.yaml", "--plan", "--json", "--out", tmp_path / "run")
    assert json.loads(out)["recipe"] == "gemma-2-2b"


@pytest.mark.parametrize("place", ["base", "experts.1.source", "sft.data.0.path"])
@pytest.mark.parametrize("name", ["org//name", "a b/c", "org/name..x", "org/-name"])
def test_a_malformed_hub_id_is_one_line(place: str, name: str, home: Path, tmp_path: Path, run: Callable) -> None:
    def change(data: Any) -> None:
        *path, last = place.split(".")
        for key in path:
            data = data[int(key) if key.isdigit() else key]
        data[last] = name

    code, out, error = run("run", write_recipe(tmp_path, "gemma-2-2b", change), "--plan")
    assert code == 2
    assert out == ""
    assert error.count("\n") == 1
    assert name in error


def test_a_disk_that_is_too_small(home: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5_000_000_000))
    code, out, error = run("run", RECIPES / "llama-3.1-8b.yaml", "--plan", "--out", tmp_path / "run")
    assert code == 1
    assert "sft: training" in " ".join(out.split())
    assert error.count("\n") == 1
    assert "5 GB free" in error
    assert "the run folder" in error


def test_a_disk_that_is_large_enough(
    home: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**15))
    assert run("run", RECIPES / "llama-3.1-8b.yaml", "--plan", "--out", tmp_path / "run")[0] == 0


def test_tokenizers_that_are_here_are_compared(home: Path, tmp_path: Path) -> None:
    small, folder = tiny.shrink_recipe(recipe.load_recipe(RECIPES / "llama-3.1-8b.yaml"), tmp_path / "run")
    words = planning.make_plan(small, tmp_path, folder)["vocabulary"]
    assert words["checked"] == ["router", "instruction", "math", "code"]
    file = tmp_path / "run" / "tiny-math" / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    assert words["common"] == len(ids)
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(content))
    plan = planning.make_plan(small, tmp_path, folder)
    assert "tokenizers disagree" in plan["vocabulary"]["error"]
    assert plan["problems"][0].startswith("vocabulary: ")


def test_what_is_not_here_is_named(home: Path, tmp_path: Path) -> None:
    plan = plan_of("llama-3.1-8b", tmp_path)
    assert plan["vocabulary"]["missing"] == ["router", "instruction", "math", "code"]
    assert [entry["here"] for entry in plan["downloads"]] == [False] * 5
    assert plan["downloads"][0]["bytes"] == 2 * 8_030_261_248


def test_a_model_of_unknown_size(home: Path, tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match=r"org/name: its config\.json is not on this machine"):
        plan_of("llama-3.1-8b", tmp_path, base="org/name")


def test_a_plan_is_not_tiny(run: Callable) -> None:
    code, _, error = run("run", RECIPES / "gemma-2-2b.yaml", "--plan", "--tiny")
    assert (code, error.count("\n")) == (2, 1)


def test_data_that_is_no_folder(home: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is no folder"):
        planning.plan(RECIPES / "gemma-2-2b.yaml", None, Path("nowhere"))
