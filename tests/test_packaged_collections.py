"""The collections in the package, as files: what the wheel takes of them, and that they are what they say.

None of their bases is needed here.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fusionroute import collection, hub, weights

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path for path in collection.PACKAGED.iterdir() if path.is_dir())
LIMITS = {"smollm2": 25e6, "qwen2.5-coder": 30e6}  # bytes
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipInfo]:
    """Built, not added up: what is left out of the wheel is for the build to say."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(build, check=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as files:
        return {info.filename: info for info in files.infolist()}


@pytest.mark.slow
@each
def test_it_is_small_enough_for_the_wheel(folder: Path, wheel: dict[str, zipfile.ZipInfo]) -> None:
    """Unpacked."""
    inside = [info.file_size for name, info in wheel.items() if f"/collections/{folder.name}/" in name]
    assert 0 < sum(inside) < LIMITS[folder.name]


@each
def test_nothing_in_it_is_large_but_what_was_trained(folder: Path) -> None:
    """A tokenizer over that size is left to the base."""
    large = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 3e6]
    assert [path.name for path in large if path.suffix != ".safetensors"] == []


@pytest.mark.slow
@each
def test_baselines_are_not_in_the_wheel(folder: Path, wheel: dict[str, zipfile.ZipInfo]) -> None:
    inside = [name for name in wheel if f"/collections/{folder.name}/" in name]
    assert any(name.endswith("router/adapter_model.safetensors") for name in inside)
    assert not any("/baselines/" in name for name in inside)


@each
def test_every_source_in_it_can_be_had_elsewhere(folder: Path) -> None:
    assert hub.local_references(collection.read_config(folder)) == []


@each
def test_its_adapters_are_those_that_its_configuration_names(folder: Path) -> None:
    config = collection.read_config(folder)
    own = {spec.adapter: spec.adapter_digest for spec in config.member_specs if spec.adapter is not None}
    assert {name: weights.digest(folder / name) for name in own} == own


@each
def test_its_card_names_what_the_figures_were_measured_with(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for spec in collection.read_config(folder).member_specs:
        assert spec.digest is not None
        assert spec.digest.removeprefix("sha256:")[:12] in card
        assert spec.license == "apache-2.0"
