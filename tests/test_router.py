"""The route head, on its own and on a member; its file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fusionroute import tiny
from fusionroute.errors import FusionRouteError
from fusionroute.members import LoadOptions, Member, attach_adapter, load_model
from fusionroute.router import HEAD_FILE, RouteHead, Router, head_width, save_router_adapter

NAMES = ["math", "general", "code"]
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 250, 17, 33, 4, 4, 90], [7, 7, 100, 21, 2, 0, 3, 300]])


@pytest.fixture
def head() -> RouteHead:
    torch.manual_seed(0)
    head = RouteHead(8, NAMES)
    torch.nn.init.normal_(head.weight)
    head.trained = True
    return head


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen2"])
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    folder = tmp_path_factory.mktemp("router")
    tiny.make_model(folder, family=request.param, width=32)
    return Member("router", load_model(folder, LoadOptions()), folder=folder)


@pytest.fixture
def router(member: Member) -> Router:
    torch.manual_seed(0)
    head = RouteHead(32, NAMES)
    torch.nn.init.normal_(head.weight)
    return Router(member, head)


# ---- the head


def test_untrained_head_scores_zero() -> None:
    head = RouteHead(8, NAMES)
    assert not head.trained
    assert torch.equal(head(torch.randn(2, 3, 8)), torch.zeros(2, 3, 3))


def test_scores_are_float32_of_bfloat16_states(head: RouteHead) -> None:
    hidden = torch.randn(2, 3, 8).bfloat16()
    scores = head(hidden)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, hidden.double().matmul(head.weight.double().T).float(), atol=1e-6)


def test_head_has_no_bias(head: RouteHead) -> None:
    assert head(torch.zeros(8)).tolist() == [0.0, 0.0, 0.0]


def test_head_survives_the_disk_bit_for_bit(head: RouteHead, tmp_path: Path) -> None:
    head.save(tmp_path)
    assert torch.equal(RouteHead.load(tmp_path, NAMES, 8, CPU).weight, head.weight)


@pytest.mark.parametrize("trained", [True, False])
def test_head_remembers_whether_it_was_trained(head: RouteHead, tmp_path: Path, trained: bool) -> None:
    head.trained = trained
    head.save(tmp_path)
    assert RouteHead.load(tmp_path, NAMES, 8, CPU).trained is trained


def test_saving_leaves_one_file(head: RouteHead, tmp_path: Path) -> None:
    head.save(tmp_path)
    head.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [HEAD_FILE]


def test_head_is_saved_in_float32_from_a_bfloat16_module(head: RouteHead, tmp_path: Path) -> None:
    head.bfloat16().save(tmp_path)
    with safe_open(tmp_path / HEAD_FILE, "pt") as file:
        assert file.get_tensor("weight").dtype == torch.float32


def test_missing_head_is_refused(tmp_path: Path, refuses: Callable) -> None:
    with refuses(FusionRouteError, tmp_path / HEAD_FILE, "missing"):
        RouteHead.load(tmp_path, NAMES, 8, CPU)


@pytest.mark.parametrize("left", [0, 4, 40, -1])
def test_half_written_head_is_refused(head: RouteHead, tmp_path: Path, left: int, refuses: Callable) -> None:
    head.save(tmp_path)
    data = (tmp_path / HEAD_FILE).read_bytes()
    (tmp_path / HEAD_FILE).write_bytes(data[:left])
    with refuses(FusionRouteError, tmp_path / HEAD_FILE, "not whole"):
        RouteHead.load(tmp_path, NAMES, 8, CPU)


def test_other_order_of_experts_is_refused_with_both_orders(head: RouteHead, tmp_path: Path, refuses: Callable) -> None:
    head.save(tmp_path)
    with refuses(FusionRouteError, "math, general, code", "code, general, math"):
        RouteHead.load(tmp_path, NAMES[::-1], 8, CPU)


def test_other_number_of_experts_is_refused(head: RouteHead, tmp_path: Path, refuses: Callable) -> None:
    head.save(tmp_path)
    with refuses(FusionRouteError, "math, general, code", "lists math, general:"):
        RouteHead.load(tmp_path, NAMES[:2], 8, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_head_that_is_not_finite_is_refused(head: RouteHead, tmp_path: Path, value: float, refuses: Callable) -> None:
    head.weight.data[1, 3] = value
    head.save(tmp_path)
    with refuses(FusionRouteError, HEAD_FILE, "not finite"):
        RouteHead.load(tmp_path, NAMES, 8, CPU)


def test_head_whose_list_of_experts_is_damaged_is_refused(tmp_path: Path, refuses: Callable) -> None:
    save_file({"weight": torch.zeros(3, 8)}, tmp_path / HEAD_FILE, {"route_head": '{"experts": ['})
    with refuses(FusionRouteError, HEAD_FILE, "not whole"):
        RouteHead.load(tmp_path, NAMES, 8, CPU)


def test_head_of_another_width_is_refused_with_both(head: RouteHead, tmp_path: Path, refuses: Callable) -> None:
    head.save(tmp_path)
    with refuses(FusionRouteError, "[3, 8]", "[3, 16]"):
        RouteHead.load(tmp_path, NAMES, 16, CPU)


def test_head_without_its_list_of_experts_is_refused(tmp_path: Path, refuses: Callable) -> None:
    save_file({"weight": torch.zeros(3, 8)}, tmp_path / HEAD_FILE)
    with refuses(FusionRouteError, HEAD_FILE, "math, general, code"):
        RouteHead.load(tmp_path, NAMES, 8, CPU)


def test_head_without_a_weight_is_refused(tmp_path: Path, refuses: Callable) -> None:
    save_file({"bias": torch.zeros(3)}, tmp_path / HEAD_FILE, {"experts": json.dumps(NAMES)})
    with refuses(FusionRouteError, HEAD_FILE):
        RouteHead.load(tmp_path, NAMES, 8, CPU)


# ---- the router


def test_scores_read_the_last_hidden_state(router: Router) -> None:
    scores = router(input_ids=IDS, use_cache=False).scores
    hidden = router.member.model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states[-1]
    assert torch.equal(scores, (hidden @ router.route_head.weight.T))


def test_logits_are_the_models_own(router: Router) -> None:
    # Gemma-2 soft-caps them; lm_head by hand would not.
    own = router.member.model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(router(input_ids=IDS, use_cache=False).logits, own)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 2])])
def test_scores_and_logits_cover_the_kept_positions(router: Router, keep: int | torch.Tensor) -> None:
    whole = router(input_ids=IDS, use_cache=False)
    kept = router(input_ids=IDS, use_cache=False, logits_to_keep=keep)
    index = slice(-keep, None) if isinstance(keep, int) else keep
    assert torch.allclose(kept.scores, whole.scores[:, index], atol=1e-6)
    assert torch.allclose(kept.logits, whole.logits[:, index], atol=1e-5)


def test_nothing_stays_hooked_to_the_lm_head(router: Router) -> None:
    router(input_ids=IDS, use_cache=False)
    with pytest.raises(IndexError):
        router(input_ids=torch.tensor([[99999]]), use_cache=False)
    assert not router.member.model.get_output_embeddings()._forward_pre_hooks


def test_gradients_reach_the_head(router: Router) -> None:
    router(input_ids=IDS, use_cache=False).scores.sum().backward()
    assert router.route_head.weight.grad is not None
    assert router.route_head.weight.grad.abs().sum() > 0


def test_head_width_is_what_the_lm_head_reads(member: Member) -> None:
    assert head_width(member.model) == member.config.hidden_size == 32


# ---- a router that is an adapter


@pytest.fixture
def adapted(tmp_path: Path) -> Member:
    base = tiny.make_model(tmp_path / "base", width=16)
    tiny.make_adapter(tmp_path / "adapter", base, seed=1)
    tiny.make_adapter(tmp_path / "other", base, seed=2)
    model = load_model(tmp_path / "base", LoadOptions())
    peft = attach_adapter(model, None, tmp_path / "adapter", "router")
    attach_adapter(model, peft, tmp_path / "other", "math")
    return Member("router", model, peft, "router", tmp_path / "base", tmp_path / "adapter")


def written(member: Member, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    assert member.adapter_folder is not None
    (folder / "adapter_model.safetensors").write_bytes(
        (member.adapter_folder / "adapter_model.safetensors").read_bytes()
    )
    save_router_adapter(member, folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_router_adapter_is_written_from_memory(adapted: Member, tmp_path: Path) -> None:
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if name.endswith("lora_B.router.weight"):
                parameter.fill_(0.25)
    tensors = written(adapted, tmp_path / "out")
    assert {float(t.unique()) for name, t in tensors.items() if "lora_B" in name} == {0.25}


def test_router_adapter_alone_is_written_under_its_file_names(adapted: Member, tmp_path: Path) -> None:
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        before = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    after = written(adapted, tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_router_adapter_keeps_its_files_dtype(adapted: Member, tmp_path: Path) -> None:
    adapted.model.bfloat16()
    assert {t.dtype for t in written(adapted, tmp_path / "out").values()} == {torch.float32}
