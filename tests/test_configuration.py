"""What `config.json` holds and refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionroute.configuration import FusionRouteConfig, MemberSpec
from fusionroute.errors import FusionRouteError, UsageError

ROUTER = MemberSpec("router", "org/router", revision="abc", digest="sha256:1")
# Neither sorted nor reverse-sorted: JSON objects would come back in another order.
EXPERTS = [MemberSpec(name, f"org/{name}") for name in ("math", "general", "code", "zeta", "alpha")]


@pytest.fixture
def config() -> FusionRouteConfig:
    config = FusionRouteConfig(vocab_size=320, alpha=0.5, head_trained=True, eos_token_id=[2, 5], training={"b": 1})
    config.set_members(ROUTER, EXPERTS)
    return config


def test_order_of_experts_survives_the_disk(config: FusionRouteConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert FusionRouteConfig.from_pretrained(tmp_path).expert_names == ["math", "general", "code", "zeta", "alpha"]


@pytest.mark.parametrize(
    "key", ["vocab_size", "alpha", "head_trained", "eos_token_id", "training", "router", "experts"]
)
def test_value_survives_the_disk(config: FusionRouteConfig, tmp_path: Path, key: str) -> None:
    config.save_pretrained(tmp_path)
    assert getattr(FusionRouteConfig.from_pretrained(tmp_path), key) == getattr(config, key)


def test_config_is_named_in_json(config: FusionRouteConfig) -> None:
    assert json.loads(config.to_json_string())["model_type"] == "fusionroute"


def test_touching_the_configuration_registers_it(config: FusionRouteConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    script = (
        "import fusionroute, transformers\n"
        "fusionroute.FusionRouteConfig\n"
        f"transformers.AutoConfig.from_pretrained({str(tmp_path)!r})"
    )
    # In a process of its own, since other tests register it by other ways.
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr.splitlines()[-1]


def test_members_are_the_router_then_the_experts(config: FusionRouteConfig) -> None:
    assert config.member_specs == [ROUTER, *EXPERTS]


def test_expert_index_is_the_route_index(config: FusionRouteConfig) -> None:
    assert [config.expert_index(name) for name in ("math", "code", "alpha")] == [0, 2, 4]


def test_unknown_expert_is_refused_with_the_names_there_are(config: FusionRouteConfig, refuses: Callable) -> None:
    with refuses(UsageError, "'maths'", "math, general, code, zeta, alpha"):
        config.expert_index("maths")


def test_the_router_is_no_expert(config: FusionRouteConfig, refuses: Callable) -> None:
    with refuses(UsageError, "'router'"):
        config.expert_index("router")


@pytest.mark.parametrize("names", [["math", "math"], ["math", "router"]])
def test_ambiguous_names_are_refused(names: list[str], refuses: Callable) -> None:
    with refuses(UsageError, names[1]):
        FusionRouteConfig(router=vars(ROUTER), experts=[{"name": name, "source": "org/x"} for name in names])


def test_config_without_router_is_refused(refuses: Callable) -> None:
    with refuses(FusionRouteError, "no router"):
        _ = FusionRouteConfig(experts=[vars(EXPERTS[0])]).member_specs


@pytest.mark.parametrize("name", ["", "Math", "1math", "ma-th", "ma.th", "mäth", "_math", "math ", "a/b", "math\n"])
def test_name_that_is_no_module_name_is_refused(name: str, refuses: Callable) -> None:
    with refuses(UsageError, repr(name)):
        MemberSpec(name, "org/x")


@pytest.mark.parametrize(("name", "module"), [("router", "router"), ("math", "expert_math"), ("m_2", "expert_m_2")])
def test_module_of_a_member(name: str, module: str) -> None:
    assert MemberSpec(name, "org/x").module == module


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"name": "math"}, "source"),
        ({"source": "org/x"}, "name"),
        ({"name": "math", "source": "x", "sauce": 1}, "sauce"),
    ],
)
def test_member_with_other_keys_is_refused(data: dict[str, Any], word: str, refuses: Callable) -> None:
    with refuses(FusionRouteError, word, "config.json"):
        MemberSpec.from_dict(data)


@pytest.mark.parametrize("data", ["math", None, ["math", "org/x"]])
def test_member_that_is_no_object_is_refused(data: Any, refuses: Callable) -> None:
    with refuses(FusionRouteError, repr(data), "config.json"):
        MemberSpec.from_dict(data)


def test_set_members_does_not_share_state_with_the_specs(config: FusionRouteConfig) -> None:
    spec = MemberSpec("math", "org/x")
    config.set_members(ROUTER, [spec])
    spec.source = "org/other"
    assert config.expert_specs[0].source == "org/x"


def test_a_changed_spec_does_not_change_the_config(config: FusionRouteConfig) -> None:
    config.expert_specs[0].source = "org/other"
    assert config.expert_specs[0].source == "org/math"


def test_set_members_refuses_two_experts_of_one_name(config: FusionRouteConfig, refuses: Callable) -> None:
    with refuses(UsageError, "math"):
        config.set_members(ROUTER, [EXPERTS[0], EXPERTS[0]])


# ---- another base


@pytest.fixture
def adapted() -> FusionRouteConfig:
    """An adapter on one base, that base as it stands, another model, and an adapter on another base."""
    config = FusionRouteConfig()
    config.set_members(
        MemberSpec("router", "org/base", "v1", adapter="./router", digest="sha256:1"),
        [
            MemberSpec("bare", "org/base", "v1"),
            MemberSpec("whole", "org/whole", "v1"),
            MemberSpec("other_revision", "org/base", "v2"),
        ],
    )
    return config


def test_without_another_base_the_members_are_as_written(adapted: FusionRouteConfig) -> None:
    assert adapted.specs_on(None) == adapted.member_specs


def test_another_base_replaces_source_and_revision_of_all_that_stand_on_it(adapted: FusionRouteConfig) -> None:
    specs = adapted.specs_on("org/new")
    assert [(spec.source, spec.revision) for spec in specs] == [
        ("org/new", None),
        ("org/new", None),
        ("org/whole", "v1"),
        ("org/base", "v2"),
    ]


def test_another_base_leaves_adapter_and_digest(adapted: FusionRouteConfig) -> None:
    spec = adapted.specs_on("org/new")[0]
    assert (spec.adapter, spec.digest) == ("./router", "sha256:1")


def test_another_base_leaves_the_configuration(adapted: FusionRouteConfig) -> None:
    adapted.specs_on("org/new")
    assert adapted.router_spec.source == "org/base"


@pytest.mark.parametrize("written", ["./new", "new", "../here/new"])
def test_another_base_is_found_from_the_working_folder(
    adapted: FusionRouteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """Not from the collection's, where `./` in a source starts."""
    (tmp_path / "here" / "new").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert adapted.specs_on(written)[0].source == str(tmp_path / "here" / "new")


def test_another_base_that_is_a_file_keeps_its_digest(
    adapted: FusionRouteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    digest = "#sha256=" + "ab" * 32
    assert adapted.specs_on("m.gguf" + digest)[0].source == str(tmp_path / "m.gguf") + digest
    assert adapted.specs_on("")[0].source == ""  # no source, and not the working folder


def test_another_base_that_is_not_there_is_not_looked_for_in_the_collection(
    adapted: FusionRouteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not adapted.specs_on("./missing")[0].source.startswith("./")


def test_another_base_without_adapters_is_refused(config: FusionRouteConfig, refuses: Callable) -> None:
    with refuses(UsageError, "--base"):
        config.specs_on("org/new")
