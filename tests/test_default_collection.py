"""The collection in the package, on the real base: that it loads, that it is what it says, that it routes."""

import json
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from fusionroute import collection, hub

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FOLDER = collection.PACKAGED / collection.DEFAULT


@cache
def answer(prompt: str) -> dict:
    command = [sys.executable, "-m", "fusionroute", "generate", prompt, "--json", "--max-new-tokens", "24"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_it_is_small_enough_for_the_wheel(tmp_path: Path) -> None:
    """Built, not added up: what is left out of the wheel is for the build to say."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        sizes = {info.filename: info.file_size for info in files.infolist() if "/collections/smollm2/" in info.filename}
    assert sum(sizes.values()) < 25e6
    assert any(name.endswith("router/adapter_model.safetensors") for name in sizes)
    assert not any("/baselines/" in name for name in sizes)


def test_every_source_in_it_can_be_had_elsewhere() -> None:
    assert hub.local_references(collection.read_config(FOLDER)) == []


def test_it_is_what_it_says() -> None:
    done = subprocess.run([sys.executable, "-m", "fusionroute", "inspect", "--json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["head"] == {"trained": True, "experts": ["general", "math", "code"]}
    for member in report["members"]:
        assert member["digest_matches"]
        assert member["adapter_digest_matches"] in (None, True)
        assert member["license"] == "apache-2.0"


def test_a_sum_goes_to_the_math_expert() -> None:
    shares = answer("Tom has 5 apples and buys 7 more. He eats 2. How many apples does he have left?")["shares"]
    assert max(shares, key=shares.__getitem__) == "math"


def test_a_program_goes_to_the_code_expert() -> None:
    shares = answer("Write a Python function that returns the larger of two numbers.")["shares"]
    assert max(shares, key=shares.__getitem__) == "code"


def test_members_share_one_base_in_memory() -> None:
    from fusionroute import FusionRouteForCausalLM

    model = FusionRouteForCausalLM.from_pretrained()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    base = sum(p.numel() * p.element_size() for n, p in model.experts[0].model.named_parameters() if "lora_" not in n)
    adapters = sum(p.numel() * p.element_size() for n, p in model.experts[0].model.named_parameters() if "lora_" in n)
    assert sum(storages.values()) == base + adapters + model.router.route_head.weight.nbytes
