"""Weight files: what is not whole is refused, and what a digest depends on."""

import json
import os
import time
from pathlib import Path

import pytest
import safetensors.torch

from fusionroute import weights
from fusionroute.errors import FusionRouteError
from fusionroute.tiny import make_adapter
from weight_files import tiny_model

pytestmark = pytest.mark.usefixtures("home")

# ---- are they whole?


def test_missing_config_is_named(model_folder: Path) -> None:
    (model_folder / "config.json").unlink()
    with pytest.raises(FusionRouteError, match=r"has no config\.json"):
        weights.check_model(model_folder)


def test_half_written_weights_are_named_with_both_sizes(model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(FusionRouteError, match=rf"model\.safetensors .*{size - 100} bytes, its header says {size}"):
        weights.check_model(model_folder)


@pytest.mark.parametrize("content", [b"", b"\x01\x02", b"\xff" * 40, b"\x04" + b"\0" * 7 + b"oops"])
def test_weights_without_a_header_are_refused(model_folder: Path, content: bytes) -> None:
    (model_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FusionRouteError, match="is not a whole safetensors file"):
        weights.check_model(model_folder)


def test_pickled_weights_are_refused(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(FusionRouteError, match=r"pytorch_model\.bin, which is pickle: safetensors only"):
        weights.check_model(model_folder)


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_16", "olora", "corda", "loftq"])
def test_an_adapter_that_changes_the_base_is_refused(tmp_path: Path, begun: str) -> None:
    make_adapter(tmp_path, tiny_model(), seed=0)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": begun}))
    with pytest.raises(FusionRouteError, match=f"init_lora_weights='{begun}': its start was taken off the base"):
        weights.check_adapter(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(FusionRouteError, match=f"{shard.name} is missing"):
        weights.check_model(tmp_path)


def test_an_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["ghost.weight"] = min(value["weight_map"].values())
    index.write_text(json.dumps(value))
    with pytest.raises(FusionRouteError, match=r"names ghost\.weight"):
        weights.check_model(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}'])
def test_an_index_without_a_map_is_refused(tmp_path: Path, content: str) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FusionRouteError, match=r"index\.json has no weight_map"):
        weights.check_model(tmp_path)


def test_a_model_with_an_adapter_beside_it_is_refused(model_folder: Path) -> None:
    (model_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(FusionRouteError, match="a model and an adapter"):
        weights.check_model(model_folder)


def test_a_config_that_is_no_object_is_refused(model_folder: Path) -> None:
    (model_folder / "config.json").write_text("[]")
    with pytest.raises(FusionRouteError, match=r"config\.json is not a JSON object"):
        weights.check_model(model_folder)


def test_a_pickled_adapter_is_refused(adapter_folder: Path) -> None:
    (adapter_folder / "adapter_model.safetensors").rename(adapter_folder / "adapter_model.bin")
    with pytest.raises(FusionRouteError, match="which is pickle"):
        weights.check_adapter(adapter_folder)


def test_a_half_written_adapter_is_refused(adapter_folder: Path) -> None:
    os.truncate(adapter_folder / "adapter_model.safetensors", 90)
    with pytest.raises(FusionRouteError, match=r"adapter_model\.safetensors is not a whole"):
        weights.check_adapter(adapter_folder)


# ---- licences


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("# Model\nlicense: mit\n", None),
        ("---\nlicense: [\n---\n", None),
    ],
)
def test_license_is_read_from_front_matter(tmp_path: Path, readme: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert weights.license_of(tmp_path) == expected


def test_license_without_readme_is_none(tmp_path: Path) -> None:
    assert weights.license_of(tmp_path) is None


# ---- digests


def settle(folder: Path) -> None:
    """Date the files a minute back, so that their digest is remembered."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 60,) * 2)


def test_digest_is_independent_of_sharding_and_of_a_tied_copy(tmp_path: Path) -> None:
    model = tiny_model(tied=True)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert weights.digest(tmp_path / "whole") == weights.digest(tmp_path / "shards")


def test_digest_is_independent_of_file_metadata(model_folder: Path) -> None:
    before = weights.digest(model_folder)
    tensors = safetensors.torch.load_file(model_folder / "model.safetensors")
    safetensors.torch.save_file(tensors, model_folder / "model.safetensors", metadata={"format": "pt", "by": "someone"})
    assert weights.digest(model_folder) == before


def test_digest_changes_with_one_value(model_folder: Path) -> None:
    before = weights.digest(model_folder)
    tensors = safetensors.torch.load_file(model_folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    safetensors.torch.save_file(tensors, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert weights.digest(model_folder) != before


def test_digest_changes_with_a_name(model_folder: Path) -> None:
    before = weights.digest(model_folder)
    tensors = safetensors.torch.load_file(model_folder / "model.safetensors")
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    safetensors.torch.save_file(tensors, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert weights.digest(model_folder) != before


def edit(adapter: Path, **changes: object) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 8},
        {"use_rslora": True},
        {"target_modules": ["q_proj"]},
        {"rank_pattern": {"q": 4}},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"trainable_token_indices": [7, 5]},
    ],
)
def test_adapter_digest_changes_with_what_changes_the_function(adapter_folder: Path, change: dict[str, object]) -> None:
    before = weights.digest(adapter_folder)
    edit(adapter_folder, **change)
    assert weights.digest(adapter_folder) != before


def test_adapter_digest_keeps_the_order_of_replicated_layers(adapter_folder: Path) -> None:
    edit(adapter_folder, layer_replication=[[0, 4], [2, 5]])
    before = weights.digest(adapter_folder)
    edit(adapter_folder, layer_replication=[[2, 5], [0, 4]])
    assert weights.digest(adapter_folder) != before


@pytest.mark.parametrize(
    "change",
    [{"base_model_name_or_path": "/elsewhere"}, {"target_modules": ["q_proj", "v_proj"]}, {"use_dora": False}],
)
def test_adapter_digest_ignores_the_rest(adapter_folder: Path, change: dict[str, object]) -> None:
    before = weights.digest(adapter_folder)
    edit(adapter_folder, **change)
    assert weights.digest(adapter_folder) == before


def test_digest_of_settled_files_is_remembered(model_folder: Path, home: Path) -> None:
    settle(model_folder)
    digest = weights.digest(model_folder)
    notes = [path.read_text() for path in (home / "fusionroute" / "digests").iterdir()]
    assert [f"sha256:{note}" for note in notes] == [digest]


def test_digest_of_fresh_files_is_not_remembered(model_folder: Path, home: Path) -> None:
    weights.digest(model_folder)
    assert not (home / "fusionroute" / "digests").exists()


def test_digest_needs_no_writable_cache(model_folder: Path, home: Path) -> None:
    settle(model_folder)
    home.write_text("a file where the cache folder should be")
    assert weights.digest(model_folder).startswith("sha256:")


def test_digest_of_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match="nowhere is missing"):
        weights.digest(tmp_path / "nowhere")
