"""Recipes: what is refused, what is skipped, what survives a kill."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fusionroute import recipe, tiny, weights
from fusionroute.baselines.collab import CollabSettings
from fusionroute.collection import read_config
from fusionroute.configuration import MemberSpec
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation import report
from fusionroute.evaluation.evaluate import Evaluation, evaluate
from fusionroute.evaluation.names import ORACLE
from fusionroute.evaluation.systems import every_name

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
# Keys whose value says it all.
UNCOMMENTED = {"path", "stop", "description", "data", "code", "router", "training"}
SMOLLM2 = ROOT / "recipes" / "smollm2.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished tiny recipe."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    recipe.execute(SMOLLM2, out, None, tiny=True)
    return out


def result(out: Path) -> tuple[str, str, bytes]:
    """What a run ends with: digests of the router's adapter and of an expert's, and the route head."""
    folder = out / "collection"
    return (
        weights.digest(folder / "router"),
        weights.digest(folder / "expert_math"),
        (folder / "router" / "route_head.safetensors").read_bytes(),
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert recipe.load_recipe(path).name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_no_held_out_row_is_trained_on(path: Path) -> None:
    loaded = recipe.load_recipe(path)
    trained = [s for e in loaded.experts for s in e.data] + loaded.sft.data + (loaded.cdpo.data if loaded.cdpo else [])
    for held in loaded.heldout:
        for spec in trained:
            if (spec.path, spec.format) == (held.path, held.format):
                assert spec.shuffle_seed == held.shuffle_seed
                stop = held.stop if held.stop is not None else 10**9
                assert spec.start >= stop or (spec.stop or 10**9) <= held.start


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_no_pair_is_in_two_places(path: Path) -> None:
    loaded = recipe.load_recipe(path)
    trained = [loaded.cdpo.data if loaded.cdpo else [], *(reward.data for reward in loaded.rewards)]
    held = [spec for reward in loaded.rewards for spec in reward.heldout]
    for one, others in [(held, trained), *((each, [o for o in trained if o is not each]) for each in trained)]:
        for spec, other in itertools.product(one, itertools.chain.from_iterable(others)):
            if spec.path == other.path:
                assert spec.shuffle_seed == other.shuffle_seed
                assert spec.start >= (other.stop or 10**9) or other.start >= (spec.stop or 10**9)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_key_of_a_shipped_recipe_is_commented(path: Path) -> None:
    """The first time a key appears, its line has a comment, or the one above it."""
    lines = path.read_text().splitlines()
    seen: set[str] = set()
    for number, line in enumerate(lines):
        key = line.strip().removeprefix("- ").split(":")[0]
        if not line.strip() or line.strip().startswith(("#", "- {", "<<")) or key in seen:
            continue
        seen.add(key)
        above = lines[number - 1].strip() if number else ""
        assert "#" in line or above.startswith("#") or key in UNCOMMENTED, line


def test_a_missing_recipe() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml is missing"):
        recipe.load_recipe(Path("nowhere.yaml"))


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    data["router"]["rank"] = 4
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UsageError, match=r"r\.yaml: router\.rank: Extra inputs"):
        recipe.load_recipe(tmp_path / "r.yaml")


def test_what_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: [1")
    with pytest.raises(UsageError, match=r"r\.yaml is not YAML") as caught:
        recipe.load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_setting_takes_the_place_of_the_file_s() -> None:
    loaded = recipe.load_recipe(SMOLLM2, ["sft.training.learning_rate=1.0e-5", "finetuned=null", "alpha=0.5"])
    assert (loaded.sft.training["learning_rate"], loaded.finetuned, loaded.alpha) == (1e-5, None, 0.5)


def test_a_setting_changes_nothing_else() -> None:
    """Not even where the file's YAML has one mapping in two places: both experts' `training` is the same."""
    as_it_is, changed = recipe.load_recipe(SMOLLM2), recipe.load_recipe(SMOLLM2, ["experts.1.training.seed=7"])
    assert changed.experts[1].training.pop("seed") == 7
    as_it_is.experts[1].training.pop("seed")
    assert changed == as_it_is


def test_a_setting_in_a_section_that_the_file_lacks() -> None:
    changed = recipe.load_recipe(SMOLLM2, ["finetuned.training.learning_rate=1.0e-3"])
    assert changed.finetuned is not None
    assert changed.finetuned.training == {"learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("alpha", "must be KEY=VALUE"),
        ("=1", "must be KEY=VALUE"),
        ("sft..seed=1", "must be KEY=VALUE"),
        ("alpha=[1", "is not YAML"),
        ("experts.9.name=x", "no such place"),
        ("experts.first.name=x", "no such place"),
        ("alpha.x=1", "no such place"),
        ("cdpo.trainings.beta=1", r"cdpo\.trainings: Extra inputs"),
    ],
)
def test_a_setting_that_cannot_be(change: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        recipe.load_recipe(SMOLLM2, [change])
    assert "\n" not in str(caught.value)


def test_missing_data_names_the_file(tmp_path: Path) -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    small, folder = tiny.shrink_recipe(recipe.load_recipe(SMOLLM2), tmp_path / "run")
    assert data["name"] == small.name
    (folder / "chat.jsonl").unlink()
    with pytest.raises(FusionRouteError, match=r"chat\.jsonl"):
        recipe.Run(small, tmp_path / "run", folder).run()


def test_every_stage_leaves_its_result(finished: Path) -> None:
    config = read_config(finished / "collection")
    assert config.head_trained
    assert config.expert_names == ["general", "math", "code"]
    assert set(config.training) >= {"sft", "cdpo", "data"}
    assert "top-1 on S, fused" in config.training["scores"]
    assert "top-1 on S, fused" in (finished / "collection" / "README.md").read_text()
    figures = json.loads((finished / "heldout" / "routing.json").read_text())
    assert set(figures["domains"]) == {"math", "code", "general"}
    assert not list(finished.glob("checkpoints/*"))


def test_a_second_run_does_nothing(finished: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    recipe.execute(SMOLLM2, finished, None, tiny=True)
    assert "started" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


def test_a_change_runs_again_only_what_depends_on_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    data["cdpo"]["training"]["beta"] = 0.2
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    recipe.execute(tmp_path / "r.yaml", finished, None, tiny=True)
    started = [line for line in capsys.readouterr().err.splitlines() if line.endswith("started")]
    stages = ("cdpo", "collection", "finetuned", "collection/baselines", "heldout")
    assert started == [f"{stage}: started" for stage in stages]


def test_a_reward_model_that_changes_touches_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    recipe.execute(SMOLLM2, finished, None, tiny=True)  # whatever other tests have left
    capsys.readouterr()
    data["rewards"][1]["training"] = {**data["rewards"][1]["training"], "seed": 5}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    recipe.execute(tmp_path / "r.yaml", finished, None, tiny=True)
    started = [line for line in capsys.readouterr().err.splitlines() if line.endswith("started")]
    assert started == ["rewards/judge: started", "collection/baselines: started"]


def test_a_collection_put_together_anew_keeps_its_figures(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe.execute(SMOLLM2, finished, None, tiny=True)  # whatever other tests have left
    capsys.readouterr()
    data = yaml.safe_load(SMOLLM2.read_text())
    data["experts"][0]["description"] = "said in other words"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    recipe.execute(tmp_path / "r.yaml", finished, None, tiny=True)
    started = [line for line in capsys.readouterr().err.splitlines() if line.endswith("started")]
    stages = ("collection-untrained", "collection-sft", "collection", "collection/baselines")
    assert started == [f"{stage}: started" for stage in stages]
    assert "top-1 on S, fused" in read_config(finished / "collection").training["scores"]
    assert "top-1 on S, fused" in (finished / "collection" / "README.md").read_text()


def test_weights_that_change_in_place_are_other_weights(tmp_path: Path) -> None:
    small, folder = tiny.shrink_recipe(recipe.load_recipe(SMOLLM2), tmp_path / "run")
    small.router.start = None
    run, place = recipe.Run(small, tmp_path / "run", folder), tmp_path / "expert"
    vocab_size = len(tiny.make_tokenizer(place))
    digests = []
    for seed in (1, 1, 2):
        tiny.make_model(place, seed=seed, vocab_size=vocab_size)
        assembled = run._assemble("collection-untrained", [MemberSpec("math", str(place))], None, {})
        digests.append(read_config(assembled).expert_specs[0].digest)
    assert digests[0] == digests[1] != digests[2] == weights.digest(place)


# ---- what stands beside the collection


def test_the_baselines_lie_in_the_collection(finished: Path) -> None:
    folder = finished / "collection" / "baselines"
    adapter = {"adapter_config.json", "adapter_model.safetensors", "provenance.json"}
    assert {path.name: {file.name for file in path.iterdir()} for path in folder.iterdir()} == {
        "sft": adapter | {"route_head.safetensors"},
        "finetuned": adapter,
        "reward": adapter | {"reward.json"},
        "judge": adapter | {"reward.json"},
    }
    assert weights.digest(folder / "sft") == weights.digest(finished / "collection-sft" / "router")
    assert weights.digest(folder / "judge") == weights.digest(finished / "rewards" / "judge")
    assert [path for path in folder.rglob("*.json") if str(finished) in path.read_text()] == []


def test_a_reward_model_tells_how_good_it_is_on_what(finished: Path) -> None:
    for name in ("selection", "judge"):
        found = json.loads((finished / "rewards" / name / "reward.json").read_text())
        assert found["n"] == sum(part["n"] for part in found["sources"]) == 12
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
        assert found["domains"]["general"]["n"] == 12
        assert {spec["path"] for spec in found["trained_on"]} == {"reward-pairs.jsonl"}


def test_the_whole_table_comes_out_of_a_finished_run(finished: Path, tmp_path: Path) -> None:
    """Whatever a system beside the collection's own needs lies in its `baselines/`."""
    folder = finished / "collection"
    data = Path(__file__).parent / "evaluation" / "fixtures"
    quick = CollabSettings(candidates=1, rollout=1)
    evaluate(Evaluation(folder, tmp_path, tasks=["gsm8k", "general"], data=data, limit=1, collab=quick))
    found = report.read(tmp_path)
    assert found["not_run"] == {}
    assert set(found["systems"]) == {*every_name(read_config(folder)), ORACLE}
    assert found["settings"]["judge"]["against"] == "finetuned"
    assert "of 12 held-out pairs" in report.as_markdown(found)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (("selection.data", "judge.data"), r"data of reward model selection and data of reward model judge share 6"),
        (("selection.data", "judge.heldout"), r"data of reward model selection and heldout of reward model judge"),
        (("cdpo", "judge.data"), r"cdpo\.data and data of reward model judge share"),
        (("cdpo", "selection.heldout"), r"cdpo\.data and heldout of reward model selection share"),
    ],
)
def test_a_pair_in_two_places_is_refused_before_anything_runs(
    places: tuple[str, str], message: str, tmp_path: Path
) -> None:
    small, folder = tiny.shrink_recipe(recipe.load_recipe(SMOLLM2), tmp_path / "run")
    assert small.cdpo is not None
    lists = {"cdpo": small.cdpo.data} | {
        f"{reward.name}.{kind}": getattr(reward, kind) for reward in small.rewards for kind in ("data", "heldout")
    }
    lists[places[1]][0] = lists[places[0]][0]
    with pytest.raises(UsageError, match=message):
        recipe.Run(small, tmp_path / "run", folder).run()
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize("where", ["expert", "sft", "cdpo"])
def test_answers_that_the_judge_prefers_are_taught_to_nobody(where: str, tmp_path: Path) -> None:
    small, folder = tiny.shrink_recipe(recipe.load_recipe(SMOLLM2), tmp_path / "run")
    assert small.cdpo is not None
    data = {"expert": small.experts[-1].data, "sft": small.sft.data, "cdpo": small.cdpo.data}[where]
    judge = next(reward for reward in small.rewards if reward.name == "judge")
    data.append(judge.data[0].model_copy(update={"chosen_only": True}))
    with pytest.raises(UsageError, match=r"rows with chosen_only and data of reward model judge share \d+ pairs"):
        recipe.Run(small, tmp_path / "run", folder).run()


def test_a_pair_turned_around_is_the_same_pair(tmp_path: Path) -> None:
    small, folder = tiny.shrink_recipe(recipe.load_recipe(SMOLLM2), tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "reward-pairs.jsonl").read_text().splitlines()]
    first, other = small.rewards[0].data[0], small.rewards[1].data[0]
    rows[other.start] = rows[first.start] | {
        "chosen": rows[first.start]["rejected"], "rejected": rows[first.start]["chosen"]
    }  # fmt: skip
    (folder / "reward-pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=r"share 1 pairs, such as 'What is 1\d\d \+ 7\?'"):
        recipe.Run(small, tmp_path / "run", folder).run()


def test_held_out_pairs_may_be_held_out_twice(tmp_path: Path) -> None:
    from fusionroute.recipe_baselines import check_baselines

    small, folder = tiny.shrink_recipe(recipe.load_recipe(SMOLLM2), tmp_path / "run")
    small.rewards[1].heldout = small.rewards[0].heldout
    check_baselines(recipe.Run(small, tmp_path / "run", folder))


def test_a_baseline_without_the_routers_lora_is_refused_before_anything_runs(tmp_path: Path) -> None:
    small, folder = tiny.shrink_recipe(recipe.load_recipe(SMOLLM2), tmp_path / "run")
    small.router.start = small.router.lora = None
    with pytest.raises(UsageError, match=r"set router\.lora"):
        recipe.Run(small, tmp_path / "run", folder).run()
    assert not (tmp_path / "run" / "stages").exists()


def test_two_reward_models_of_one_name_are_refused(tmp_path: Path) -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    data["rewards"] = [data["rewards"][0]] * 2
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UsageError, match=r"r\.yaml: rewards: .*one of each name, not selection, selection"):
        recipe.load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([{"name": "math"}, {"name": "math"}], r"experts: .*must be distinct.*math, math"),
        ([{"name": "router"}], r"experts: .*none may be 'router'"),
        ([{"name": "Math-2"}], r"experts: .*'Math-2' must match"),
        ([{"name": "math", "revision": "v2"}], r"experts\.0: .*revision v2 is of no source"),
    ],
)
def test_experts_that_no_collection_can_have_are_refused_at_once(
    experts: list[dict], message: str, tmp_path: Path
) -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data | {"experts": experts}))
    with pytest.raises(UsageError, match=message):
        recipe.load_recipe(tmp_path / "r.yaml")


def test_an_expert_is_trained_on_the_base_alone(tmp_path: Path) -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    data["experts"][1]["source"] = "some-org/some-model"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UsageError, match=r"experts\.1: .*drop source and adapter"):
        recipe.load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", ["../elsewhere", "Smollm2", "smollm2/x", "-smollm2"])
def test_a_name_that_is_no_folders_is_refused(name: str, tmp_path: Path) -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data | {"name": name}))
    with pytest.raises(UsageError, match=r"r\.yaml: name: "):
        recipe.load_recipe(tmp_path / "r.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        recipe.load_recipe(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["experts/math", "sft", "cdpo"])
def test_killed_and_run_again_is_uninterrupted(stage: str, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "killed"
    call = f"recipe.execute(Path({str(SMOLLM2)!r}), Path({str(out)!r}), None, tiny=True)"
    code = f"from pathlib import Path; from fusionroute import recipe; {call}"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ.copy())
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"{stage}: started"):
            break
    # Into the stage's training: its second step has a checkpoint.
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/*/checkpoint-2")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "collection" / "config.json").exists()
    recipe.execute(SMOLLM2, out, None, tiny=True)
    whole = tmp_path / "whole"
    recipe.execute(SMOLLM2, whole, None, tiny=True)
    assert result(out) == result(whole)
