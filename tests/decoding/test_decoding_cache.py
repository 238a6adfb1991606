"""The cache: which slots, what is where, how much memory. Compared with plain Python sets and dictionaries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.decoding.cache import KVCache

SHAPES = [(2, 4), (2, 6)]  # layers that differ


def new_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(SHAPES, dtype, torch.device("cpu"))


def filled(slots: int, length: int) -> KVCache:
    """A cache whose `slots` slots are full of what tells slot, position and layer."""
    cache = new_cache()
    cache.reserve(length)
    for _ in range(slots):
        put(cache, cache.acquire(), length)
    return cache


def put(cache: KVCache, slot: int, length: int) -> None:
    where = cache.places([slot] * length, range(length))
    for layer, shape in enumerate(SHAPES):
        keys = mark(slot, length, layer, shape)
        cache.write(layer, where, keys, -keys)


def mark(slot: int, length: int, layer: int, shape: tuple[int, int]) -> torch.Tensor:
    """`[length, kv_heads, head_dim]`, all entries different."""
    start = 1 + 10_000 * slot + 100_000 * layer
    return torch.arange(start, start + length * shape[0] * shape[1]).float().view(length, *shape)


def assert_holds(cache: KVCache, slot: int, length: int) -> None:
    for layer, shape in enumerate(SHAPES):
        keys, values = cache.read(layer, slice(slot, slot + 1), length)
        assert torch.equal(keys[0].transpose(0, 1), mark(slot, length, layer, shape))
        assert torch.equal(values, -keys)


def sizes(cache: KVCache) -> int:
    """Bytes that the tensors really take, storage included."""
    return sum(tensor.untyped_storage().nbytes() for tensor in [*cache.keys, *cache.values])


@given(st.lists(st.integers(0, 9), max_size=40))
def test_a_slot_is_always_the_lowest_that_nobody_has(moves: list[int]) -> None:
    cache, taken = new_cache(), []
    for move in moves:
        if move < 6 or not taken:
            expected = min(set(range(len(taken) + 1)) - set(taken))
            assert cache.acquire() == expected
            taken.append(expected)
        else:
            cache.release(taken.pop(move % len(taken)))


@given(st.lists(st.booleans(), max_size=40))
def test_every_slot_that_is_given_is_there(moves: list[bool]) -> None:
    cache, taken = new_cache(), []
    for take in moves:
        if take or not taken:
            taken.append(cache.acquire())
        else:
            cache.release(taken.pop())
        assert max(taken, default=-1) < cache.slots


@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_copy_has_the_first_tokens_of_the_other(length: int) -> None:
    cache = filled(3, 4)
    cache.copy(0, 2, length)
    for layer, shape in enumerate(SHAPES):
        keys, values = cache.read(layer, slice(2, 3), 4)
        expected = torch.cat([mark(0, 4, layer, shape)[:length], mark(2, 4, layer, shape)[length:]])
        assert torch.equal(keys[0].transpose(0, 1), expected)
        assert torch.equal(values, -keys)
    assert_holds(cache, 0, 4)
    assert_holds(cache, 1, 4)


@pytest.mark.parametrize("length", [4, 5, 17])
def test_a_longer_length_keeps_contents(length: int) -> None:
    cache = filled(3, 4)
    cache.reserve(length)
    for slot in range(3):
        assert_holds(cache, slot, 4)


def test_more_slots_keep_contents() -> None:
    cache = filled(3, 4)
    for _ in range(9):
        cache.acquire()
    for slot in range(3):
        assert_holds(cache, slot, 4)


def test_the_release_of_one_keeps_the_others() -> None:
    cache = filled(3, 4)
    cache.release(1)
    assert_holds(cache, 0, 4)
    assert_holds(cache, 2, 4)


@given(st.lists(st.tuples(st.sampled_from(["length", "slot", "release"]), st.integers(1, 9)), max_size=20))
def test_contents_outlive_any_growth_and_any_neighbour(moves: list[tuple[str, int]]) -> None:
    cache = filled(2, 3)
    others = []
    for move, number in moves:
        if move == "length":
            cache.reserve(number)
        elif move == "slot":
            others.append(cache.acquire())
            put(cache, others[-1], cache.capacity)
        elif others:
            cache.release(others.pop(number % len(others)))
    assert_holds(cache, 0, 3)
    assert_holds(cache, 1, 3)


def test_a_shorter_length_takes_nothing_away() -> None:
    cache = filled(1, 8)
    cache.reserve(3)
    assert_holds(cache, 0, 8)


def test_room_is_made_for_the_length_asked_for() -> None:
    cache = filled(2, 3)
    cache.reserve(11)
    assert cache.capacity >= 11


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_unwritten_room_is_zero_however_it_came(lengths: list[int]) -> None:
    # A masked entry is multiplied by a weight of 0, and 0 times what was in memory before may be no number.
    cache = new_cache()
    for length in lengths:
        cache.acquire()
        cache.reserve(length)
    assert not any(tensor.any() for tensor in [*cache.keys, *cache.values])


def test_the_release_of_all_frees_the_memory() -> None:
    cache = filled(3, 4)
    for slot in (1, 0, 2):
        cache.release(slot)
    assert sizes(cache) == 0


def test_an_emptied_cache_begins_anew() -> None:
    cache = filled(3, 4)
    for slot in (2, 1, 0):
        cache.release(slot)
    cache.reserve(2)
    assert [cache.acquire() for _ in range(3)] == [0, 1, 2]


def test_an_emptied_cache_holds_what_is_written_then() -> None:
    cache = filled(2, 4)
    cache.release(0)
    cache.release(1)
    slot = cache.acquire()
    cache.reserve(6)
    put(cache, slot, 6)
    assert_holds(cache, slot, 6)


@given(st.data())
def test_what_is_read_is_what_was_last_written_there(data: st.DataObject) -> None:
    cache = new_cache()
    cache.reserve(5)
    for _ in range(4):
        cache.acquire()
    expected = torch.zeros(cache.slots, cache.capacity, 2, 4)
    for number in range(data.draw(st.integers(1, 5))):
        places = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, unique=True))
        new = torch.randn(len(places), 2, 4, generator=torch.Generator().manual_seed(number))
        cache.write(0, cache.places(*zip(*places, strict=True)), new, new + 1)
        for (slot, position), entry in zip(places, new, strict=True):
            expected[slot, position] = entry
    first, end = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 5))
    keys, _ = cache.read(0, slice(first, 4), end)
    assert torch.equal(keys, expected[first:4, :end].transpose(1, 2))


def test_keys_and_values_are_apart() -> None:
    cache = filled(1, 2)
    cache.write(0, cache.places([0], [1]), torch.full((1, 2, 4), 7.0), torch.full((1, 2, 4), 8.0))
    keys, values = cache.read(0, slice(0, 1), 2)
    assert (keys[0, :, 1].unique().tolist(), values[0, :, 1].unique().tolist()) == ([7.0], [8.0])


def test_a_write_to_one_layer_leaves_the_others() -> None:
    cache = filled(2, 3)
    cache.write(0, cache.places([0, 1], [0, 1]), torch.zeros(2, 2, 4), torch.zeros(2, 2, 4))
    keys, _ = cache.read(1, slice(0, 1), 3)
    assert torch.equal(keys[0].transpose(0, 1), mark(0, 3, 1, SHAPES[1]))


def test_reading_copies_nothing() -> None:
    cache = filled(4, 3)
    keys, values = cache.read(0, slice(1, 3), 2)
    assert keys.untyped_storage().data_ptr() == cache.keys[0].untyped_storage().data_ptr()
    assert values.untyped_storage().data_ptr() == cache.values[0].untyped_storage().data_ptr()


def test_reading_gives_heads_before_positions() -> None:
    keys, values = filled(4, 3).read(1, slice(1, 4), 2)
    assert keys.shape == values.shape == (3, 2, 2, 6)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_of_a_token_are_those_of_keys_and_values_of_all_layers(dtype: torch.dtype, size: int) -> None:
    assert new_cache(dtype).bytes_per_token == 2 * size * (2 * 4 + 2 * 6)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=12))
def test_bytes_are_what_the_tensors_take(moves: list[tuple[bool, int]]) -> None:
    cache = new_cache(torch.bfloat16)
    for slot, length in moves:
        if slot:
            cache.acquire()
        else:
            cache.reserve(length)
    assert cache.nbytes == sizes(cache)


def test_an_empty_cache_takes_nothing() -> None:
    assert new_cache().nbytes == 0


def test_growth_keeps_the_dtype() -> None:
    cache = new_cache(torch.bfloat16)
    cache.acquire()
    cache.reserve(3)
    assert {tensor.dtype for tensor in [*cache.keys, *cache.values]} == {torch.bfloat16}
