import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fusionroute import FusionRouteForCausalLM, weights
from fusionroute.baselines.carried import carried, carry, reward_source, shown, split_adapter
from fusionroute.collection import read_config
from fusionroute.errors import FusionRouteError
from fusionroute.files import write_json


@pytest.fixture
def folder(make_collection: Callable[[str], Path], tmp_path: Path) -> Path:
    """A collection that carries its first expert's adapter as a reward model."""
    out = tmp_path / "collection"
    shutil.copytree(make_collection("adapters"), out)
    spec = read_config(out).router_spec
    made = tmp_path / "made"
    shutil.copytree(out / "expert_math", made)
    write_json(made / "provenance.json", {"base": spec.source, "base_digest": weights.digest(Path(spec.source))})
    write_json(made / "reward.json", {"value": 0.5})
    (tmp_path / "route_head.safetensors").write_bytes((out / "router" / "route_head.safetensors").read_bytes())
    carry(out, {"reward": made, "sft": made}, spec.source, tmp_path / "route_head.safetensors")
    return out


def test_adapters_are_copied_with_what_lies_beside_them(folder: Path) -> None:
    assert weights.digest(folder / "baselines" / "reward") == weights.digest(folder / "expert_math")
    assert json.loads((folder / "baselines" / "reward" / "reward.json").read_text()) == {"value": 0.5}
    assert (folder / "baselines" / "sft" / "route_head.safetensors").is_file()
    assert not (folder / "baselines" / "reward" / "route_head.safetensors").exists()


def test_no_path_of_this_machine_is_carried(folder: Path) -> None:
    source = read_config(folder).router_spec.source
    assert [path for path in (folder / "baselines").rglob("*.json") if source in path.read_text()] == []


def test_carrying_again_replaces(folder: Path) -> None:
    carry(folder, {"judge": folder / "expert_code"}, "org/name")
    assert [path.name for path in (folder / "baselines").iterdir()] == ["judge"]
    assert carried(folder, "reward") is None
    assert carried(folder, "judge") == folder / "baselines" / "judge"


def test_members_do_not_depend_on_what_is_carried(folder: Path, make_collection: Callable[[str], Path]) -> None:
    assert read_config(folder).to_dict() == read_config(make_collection("adapters")).to_dict()
    assert FusionRouteForCausalLM.from_pretrained(folder) is not None


def test_a_carried_reward_model_stands_on_the_members_base(folder: Path) -> None:
    source = read_config(folder).router_spec.source
    assert reward_source(folder, None, None) == f"{source}+{folder / 'baselines' / 'reward'}"


def test_another_base_is_the_reward_models_too(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(read_config(folder).router_spec.source, other)
    assert reward_source(folder, str(other), None) == f"{other}+{folder / 'baselines' / 'reward'}"


def test_what_is_given_wins_and_none_is_none(folder: Path) -> None:
    assert reward_source(folder, None, "org/reward") == "org/reward"
    assert reward_source(folder, None, None, name="judge") is None


def test_a_reward_model_on_nobodys_base_is_refused(folder: Path) -> None:
    write_json(folder / "baselines" / "reward" / "provenance.json", {"base_digest": "sha256:00"})
    with pytest.raises(FusionRouteError, match=r"sha256:00, which is no member's: give --reward SOURCE\+"):
        reward_source(folder, None, None)


def test_an_embedded_base_is_found_in_the_collection(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(config["router"]["source"], folder / "base")
    for member in (config["router"], *config["experts"]):
        member["source"] = "./base"
    write_json(folder / "config.json", config)
    assert reward_source(folder, None, None) == f"{folder / 'base'}+{folder / 'baselines' / 'reward'}"


def test_what_is_carried_is_told_by_its_place_and_the_rest_as_given(folder: Path) -> None:
    source = reward_source(folder, None, None)
    assert source is not None
    assert shown(source, folder) == "the collection's baselines/reward"
    assert shown("org/reward+org/adapter", folder) == "org/reward+org/adapter"


def test_source_and_adapter_are_told_apart(folder: Path, tmp_path: Path) -> None:
    plus = tmp_path / "a+b"
    shutil.copytree(folder / "expert_math", plus)
    assert split_adapter("org/name") == ("org/name", None)
    assert split_adapter("org/name+org/adapter") == ("org/name", "org/adapter")
    assert split_adapter(f"wheel:x==1+cpu/m.gguf+{plus}") == ("wheel:x==1+cpu/m.gguf", str(plus))
    assert split_adapter(str(plus)) == (str(plus), None)
    assert split_adapter(f"{plus}+org/adapter") == (str(plus), "org/adapter")
