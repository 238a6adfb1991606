"""Experts with rounded weights: what is rounded, what is refused, and that it is said."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fusionroute import Engine, FusionRouteForCausalLM, Request
from fusionroute.cli import app
from fusionroute.collection import read_config
from fusionroute.decoding.members import PackedPool
from fusionroute.errors import UsageError
from fusionroute.evaluation.systems import Sources, find
from fusionroute.files import read_json, write_json
from fusionroute.inspection import inspect_collection
from fusionroute.members import LoadOptions, quantised
from fusionroute.placement import Placement

PROMPT = [5, 9, 250, 17, 33]


@pytest.fixture
def load(make_collection: Callable[[str], Path]) -> Callable[..., FusionRouteForCausalLM]:
    def load(shape: str, **experts: str) -> FusionRouteForCausalLM:
        placement = {name: Placement(dtype=form) for name, form in experts.items()}
        return FusionRouteForCausalLM.from_pretrained(make_collection(shape), dtype="float32", placement=placement)

    return load


@pytest.fixture
def rounded_collection(make_collection: Callable[[str], Path], tmp_path: Path) -> Path:
    """One that says it itself."""
    folder = shutil.copytree(make_collection("llama"), tmp_path / "collection")
    config = read_json(folder / "config.json")
    config["experts"][1]["dtype"] = "int8"
    write_json(folder / "config.json", config)
    return folder


@pytest.mark.parametrize(("form", "largest"), [("int8", 127), ("int4", 7)])
def test_weights_of_the_blocks_are_rounded(form: str, largest: int, load: Callable) -> None:
    plain, lossy = (load("llama", **more).experts[1].model for more in ({}, {"code": form}))
    before, after = plain.model.layers[0].mlp.up_proj.weight, lossy.model.layers[0].mlp.up_proj.weight
    # Of 32 weights that share a scale: no further off than a step, and no more values than the bits can hold.
    groups, exact = after.dequantize().unflatten(1, (-1, 32)), before.unflatten(1, (-1, 32))
    steps = before.abs().amax(1)[:, None, None] / largest
    assert (groups - exact).abs().max() > 0
    assert ((groups - exact).abs() <= steps).all()
    assert max(len(group.unique()) for group in groups.flatten(0, 1)) <= min(2 * largest + 2, 32)
    assert torch.equal(plain.model.embed_tokens.weight, lossy.model.embed_tokens.weight)
    assert torch.equal(plain.lm_head.weight, lossy.lm_head.weight)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_engine_writes_what_the_rounded_model_defines(form: str, load: Callable) -> None:
    model = load("llama", code=form)
    assert quantised(model.members) == {"code": form}
    prompts = [PROMPT, PROMPT[:2], [7]]
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None) for p in prompts
    ]
    engine = Engine(model)
    assert all(isinstance(pool, PackedPool) for pool in engine.members.of)
    answers = engine.generate([Request(prompt, 12, ignore_end=True) for prompt in prompts])
    assert [answer.ids for answer in answers] == [
        ids[0, len(prompt) :].tolist() for ids, prompt in zip(expected, prompts, strict=True)
    ]


def test_a_bare_base_is_rounded_in_a_copy_of_its_own(load: Callable) -> None:
    model = load("bare", math="int8")
    router, math, code = model.members
    assert math.model is not router.model
    assert code.model is router.model
    assert type(router.model.model.layers[0].mlp.up_proj.base_layer.weight) is torch.nn.Parameter


@pytest.mark.parametrize(
    ("shape", "experts", "message"),
    [
        ("llama", {"router": "int8"}, "router in int8: it is the router, only experts that are whole models can be"),
        ("adapters", {"math": "int4"}, "math in int4: it is an adapter"),
        ("llama", {"math": "int4"}, "shares a scale among 32 weights, and this model has matrices 48 wide"),
    ],
)
def test_what_cannot_be_rounded(shape: str, experts: dict[str, str], message: str, load: Callable) -> None:
    with pytest.raises(UsageError, match=message):
        load(shape, **experts)


def test_no_dtype_to_compute_in(make_collection: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"unknown dtype 'int8'.*--place NAME=,int8"):
        FusionRouteForCausalLM.from_pretrained(make_collection("llama"), dtype="int8")


def test_what_is_asked_for_all_is_what_it_computes_in(rounded_collection: Path) -> None:
    spec = read_config(rounded_collection).expert_specs[1]
    every = LoadOptions(dtype=torch.bfloat16)
    assert (every.of(spec).dtype, every.of(spec).quantised) == (torch.bfloat16, "int8")
    one = LoadOptions(placement={"code": Placement(dtype="float32")}).of(spec)
    assert (one.dtype, one.quantised) == (torch.float32, None)


def test_saved_it_is_what_was_published(rounded_collection: Path, tmp_path: Path) -> None:
    model = FusionRouteForCausalLM.from_pretrained(rounded_collection)
    model.save_pretrained(tmp_path / "again")
    first, again = (read_config(folder).experts[1] for folder in (rounded_collection, tmp_path / "again"))
    assert (again["dtype"], again["digest"]) == ("int8", first["digest"])


def test_answers_say_so(rounded_collection: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "Hi", "-c", str(rounded_collection), "--max-new-tokens", "3"])
    assert done.exit_code == 0, done.output
    assert "code (int8)" in done.output


def test_evaluation_takes_it_for_another_system(rounded_collection: Path, make_collection: Callable) -> None:
    plain, lossy = (
        find("expert:code", Sources(folder, folder)).identity(read_config(folder), None)
        for folder in (make_collection("llama"), rounded_collection)
    )
    assert plain != lossy


def test_inspection_counts_a_byte_a_weight(rounded_collection: Path, make_collection: Callable) -> None:
    plain, lossy = (inspect_collection(folder)["memory"] for folder in (make_collection("llama"), rounded_collection))
    model = FusionRouteForCausalLM.from_pretrained(make_collection("llama")).experts[1].model
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert plain["weights_bytes"] - lossy["weights_bytes"] == 3 * blocks


def test_without_torchao(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(UsageError, match=r"pip install 'fusionroute\[torchao\]'"):
        load("llama", code="int8")
