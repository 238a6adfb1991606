"""A recipe whose router starts from an expert, and whose base is had from another place than it names."""

import shutil
from pathlib import Path

import pytest
import yaml

from fusionroute import collection, recipe, tiny, weights
from fusionroute.errors import UsageError
from fusionroute.modeling import FusionRouteForCausalLM
from fusionroute.sections import Recipe, RouterSection

SMOLLM2 = Path(__file__).parents[1] / "recipes" / "smollm2.yaml"
HUB = "some-org/some-model"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> recipe.Run:
    """A finished run whose router and baseline start from the math expert and are trained at a rate of zero."""
    out = tmp_path_factory.mktemp("run")
    small, data = tiny.shrink_recipe(recipe.load_recipe(SMOLLM2), out)
    base = shutil.copytree(small.base, out / "elsewhere")
    small.base, small.revision = HUB, "v1"
    small.router = RouterSection(start="math")
    small.rewards = []
    assert small.cdpo is not None
    for phase in (small.sft, small.cdpo):
        phase.training |= {"learning_rate": 0.0, "max_steps": 1}
    started = recipe.Run(small, out, data, str(base))
    started.run()
    return started


def test_the_router_starts_as_the_expert_is(run: recipe.Run) -> None:
    expert = weights.digest(run.out / "experts" / "math" / "adapter")
    assert weights.digest(run.out / "collection-untrained" / "router") == expert
    assert weights.digest(run.out / "collection" / "router") == expert


def test_the_baseline_starts_where_the_router_does(run: recipe.Run) -> None:
    assert weights.digest(run.out / "finetuned" / "adapter") == weights.digest(run.out / "experts" / "math" / "adapter")


def test_the_collection_names_the_recipes_base(run: recipe.Run) -> None:
    specs = collection.read_config(run.out / "collection").member_specs
    assert {(spec.source, spec.revision) for spec in specs} == {(HUB, "v1")}
    assert {spec.digest for spec in specs} == {weights.digest(run.out / "elsewhere")}


def test_no_file_of_the_collection_names_this_machine(run: recipe.Run) -> None:
    texts = [p for p in (run.out / "collection").rglob("*") if p.is_file() and p.suffix in (".json", ".md")]
    assert [path for path in texts if str(run.out) in path.read_text()] == []


def test_the_collection_loads_on_the_base_that_was_used(run: recipe.Run, recwarn: pytest.WarningsRecorder) -> None:
    FusionRouteForCausalLM.from_pretrained(run.out / "collection", base=str(run.out / "elsewhere"))
    assert [str(w.message) for w in recwarn if "digest" in str(w.message)] == []


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"start": "maths"}, r"router\.start: no expert 'maths' among general, math, code"),
        ({"start": "math", "source": "a/b"}, r"start \(math\) and source \(a/b\) exclude each other"),
        ({"start": "math", "lora": {"r": 4}}, r"goes on with the adapter of math in its shape: drop lora"),
        ({"revision": "v2"}, r"router: .*revision v2 is of no source"),
    ],
)
def test_a_start_that_cannot_be(router: dict, message: str, tmp_path: Path) -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data | {"router": router}))
    with pytest.raises(UsageError, match=message) as caught:
        recipe.load_recipe(tmp_path / "r.yaml")
    assert ": : " not in str(caught.value)


def test_a_start_from_the_base_keeps_the_loras_shape() -> None:
    data = yaml.safe_load(SMOLLM2.read_text())
    data["router"]["start"] = "general"
    assert Recipe.model_validate(data).router.lora == recipe.load_recipe(SMOLLM2).router.lora


def test_tiny_has_a_base_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="drop --base here"):
        recipe.execute(SMOLLM2, tmp_path / "out", None, tiny=True, base="here")
