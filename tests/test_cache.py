"""The cache of several members, driven as transformers' `generate` drives it."""

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from fusionroute.cache import FusionCache
from fusionroute.errors import UsageError

NAMES = ["router", "math", "code"]


@pytest.fixture
def cache() -> FusionCache:
    """Empty, for three members of 2, 3 and 2 layers."""
    common = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    configs = {name: LlamaConfig(num_hidden_layers=2 + (name == "math"), **common) for name in NAMES}
    return FusionCache(configs)


def feed(cache: FusionCache, names: Sequence[str], first: int, count: int, rows: int = 2) -> None:
    """Put tokens `first …` into the caches of `names`; a key's value tells its row, layer and position."""
    for member in names:
        for number in range(len(cache.members[member].layers)):
            keys = torch.arange(first, first + count).float().view(1, 1, count, 1).repeat(rows, 1, 1, 4)
            keys += 100 * torch.arange(rows).float().view(rows, 1, 1, 1) + 1000 * number
            cache.members[member].update(keys, keys.clone(), number)
    cache.advance(names, count)


def rows_of(cache: FusionCache) -> list[int]:
    """Which row each row of the first member that holds something was."""
    layer = next(layer for layer in cache.layers if layer.get_seq_length())
    return (layer.keys[:, 0, 0, 0] // 100).int().tolist()


def test_layers_are_the_members_layers_router_first(cache: FusionCache) -> None:
    assert [len(member.layers) for member in cache.members.values()] == [2, 3, 2]
    assert cache.layers == [layer for name in NAMES for layer in cache.members[name].layers]


def test_new_cache_is_empty(cache: FusionCache) -> None:
    assert (cache.get_seq_length(), cache.routes, cache.query_routes) == (0, None, None)


def test_length_is_the_tokens_seen(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 5)
    feed(cache, NAMES, 5, 1)
    assert cache.get_seq_length() == 6


def test_length_without_the_router_is_the_experts(cache: FusionCache) -> None:
    feed(cache, ["code"], 0, 5)
    assert cache.get_seq_length() == 5


def test_require_gives_the_members_asked_for(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 5)
    assert cache.require(["router", "code"]) == {name: cache.members[name] for name in ("router", "code")}


def test_require_refuses_a_member_left_behind(cache: FusionCache, refuses: Callable) -> None:
    feed(cache, NAMES, 0, 5)
    feed(cache, ["router", "math"], 5, 2)
    with refuses(UsageError, "code", "7", "5"):
        cache.require(NAMES)


def test_record_appends_columns(cache: FusionCache) -> None:
    cache.record(torch.tensor([[0, 1], [1, 1]]), torch.arange(2))
    cache.record(torch.tensor([[2], [0]]), torch.tensor([2]))
    assert cache.routes is not None
    assert cache.routes.tolist() == [[0, 1, 2], [1, 1, 0]]


def test_reset_forgets_everything(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 5)
    cache.record(torch.zeros(2, 5), torch.arange(5))
    cache.query_routes = torch.zeros(2)
    cache.reset()
    assert (cache.get_seq_length(), cache.routes, cache.query_routes) == (0, None, None)


# ---- crop


def test_crop_shortens_every_member(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 8)
    cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [5] * 7


def test_crop_keeps_the_first_tokens(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 8)
    cache.crop(-3)
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]


def test_crop_forgets_the_routes_of_the_removed_tokens(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 4)
    cache.record(torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]]), torch.arange(4))
    cache.crop(-1)
    assert cache.routes is not None
    assert cache.routes.tolist() == [[0, 1, 2], [2, 2, 1]]


def test_crop_of_nothing_changes_nothing(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 4)
    cache.record(torch.zeros(2, 4), torch.arange(4))
    cache.crop(0)
    assert cache.get_seq_length() == 4
    assert cache.routes is not None
    assert cache.routes.shape == (2, 4)


def test_crop_of_more_than_there_is_leaves_nothing(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 4)
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    assert set(cache.lengths.values()) == {0}


def test_crop_of_more_than_the_recorded_routes_leaves_none(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 6)
    cache.record(torch.zeros(2, 1), torch.tensor([5]))  # a prefill keeps one
    cache.crop(-4)
    assert cache.routes is None or cache.routes.shape[1] == 0


def test_crop_leaves_members_that_never_ran_empty(cache: FusionCache) -> None:
    feed(cache, ["router", "math"], 0, 6)
    cache.crop(-2)
    assert [cache.members[name].get_seq_length() for name in NAMES] == [4, 4, 0]


def test_crop_below_a_member_left_behind_shortens_it_too(cache: FusionCache) -> None:
    feed(cache, NAMES, 0, 6)
    feed(cache, ["math"], 6, 2)
    cache.crop(-5)
    # No member may hold more than the 3 tokens that are left.
    assert [cache.members[name].get_seq_length() for name in NAMES] == [3, 3, 3]


def test_crop_of_a_sliding_window_goes_back_exactly() -> None:
    config = Gemma2Config(num_hidden_layers=2, sliding_window=4, hidden_size=8, num_attention_heads=2, head_dim=4)
    cache = FusionCache({"router": config, "math": config})
    cache.activate_past_recording()
    feed(cache, ["router", "math"], 0, 10, rows=1)
    cache.crop(-3)
    sliding = next(layer for layer in cache.layers if layer.is_sliding)
    assert cache.get_seq_length() == 7
    assert sliding.keys[0, 0, :, 0].tolist()[-3:] == [4, 5, 6]


# ---- rows


@pytest.fixture
def full(cache: FusionCache) -> FusionCache:
    """With 4 tokens in 2 rows; the code expert never ran."""
    feed(cache, ["router", "math"], 0, 4)
    cache.record(torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), torch.arange(4))
    cache.query_routes = torch.tensor([0, 1])
    return cache


def test_repeat_reaches_every_member(full: FusionCache) -> None:
    full.batch_repeat_interleave(2)
    assert [layer.keys.shape[0] for layer in full.layers if layer.get_seq_length()] == [4] * 5
    assert rows_of(full) == [0, 0, 1, 1]


def test_repeat_reaches_the_routes(full: FusionCache) -> None:
    full.batch_repeat_interleave(2)
    assert full.routes is not None
    assert full.query_routes is not None
    assert full.routes[:, 0].tolist() == full.query_routes.tolist() == [0, 0, 1, 1]


def test_select_reaches_members_and_routes(full: FusionCache) -> None:
    full.batch_select_indices(torch.tensor([1, 1, 0]))
    assert full.routes is not None
    assert full.query_routes is not None
    assert rows_of(full) == full.routes[:, 0].tolist() == full.query_routes.tolist() == [1, 1, 0]


def test_reorder_reaches_members_and_the_decision_per_prompt(full: FusionCache) -> None:
    full.reorder_cache(torch.tensor([1, 0]))
    assert full.query_routes is not None
    assert rows_of(full) == full.query_routes.tolist() == [1, 0]


def test_reorder_leaves_recorded_routes_in_the_order_of_their_step(full: FusionCache) -> None:
    full.reorder_cache(torch.tensor([1, 1]))
    assert full.routes is not None
    assert full.routes[:, 0].tolist() == [0, 1]
