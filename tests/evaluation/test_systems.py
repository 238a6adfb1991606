import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionroute import FusionRouteForCausalLM, weights
from fusionroute.baselines.carried import carry
from fusionroute.baselines.merging import MergeSettings, merge_collection
from fusionroute.collection import assemble, read_config
from fusionroute.configuration import MemberSpec
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.rows import Request
from fusionroute.errors import UsageError
from fusionroute.evaluation.systems import Sources, every_name, find, parse
from fusionroute.router import RouteHead

PROMPT = [1, 40, 41, 42, 43]


@pytest.fixture(scope="module")
def folder(make_collection: Callable[[str], Path]) -> Path:
    return make_collection("adapters")


@pytest.fixture
def sources(folder: Path, tmp_path: Path) -> Sources:
    return Sources(folder, tmp_path / "work", sft=folder)


def written(folder: Path, **policy: object) -> list[int]:
    engine = Engine(FusionRouteForCausalLM.from_pretrained(folder))
    return engine.generate([Request(PROMPT, 8, ignore_end=True, **policy)])[0].ids  # type: ignore[arg-type]


def test_all_is_every_system_once(folder: Path) -> None:
    config = read_config(folder)
    names = parse(["fusionroute,all"], config)
    assert names == every_name(config)
    assert len(set(names)) == len(names)


def test_names_come_in_the_order_asked_for(folder: Path) -> None:
    assert parse(["uniform,router", "fusionroute", "router"], read_config(folder)) == [
        "uniform",
        "router",
        "fusionroute",
    ]


@pytest.mark.parametrize("name", ["nonsense", "expert:nobody", "fixed:nobody", "merge:soup", "expert:"])
def test_an_unknown_system_is_refused_with_what_there_is(name: str, sources: Sources) -> None:
    with pytest.raises(UsageError, match=r"there are|it has"):
        find(name, sources)


@pytest.mark.parametrize(
    ("name", "option"), [("sft-only", "--sft"), ("no-complement", "--sft"), ("finetuned", "--finetuned")]
)
def test_what_was_not_given_is_asked_for(name: str, option: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=option):
        find(name, Sources(folder, tmp_path))


def test_an_expert_runs_as_itself(sources: Sources) -> None:
    system = find("expert:math", sources)
    assert written(system.folder, **system.policy) == written(sources.collection, expert="math", alpha=0.0)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_a_merge_runs_on_its_own_weights(method: str, sources: Sources) -> None:
    system = find(f"merge:{method}", sources)
    assert written(system.folder, **system.policy) != written(sources.collection)
    assert find(f"merge:{method}", sources) == system


def test_a_merges_settings_are_in_its_name(sources: Sources, tmp_path: Path) -> None:
    system = find("merge:ties:0.5:0.4", sources)
    merge_collection(sources.collection, MergeSettings("ties", 0.5, 0.4), tmp_path / "by_hand")
    (model,) = (path for path in sources.work.iterdir() if not path.name.endswith("-alone"))
    assert weights.digest(model) == weights.digest(tmp_path / "by_hand")
    assert system.folder != find("merge:ties", sources).folder


@pytest.mark.parametrize(
    "name", ["merge:ties:", "merge:ties:much", "merge:ties:1:0.2:3", "merge:task-arithmetic:1:0.5"]
)
def test_a_merge_without_sense_is_refused(name: str, sources: Sources) -> None:
    with pytest.raises(UsageError, match=r"write merge:ties|keeps every entry"):
        find(name, sources)


def test_a_fine_tuned_adapter_runs_as_one_model(sources: Sources, folder: Path, tmp_path: Path) -> None:
    spec = next(spec for spec in read_config(folder).expert_specs if spec.name == "math")
    model = f"{spec.source}+{folder / spec.module}"
    system = find("finetuned", Sources(folder, tmp_path / "work", finetuned=model))
    assert written(system.folder, **system.policy) == written(folder, expert="math", alpha=0.0)


@pytest.fixture
def carrying(make_collection: Callable[[str], Path], tmp_path: Path) -> Sources:
    """A collection that carries, as router after phase 1, its expert's adapter, and another as the fine-tuned model."""
    folder = tmp_path / "collection"
    shutil.copytree(make_collection("adapters"), folder)
    head = RouteHead.load(folder / "router", ["math", "code"], read_config(folder).hidden_size)
    head.weight.data = -head.weight.data
    head.save(tmp_path)
    adapters = {"sft": folder / "expert_math", "finetuned": folder / "expert_code"}
    carry(folder, adapters, read_config(folder).router_spec.source, tmp_path / "route_head.safetensors")
    return Sources(folder, tmp_path / "work")


def test_the_carried_router_after_phase_one_stands_among_the_experts(carrying: Sources, tmp_path: Path) -> None:
    spec = read_config(carrying.collection).router_spec
    router = MemberSpec("router", spec.source, adapter=str(carrying.collection / "expert_math"))
    experts = read_config(carrying.collection).expert_specs
    assemble(tmp_path / "by_hand", router, experts, head=tmp_path, relative_to=carrying.collection)
    system = find("sft-only", carrying)
    assert written(system.folder, **system.policy) == written(tmp_path / "by_hand")
    assert written(system.folder) != written(carrying.collection)
    assert find("no-complement", carrying).folder == system.folder
    by_hand = find("sft-only", Sources(carrying.collection, tmp_path / "other", sft=tmp_path / "by_hand"))
    assert system.identity(read_config(system.folder), None) == by_hand.identity(read_config(by_hand.folder), None)


def test_the_carried_fine_tuned_model_runs_alone(carrying: Sources) -> None:
    system = find("finetuned", carrying)
    assert written(system.folder, **system.policy) == written(carrying.collection, expert="code", alpha=0.0)
    assert find("finetuned", carrying) == system


def test_what_is_given_wins_over_what_is_carried(carrying: Sources, folder: Path) -> None:
    model = f"{read_config(folder).router_spec.source}+{folder / 'expert_math'}"
    given = replace(carrying, sft=folder, finetuned=model)
    assert find("sft-only", given).folder == folder
    system = find("finetuned", given)
    assert written(system.folder, **system.policy) == written(folder, expert="math", alpha=0.0)


@pytest.mark.parametrize("name", ["sft-only", "finetuned"])
def test_what_is_carried_runs_on_another_base(name: str, carrying: Sources, tmp_path: Path) -> None:
    other, base = tmp_path / "other", Path(read_config(carrying.collection).router_spec.source)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data += 0.5
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    system = find(name, replace(carrying, base=str(other)))
    with pytest.warns(UserWarning, match="was trained on"):
        FusionRouteForCausalLM.from_pretrained(system.folder, base=str(other))
    config = read_config(system.folder)
    assert system.identity(config, str(other))["weights"]


def test_identities_tell_policies_and_weights_apart(sources: Sources, make_collection: Callable[[str], Path]) -> None:
    config = read_config(sources.collection)
    names = [
        "fusionroute",
        "expert:math",
        "expert:code",
        "router",
        "query-level",
        "uniform",
        "fixed:math",
        "no-complement",
    ]
    found = [str(find(name, sources).identity(config, None)) for name in names]
    assert len(set(found)) == len(found)


def test_an_expert_alone_does_not_depend_on_the_router(sources: Sources) -> None:
    config = read_config(sources.collection)
    before = find("expert:math", sources).identity(config, None)
    other = read_config(sources.collection)
    assert other.router is not None
    other.router["adapter_digest"] = "another"
    assert find("expert:math", sources).identity(other, None) == before
    assert find("fixed:math", sources).identity(other, None) != find("fixed:math", sources).identity(config, None)


def test_another_base_and_another_template_are_other_answers(sources: Sources, tmp_path: Path) -> None:
    config, system = read_config(sources.collection), find("fusionroute", sources)
    before = system.identity(config, None)
    base = Path(read_config(sources.collection).router_spec.source)
    assert system.identity(config, str(base)) == before
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data += 0.5
    model.save_pretrained(other)
    assert system.identity(config, str(other)) != before
    copy = tmp_path / "copy"
    shutil.copytree(sources.collection, copy)
    assert replace(system, folder=copy).identity(config, None) == before
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert replace(system, folder=copy).identity(config, None) != before


def test_another_fine_tuned_model_is_another_system(sources: Sources) -> None:
    specs = {spec.name: spec for spec in read_config(sources.collection).expert_specs}
    given = [f"{specs[name].source}+{sources.collection / specs[name].module}" for name in ("math", "code")]
    found = [find("finetuned", replace(sources, finetuned=each)) for each in given]
    assert found[0].folder != found[1].folder


def test_a_variant_is_fusionroute_with_another_collection(carrying: Sources, folder: Path, tmp_path: Path) -> None:
    variants = {"first-phase": find("sft-only", carrying).folder}
    system = find("variant:first-phase", replace(carrying, variants=variants))
    assert written(system.folder, **system.policy) == written(variants["first-phase"])
    assert system.routed


def test_all_has_the_variants_too(folder: Path) -> None:
    config = read_config(folder)
    assert parse(["all"], config, ["one", "two"]) == [*every_name(config), "variant:one", "variant:two"]


@pytest.mark.parametrize("name", ["variant:nobody", "variant:"])
def test_a_variant_that_was_not_given_is_asked_for(name: str, sources: Sources) -> None:
    with pytest.raises(UsageError, match="--variant"):
        find(name, sources)


def test_a_variant_of_other_experts_is_refused(sources: Sources, tmp_path: Path) -> None:
    spec = read_config(sources.collection).router_spec
    assemble(tmp_path / "other", spec, [replace(spec, name="prose")], relative_to=sources.collection)
    with pytest.raises(UsageError, match="prose"):
        find("variant:other", replace(sources, variants={"other": tmp_path / "other"}))


def test_only_systems_with_routes_report_them(sources: Sources) -> None:
    names = ("fusionroute", "query-level", "router", "uniform", "expert:math")
    routed = [name for name in names if find(name, sources).routed]
    assert routed == ["fusionroute", "query-level"]
