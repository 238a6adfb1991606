from collections.abc import Callable
from pathlib import Path

import pytest

from fusionroute import FusionRouteForCausalLM
from fusionroute.collection import read_config
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.rows import Request
from fusionroute.errors import UsageError
from fusionroute.evaluation.systems import Sources, every_name, find, parse

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


def test_a_fine_tuned_adapter_runs_as_one_model(sources: Sources, folder: Path, tmp_path: Path) -> None:
    spec = next(spec for spec in read_config(folder).expert_specs if spec.name == "math")
    model = f"{spec.source}+{folder / spec.module}"
    system = find("finetuned", Sources(folder, tmp_path / "work", finetuned=model))
    assert written(system.folder, **system.policy) == written(folder, expert="math", alpha=0.0)


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


def test_only_systems_with_routes_report_them(sources: Sources) -> None:
    names = ("fusionroute", "query-level", "router", "uniform", "expert:math")
    routed = [name for name in names if find(name, sources).routed]
    assert routed == ["fusionroute", "query-level"]
