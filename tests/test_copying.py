"""A member's files copied: the same model or adapter, and nothing of the machine they lay on."""

import json
from pathlib import Path

import pytest

from fusionroute import weights
from fusionroute.copying import copy_adapter, copy_model
from weight_files import SHA, tiny_model

pytestmark = pytest.mark.usefixtures("home")

PROVENANCES = pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("/home/me/base", None),
        ("~/base", None),
        ("me/models/base", None),
        ("org/base", "org/base"),
        (f"wheel:p==1/a.gguf#sha256={SHA}", f"wheel:p==1/a.gguf#sha256={SHA}"),
        (None, None),
    ],
)


def read(file: Path) -> dict[str, object]:
    return json.loads(file.read_text())


def test_what_is_no_part_of_the_model_stays(model_folder: Path, tmp_path: Path) -> None:
    model = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    for name in ("consolidated.safetensors", "trainer_state.json", "optimizer.pt", "modeling.py", "training_args.bin"):
        (model_folder / name).write_bytes(b"{}")
    copy_model(model_folder, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == model


def test_every_shard_goes_along(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    copy_model(tmp_path / "model", tmp_path / "out")
    assert weights.digest(tmp_path / "out") == weights.digest(tmp_path / "model")


def test_a_config_does_not_tell_where_it_was_loaded_from(model_folder: Path, tmp_path: Path) -> None:
    config = read(model_folder / "config.json")
    (model_folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/base"}))
    copy_model(model_folder, tmp_path / "out")
    assert read(tmp_path / "out" / "config.json") == config


@PROVENANCES
def test_a_models_provenance_tells_no_path(
    model_folder: Path, tmp_path: Path, base: str | None, kept: str | None
) -> None:
    (model_folder / "provenance.json").write_text(json.dumps({"base": base, "items": 3}))
    copy_model(model_folder, tmp_path / "out")
    assert read(tmp_path / "out" / "provenance.json") == {"base": kept, "items": 3}


@PROVENANCES
def test_an_adapters_provenance_tells_no_path(
    adapter_folder: Path, tmp_path: Path, base: str | None, kept: str | None
) -> None:
    (adapter_folder / "provenance.json").write_text(json.dumps({"base": base, "items": 3}))
    copy_adapter(adapter_folder, tmp_path / "out", "org/base")
    assert read(tmp_path / "out" / "provenance.json") == {"base": kept, "items": 3}


@pytest.mark.parametrize(("source", "named"), [("org/base", "org/base"), ("/home/me/base", None), ("./base", None)])
def test_an_adapter_names_a_base_that_others_can_load(
    adapter_folder: Path, tmp_path: Path, source: str, named: str | None
) -> None:
    copy_adapter(adapter_folder, tmp_path / "out", source)
    assert read(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"] == named
    assert weights.digest(tmp_path / "out") == weights.digest(adapter_folder)
