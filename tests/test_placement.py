"""Members on devices and in dtypes of their own. Where there is no GPU, `meta` is the other device: it computes no
values, but what stands on it cannot be mixed with what does not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fusionroute import Engine, FusionRouteForCausalLM, Request, placement
from fusionroute.cli import app
from fusionroute.collection import read_config
from fusionroute.decoding.budget import KVBudget
from fusionroute.decoding.members import Job, Members
from fusionroute.errors import UsageError
from fusionroute.files import read_json, write_json
from fusionroute.members import LoadOptions
from fusionroute.placement import Placement, parse_placements

PROMPT = [5, 9, 250, 17, 33]
META = torch.device("meta")


@pytest.fixture
def load(make_collection: Callable[[str], Path]) -> Callable[..., FusionRouteForCausalLM]:
    def load(shape: str, **more: object) -> FusionRouteForCausalLM:
        return FusionRouteForCausalLM.from_pretrained(make_collection(shape), **more)  # type: ignore[arg-type]

    return load


# ---- what is asked for


def test_the_form() -> None:
    assert parse_placements(["math=cuda:1,bfloat16,eager", "code=,float32", "router=cpu"]) == {
        "math": Placement("cuda:1", "bfloat16", "eager"),
        "code": Placement(None, "float32"),
        "router": Placement("cpu"),
    }


@pytest.mark.parametrize("entry", ["math", "math=", "=cpu", "math=,,", "math=cpu,float32,eager,more"])
def test_another_form_is_refused(entry: str) -> None:
    with pytest.raises(UsageError, match=r"must be NAME=DEVICE\[,DTYPE\[,ATTENTION\]\]"):
        parse_placements([entry])


def test_a_member_named_twice() -> None:
    with pytest.raises(UsageError, match="names math twice"):
        parse_placements(["math=cpu", "math=cuda"])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"maths": Placement("cpu")}, r"no member maths to place: there are router, math, code"),
        ({"math": Placement("gpu:0")}, r"math: unknown device 'gpu:0'"),
        ({"math": Placement(dtype="float31")}, r"unknown dtype 'float31'"),
    ],
)
def test_what_cannot_be(where: dict, message: str, load: Callable) -> None:
    with pytest.raises(UsageError, match=message):
        load("adapters", placement=where)


def test_who_is_heard_first(make_collection: Callable[[str], Path]) -> None:
    """What is asked for one member, then for all, then what the collection says."""
    spec = read_config(make_collection("llama")).expert_specs[0]
    spec.device, spec.dtype, spec.attention = "meta", "float16", "eager"
    alone = LoadOptions().of(spec)
    assert (alone.device, alone.dtype, alone.attn_implementation) == (META, torch.float16, "eager")
    every = LoadOptions(dtype=torch.bfloat16, device="cpu", attn_implementation="sdpa")
    assert every.of(spec).dtype == torch.bfloat16
    one = LoadOptions(dtype=torch.bfloat16, placement={spec.name: Placement(dtype="float32")}).of(spec)
    assert (one.device, one.dtype, one.attn_implementation) == (META, torch.float32, "eager")


def test_the_collection_says_it(make_collection: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(make_collection("llama"), tmp_path / "collection")
    config = read_json(folder / "config.json")
    config["experts"][0] |= {"dtype": "bfloat16", "attention": "eager"}
    write_json(folder / "config.json", config)
    model = FusionRouteForCausalLM.from_pretrained(folder)
    assert [member.model.dtype for member in model.members] == [torch.float32, torch.bfloat16, torch.float32]
    assert model.members[1].config._attn_implementation == "eager"
    model.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again" / "config.json")["experts"][0]["dtype"] == "bfloat16"


# ---- what it does


def test_a_base_is_shared_by_those_that_are_placed_alike(load: Callable) -> None:
    model = load("adapters", placement={"math": Placement(dtype="bfloat16")})
    router, math, code = model.members
    assert router.model is code.model
    assert math.model is not router.model
    assert (router.model.dtype, math.model.dtype) == (torch.float32, torch.bfloat16)


def test_no_device_is_the_cpu(load: Callable) -> None:
    router, math, _ = load("adapters", placement={"math": Placement("cpu")}).members
    assert math.model is router.model


@pytest.mark.parametrize("shape", ["adapters", "mixed"])
def test_the_engine_writes_what_the_model_defines(shape: str, load: Callable) -> None:
    """Members of two dtypes, adapters of one base in two pools: the reference model and the engine agree."""
    model = load(shape, placement={"math": Placement(dtype="float64")})
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    (answer,) = Engine(model).generate([Request(PROMPT, 12, ignore_end=True)])
    assert answer.ids == expected[0, len(PROMPT) :].tolist()


def test_a_member_runs_where_it_is(load: Callable) -> None:
    """All that its pool makes is there; its hidden states too."""
    members = Members(load("mixed", placement={"math": Placement("meta")}))
    assert [pool.device.type for pool in members.of] == ["cpu", "meta", "cpu", "cpu"]
    here, there = members.run([Job(0, 0, PROMPT, 1), Job(1, 0, PROMPT, 2)])
    assert (here.device.type, there.device, tuple(there.shape)) == ("cpu", META, (2, 48))
    assert members.of[1].seen(1, 0) == len(PROMPT)


def test_logits_meet_on_the_routers_device(load: Callable) -> None:
    """The first thing that cannot be done with an expert on `meta` is to bring its logits over."""
    model = load("mixed", placement={"math": Placement("meta")})
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model(torch.tensor([PROMPT]), expert="math", use_cache=True)  # without one transformers asks for values
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        Engine(model).generate([Request(PROMPT, 2, expert="math")])
    assert model(torch.tensor([PROMPT]), expert="code").logits.device.type == "cpu"


def test_inputs_come_to_every_member(load: Callable) -> None:
    model = load("llama", device="meta", attn_implementation="eager")
    mask = torch.ones(1, len(PROMPT), dtype=torch.long)
    output = model(torch.tensor([PROMPT]), attention_mask=mask, expert="math", use_cache=True)
    assert (output.logits.device, tuple(output.logits.shape[:2])) == (META, (1, len(PROMPT)))


# ---- memory


def test_every_device_has_a_budget_of_its_own(load: Callable) -> None:
    members = Members(load("mixed", placement={"math": Placement("meta")}))
    both, there = members.nbytes([40]), members.nbytes([40], device=META)
    assert 0 < there < both
    assert members.nbytes([40], device=torch.device("cpu")) == both - there
    assert set(KVBudget(members, 5).limits) == {torch.device("cpu"), META}


def test_rows_wait_for_the_device_with_least_room(load: Callable) -> None:
    members = Members(load("mixed", placement={"math": Placement("meta")}))
    budget = KVBudget(members)
    budget.limits = {torch.device("cpu"): 10**9, META: members.nbytes([40], device=META)}
    assert budget.room([40]) == 0
    assert budget.room([40, 40]) < 0
    assert budget.refusal(40) is None
    assert "on meta and the budget is" in str(budget.refusal(4000))


# ---- the command line


def test_a_command_takes_it(make_collection: Callable[[str], Path], run: Callable) -> None:
    folder = str(make_collection("adapters"))
    options = ("-c", folder, "--max-new-tokens", "3", "--json", "--device", "cpu", "--place")
    code, _, err = run("generate", "hello", *options, "math=,bfloat16")
    assert code == 0, err
    code, _, err = run("generate", "hello", *options, "nobody=cpu")
    assert (code, err.splitlines()[-1]) == (
        2, "error: no member nobody to place: there are router, math, code"
    )  # fmt: skip


def test_commands_run_on_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"dtype": None, "base": None, "place": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert placement.loading(device=None, **asked)["device"] == "cuda"  # type: ignore[arg-type]
    assert placement.loading(device="cpu", **asked)["device"] == "cpu"  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert placement.loading(device=None, **asked)["device"] == "cpu"  # type: ignore[arg-type]


def test_every_command_that_decodes_has_the_options() -> None:
    for command in (["generate"], ["chat"], ["serve"], ["bench", "decode"]):
        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"}).output
        assert "--device" in shown
        assert "--place" in shown
