"""Stacked products against PEFT's own forward, adapter by adapter."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from fusionroute.decoding.products import Lanes, Product, UnsupportedError

IN = 6
OUT = {"q": 8, "k": 3, "v": 5}


class Maps(torch.nn.Module):
    """Linear layers that read the same input."""

    def __init__(self, biased: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name, out in OUT.items():
            self.add_module(name, torch.nn.Linear(IN, out, bias=name in biased))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in OUT], dim=-1)


def config(ranks: dict[str, int], **settings: Any) -> LoraConfig:
    return LoraConfig(r=1, lora_alpha=3, target_modules=list(ranks), rank_pattern=ranks, **settings)


def adapted(configs: dict[str, LoraConfig], biased: tuple[str, ...] = (), seed: int = 0) -> Any:
    """A PEFT model of `Maps` with these adapters, all factors random."""
    torch.manual_seed(seed)
    maps = Maps(biased).eval()
    if not configs:
        return maps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (first, *others) = configs
        model = get_peft_model(maps, configs[first], adapter_name=first)
        for name in others:
            model.add_adapter(name, configs[name])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)


def modules(model: Any) -> list[Any]:
    maps = model if isinstance(model, Maps) else model.base_model.model
    return [maps.get_submodule(name) for name in OUT]


def alone(model: Any, lane: str | None, x: torch.Tensor) -> torch.Tensor:
    """PEFT's own forward with one adapter on, or none."""
    if lane is not None:
        model.set_adapter(lane)
        return model(x)
    if isinstance(model, Maps):
        return model(x)
    with model.disable_adapter():
        return model(x)


def token_by_token(model: Any, lanes: list[str | None], chosen: list[int], x: torch.Tensor) -> torch.Tensor:
    return torch.stack([alone(model, lanes[lane], token) for lane, token in zip(chosen, x, strict=True)])


ADAPTERS = {
    "all": {"q": 3, "k": 1, "v": 2},
    "one": {"k": 4},
    "two": {"q": 1, "v": 5},
}


def several(biased: tuple[str, ...] = ()) -> Any:
    return adapted({name: config(ranks) for name, ranks in ADAPTERS.items()}, biased)


adapters = st.dictionaries(st.sampled_from(list(OUT)), st.integers(1, 5), min_size=1)


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(adapters, min_size=1, max_size=3),
    biased=st.sets(st.sampled_from(list(OUT))),
    bare=st.booleans(),
    blocks=st.booleans(),
    chosen=st.lists(st.integers(0, 9), min_size=1, max_size=9),
)
def test_each_token_gets_what_peft_gives_its_lane(
    ranks: list[dict[str, int]], biased: set[str], bare: bool, blocks: bool, chosen: list[int]
) -> None:
    configs = {f"a{number}": config(rank) for number, rank in enumerate(ranks)}
    lanes: list[str | None] = [*configs, *([None] if bare else [])]
    chosen = [number % len(lanes) for number in chosen]
    model = adapted(configs, tuple(biased))
    x = torch.randn(len(chosen), IN)
    expected = token_by_token(model, lanes, chosen, x)
    actual = Product(modules(model), lanes, blocks=blocks)(x, Lanes(torch.tensor(chosen)))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_the_same_adapter_may_be_two_lanes() -> None:
    model, lanes = several(), ["one", "all", "one"]
    x = torch.randn(3, IN)
    expected = token_by_token(model, lanes, [0, 1, 2], x)
    torch.testing.assert_close(
        Product(modules(model), lanes)(x, Lanes(torch.arange(3))), expected, atol=1e-4, rtol=1e-4
    )


def test_an_adapter_that_is_no_lane_has_no_part() -> None:
    model, x = several(), torch.randn(2, IN)
    expected = alone(model, "one", x)
    actual = Product(modules(model), ["one"])(x, Lanes(torch.zeros(2, dtype=torch.long)))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("biased", [(), ("q",), ("q", "k", "v")])
def test_without_lanes_it_is_the_base(biased: tuple[str, ...]) -> None:
    model, x = several(biased), torch.randn(4, IN)
    expected = alone(model, None, x)
    torch.testing.assert_close(Product(modules(model), list(ADAPTERS))(x, None), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("biased", [(), ("v",), ("q", "k", "v")])
def test_layers_that_nothing_adapts_stand_side_by_side(biased: tuple[str, ...]) -> None:
    model, x = adapted({}, biased), torch.randn(4, IN)
    expected = model(x)
    torch.testing.assert_close(Product(modules(model), [None])(x, None), expected, atol=1e-5, rtol=1e-5)


def test_lanes_that_adapt_other_layers_leave_these_as_they_are() -> None:
    model, x = adapted({"one": config({"k": 4})}), torch.randn(4, IN)
    expected = alone(model, None, x)[:, : OUT["q"]]
    actual = Product(modules(model)[:1], ["one", None])(x, Lanes(torch.tensor([0, 1, 0, 1])))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_rank_stabilised_scaling_is_kept() -> None:
    model, x = adapted({"a": config(ADAPTERS["all"], use_rslora=True)}), torch.randn(2, IN)
    expected = alone(model, "a", x)
    actual = Product(modules(model), ["a"])(x, Lanes(torch.zeros(2, dtype=torch.long)))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_in_float32_on_a_base_in_bfloat16_keeps_the_base_s_dtype() -> None:
    model = several()
    for module in modules(model):
        module.base_layer.to(torch.bfloat16)
    actual = Product(modules(model), list(ADAPTERS))(torch.randn(2, IN).bfloat16(), Lanes(torch.tensor([0, 2])))
    assert actual.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("biased", [(), ("q", "k")])
def test_merged_is_what_peft_gives_unmerged(name: str, biased: tuple[str, ...]) -> None:
    model, x = several(biased), torch.randn(4, IN)
    expected = alone(model, name, x)
    merged = Product(modules(model), [name], merge=True)
    torch.testing.assert_close(merged(x, Lanes(torch.zeros(4, dtype=torch.long))), expected, atol=1e-4, rtol=1e-4)


def test_merged_needs_no_lanes() -> None:
    model, x = several(), torch.randn(4, IN)
    expected = alone(model, "all", x)
    torch.testing.assert_close(Product(modules(model), ["all"], merge=True)(x, None), expected, atol=1e-4, rtol=1e-4)


def test_merging_of_nothing_is_the_base() -> None:
    model, x = several(), torch.randn(4, IN)
    expected = alone(model, None, x)
    torch.testing.assert_close(Product(modules(model), [None], merge=True)(x, None), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lane", ["all", None])
def test_merging_leaves_the_model_as_it_was(lane: str | None) -> None:
    model, x = several(), torch.randn(4, IN)
    before = alone(model, lane, x)
    Product(modules(model), [lane], merge=True).all.weight.fill_(7)
    assert torch.equal(alone(model, lane, x), before)


def test_merging_in_bfloat16_rounds_once() -> None:
    model = several()
    for module in modules(model):
        module.base_layer.to(torch.bfloat16)
    q = modules(model)[0]
    exact = q.base_layer.weight.double() + q.get_delta_weight("all").double()
    merged = Product([q], ["all"], merge=True).all.weight
    # Half a unit of the last of bfloat16's 8 bits.
    torch.testing.assert_close(merged.double(), exact, atol=1e-6, rtol=2**-8)


# ------------------------------------------------------------------------------------------------------- sharing


def test_the_base_is_in_memory_once() -> None:
    model = several()
    product = Product(modules(model), list(ADAPTERS))
    first, end = product.all.weight.data_ptr(), product.all.weight.data_ptr() + product.all.weight.nbytes
    for module in modules(model):
        assert first <= module.base_layer.weight.data_ptr()
        assert module.base_layer.weight.data_ptr() + module.base_layer.weight.nbytes <= end


def test_the_layers_share_no_row() -> None:
    model = several()
    Product(modules(model), list(ADAPTERS))
    spans = sorted((m.base_layer.weight.data_ptr(), m.base_layer.weight.nbytes) for m in modules(model))
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("lane", [*ADAPTERS, None])
def test_the_model_goes_on_as_before(lane: str | None) -> None:
    model, x = several(("q", "v")), torch.randn(4, IN)
    before = alone(model, lane, x)
    Product(modules(model), list(ADAPTERS))
    assert torch.equal(alone(model, lane, x), before)


def test_the_input_is_left_as_it_was() -> None:
    model, x = several(), torch.randn(4, IN)
    before = x.clone()
    Product(modules(model), list(ADAPTERS))(x, Lanes(torch.tensor([0, 1, 2, 0])))
    assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------------------ refusals


def test_dora_is_refused() -> None:
    model = adapted({"d": config({"q": 2}, use_dora=True)})
    with pytest.raises(UnsupportedError, match="adapter d"):
        Product(modules(model), ["d"])


def test_dora_is_refused_when_merged() -> None:
    model = adapted({"d": config({"q": 2}, use_dora=True)})
    with pytest.raises(UnsupportedError, match="adapter d"):
        Product(modules(model), ["d"], merge=True)


def test_dora_that_is_no_lane_is_no_matter() -> None:
    model = adapted({"a": config({"q": 2}), "d": config({"q": 2}, use_dora=True)})
    x = torch.randn(2, IN)
    expected = alone(model, "a", x)
    actual = Product(modules(model), ["a"])(x, Lanes(torch.zeros(2, dtype=torch.long)))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_lora_with_a_bias_is_refused() -> None:
    model = adapted({"b": config({"q": 2}, lora_bias=True)}, ("q",))
    with pytest.raises(UnsupportedError, match="adapter b"):
        Product(modules(model), ["b"])


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model, x = adapted({"d": config({"v": 2}, use_dora=True)}), torch.randn(2, IN)
    before = alone(model, "d", x)
    with pytest.raises(UnsupportedError):
        Product(modules(model), ["d"])
    assert torch.equal(alone(model, "d", x), before)


def test_a_layer_that_is_not_linear_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        Product([Conv1D(5, IN)], [None])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_such_layer_among_linear_ones_is_refused(place: int) -> None:
    layers: list[Any] = [torch.nn.Linear(IN, IN) for _ in range(3)]
    layers[place] = Conv1D(IN, IN)
    with pytest.raises(UnsupportedError):
        Product(layers, [None])


class Quantised(torch.nn.Linear):
    """As those of bitsandbytes and of transformers' FP8: derived from `Linear`, its weight no plain matrix."""

    def __init__(self) -> None:
        super().__init__(IN, 4, bias=False)
        self.weight = torch.nn.Parameter(torch.zeros(4, IN, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ ((self.weight.float() - 128) / 16).T


def test_a_quantised_layer_derived_from_linear_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Quantised"):
        Product([Quantised()], [None])
