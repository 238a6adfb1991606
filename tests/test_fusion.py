"""Eq. 1 and the trace on tensors small enough to work out by hand."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.fusion import TokenTrace, choices, fuse, product, route, select, shares, switch_rate


@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.5]), min_size=1, max_size=40))
def test_route_is_the_first_maximum(scores: list[float]) -> None:
    assert route(torch.tensor(scores)).item() == scores.index(max(scores))


def test_route_of_equal_scores_is_the_lowest_index_at_every_position() -> None:
    assert route(torch.zeros(3, 5, 100)).eq(0).all()


def test_route_keeps_the_leading_axes() -> None:
    scores = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]]])
    assert route(scores).tolist() == [[1, 0, 0]]


def test_route_of_bfloat16_ties_is_the_lowest_index() -> None:
    # 1.0 and 1.001 are one number in bfloat16.
    assert route(torch.tensor([0.5, 1.0, 1.001], dtype=torch.bfloat16)).item() == 1


def test_fuse_adds_alpha_times_the_router() -> None:
    fused = fuse(torch.tensor([1.0, -2.0]), torch.tensor([10.0, 20.0]), 0.5)
    assert fused.tolist() == [10.5, 19.0]


def test_fuse_adds_in_float32() -> None:
    router, expert = torch.tensor([0.00390625]).bfloat16(), torch.tensor([1.0]).bfloat16()
    fused = fuse(router, expert)
    assert fused.dtype == torch.float32
    assert fused.item() == 1.00390625  # in bfloat16 it would be 1


def test_fuse_without_complement_does_not_look_at_the_router() -> None:
    # 0 × inf would be NaN.
    assert fuse(torch.tensor([-torch.inf, 0.0]), torch.tensor([1.0, 2.0]), 0).tolist() == [1.0, 2.0]


def test_fuse_takes_a_weight_per_position() -> None:
    router = torch.tensor([[1.0, -2.0], [-torch.inf, 0.0], [4.0, 0.0]])
    expert = torch.tensor([[10.0, 20.0], [1.0, 2.0], [3.0, 5.0]])
    alpha = torch.tensor([[0.5], [0.0], [1.0]])
    assert fuse(router, expert, alpha).tolist() == [[10.5, 19.0], [1.0, 2.0], [7.0, 5.0]]


@given(st.floats(0, 3), st.integers(0, 1000))
def test_fusing_logits_or_log_probabilities_gives_one_distribution(alpha: float, seed: int) -> None:
    router, expert = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed)) * 5
    of_logits = fuse(router, expert, alpha).softmax(-1)
    of_logprobs = fuse(router.log_softmax(-1), expert.log_softmax(-1), alpha).softmax(-1)
    assert torch.allclose(of_logits, of_logprobs, atol=1e-5)


def test_select_takes_each_position_from_its_expert() -> None:
    experts = [torch.full((2, 3, 4), float(i)) for i in range(3)]
    routes = torch.tensor([[0, 2, 1], [1, 1, 2]])
    assert select(experts, routes)[..., 3].tolist() == [[0.0, 2.0, 1.0], [1.0, 1.0, 2.0]]


def test_product_is_the_geometric_mean_of_the_distributions() -> None:
    experts = list(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    by_hand = torch.stack([e.softmax(-1) for e in experts]).prod(0) ** (1 / 3)
    assert torch.allclose(product(experts).softmax(-1), by_hand / by_hand.sum(), atol=1e-6)


def test_product_is_float32_of_bfloat16_members() -> None:
    assert product([torch.ones(2).bfloat16()] * 2).dtype == torch.float32


def trace(expert: str, token: int = 0) -> TokenTrace:
    return TokenTrace(token, "", expert, {}, 0, 0, 0, False, 0.0)


FUSED, EXPERT, ROUTER = (torch.tensor(rows) for rows in ([[3.0, 5.0, 2.0]], [[3.0, 0.0, 1.0]], [[0.0, 5.0, 1.0]]))


def test_each_ones_choice() -> None:
    (chosen,) = choices(FUSED, EXPERT, ROUTER, torch.tensor([2]))
    names = ("expert_choice", "router_choice", "fused_choice", "overruled")
    assert tuple(chosen[name] for name in names) == (0, 1, 1, True)


def test_gap_is_of_log_probabilities_of_the_emitted_token() -> None:
    (chosen,) = choices(FUSED, EXPERT, ROUTER, torch.tensor([2]))
    gap = float(FUSED.log_softmax(-1)[0, 2] - EXPERT.log_softmax(-1)[0, 2])
    assert chosen["gap"] == pytest.approx(gap, abs=1e-5)


def test_trace_is_json() -> None:
    traced = trace("math")
    assert json.loads(json.dumps(traced.to_dict())) == traced.to_dict()


def test_shares_count_tokens_and_name_experts_that_wrote_none() -> None:
    written = [trace("a"), trace("a"), trace("b"), trace("a")]
    assert shares(written, ["a", "b", "c"]) == {"a": 0.75, "b": 0.25, "c": 0.0}


def test_shares_of_nothing() -> None:
    assert shares([], ["a"]) == {"a": 0.0}


@pytest.mark.parametrize(
    ("experts", "rate"), [("", 0.0), ("a", 0.0), ("aaaa", 0.0), ("abab", 1.0), ("aabb", 1 / 3), ("aab", 0.5)]
)
def test_switch_rate_is_changes_over_tokens_less_one(experts: str, rate: float) -> None:
    assert switch_rate([trace(e) for e in experts]) == rate
