"""What people install: sdist and wheel, built as a release is, and the wheel in a clean environment."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

# Runs in the clean environment, where none of the dependencies are.
PROBE = """
import importlib.metadata, importlib.resources, json, fusionroute
root = importlib.resources.files("fusionroute")
collection = root / "collections" / "smollm2"
meta = importlib.metadata.metadata("fusionroute")
print(json.dumps({
    "version": fusionroute.__version__,
    "metadata": meta["Version"],
    "license": meta["License-Expression"],
    "typed": (root / "py.typed").is_file(),
    "collection": sorted(p.name for p in collection.iterdir()),
    "experts": [e["name"] for e in json.loads((collection / "config.json").read_text())["experts"]],
    "commands": sorted(e.name for e in importlib.metadata.entry_points(group="console_scripts")
                       if e.value.startswith("fusionroute.")),
}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def clean(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(built["wheel"])]
    subprocess.run(install, check=True)
    return python


def test_sizes_are_told(built: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    with zipfile.ZipFile(built["wheel"]) as files:
        inside = sum(f.file_size for f in files.infolist() if "/collections/" in f.filename)
        second = sum(f.compress_size for f in files.infolist() if "/collections/qwen2.5-coder/" in f.filename) / 1e6
    sizes = {name: path.stat().st_size / 1e6 for name, path in built.items()}
    with capsys.disabled():
        told = ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items())
        print(f"\n{told}; of the wheel, unpacked, the collections are {inside / 1e6:.1f} MB")
    assert sizes["wheel"] - second < 30  # that one's own bound is in test_packaged_collections
    assert sizes["sdist"] < 60


def test_the_wheel_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(clean), "-c", PROBE], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == found["metadata"]
    assert found["license"] == "Apache-2.0"
    assert found["typed"]
    assert found["experts"] == ["general", "math", "code"]
    assert {"config.json", "expert_math", "expert_code", "router", "tokenizer.json"} <= set(found["collection"])
    assert "baselines" not in found["collection"]
    assert found["commands"] == ["fusionroute"]


def test_a_program_that_uses_the_wheel_is_checked_strictly(clean: Path, tmp_path: Path) -> None:
    """Names of the public API have types where the package is installed, not only in the checkout."""
    program = tmp_path / "program.py"
    program.write_text((ROOT / "examples" / "library.py").read_text() + "reveal_type(engine.generate)\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", str(clean)]
    # Of the dependencies nothing is installed, so what they type is unknown; ours must not be.
    options = ["--ignore-missing-imports", "--follow-imports", "silent", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, *options, str(program)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "list[fusionroute.decoding.rows.Completion]" in done.stdout


def test_the_sdist_has_what_its_tests_need(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "Makefile", "mkdocs.yml"):
        assert name in names
    for folder in ("src", "tests", "docs", "examples", "recipes", "benchmarks"):
        assert any(name.startswith(f"{folder}/") for name in names), folder
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "build/", "dist/"))]
