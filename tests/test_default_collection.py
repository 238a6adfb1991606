"""The collection in the package, on the real base: that it loads, that it is what it says, that it routes."""

import json
import subprocess
import sys
from functools import cache

import pytest

pytestmark = pytest.mark.slow


@cache
def answer(prompt: str) -> dict:
    command = [sys.executable, "-m", "fusionroute", "generate", prompt, "--json", "--max-new-tokens", "24"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


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
