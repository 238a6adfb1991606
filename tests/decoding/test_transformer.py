"""The packed pass against the decoders of transformers and PEFT, one row at a time, without a cache."""

import copy
import functools
import random
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from fusionroute.decoding import transformer as packed
from fusionroute.decoding.cache import KVCache
from fusionroute.decoding.products import UnsupportedError
from fusionroute.decoding.transformer import Shape, Span, Transformer

VOCAB = 90
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 6}
# What the configuration says besides COMMON.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_one_head": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 6},
    "llama_all_heads": {"model_type": "llama", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama_yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "mistral_whole": {"model_type": "mistral", "sliding_window": None, "head_dim": 10},
    "gemma2": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 2.0},
    "gemma2_no_cap": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": None},
}
LANES: tuple[str | None, ...] = (None, "whole", "some")
SETTINGS = settings(deadline=None, max_examples=8)


def bare(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, biases and norms included."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(**COMMON | KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def adapted(kind: str, **extra: Any) -> Any:
    """The same with two adapters on it: one of everything, one of some layers."""
    model = get_peft_model(bare(kind), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"), "whole")
    some = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], **extra}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("some", LoraConfig(**some, layers_to_transform=[0, 2]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


@functools.cache
def world(kind: str) -> tuple[Transformer, Any]:
    """The packed pass, and a model of its own to compare with."""
    model = adapted(kind)
    reference = copy.deepcopy(model)
    return Transformer(model.base_model.model, LANES), reference


def alone(reference: Any, lane: str | None, ids: list[int]) -> torch.Tensor:
    """What the LM head reads at each of `ids`, `[T, d]`, by transformers and PEFT."""
    inner, given = reference.base_model.model.get_decoder(), torch.tensor([ids])
    if lane is None:
        with reference.disable_adapter():
            return inner(input_ids=given, use_cache=False).last_hidden_state[0]
    reference.set_adapter(lane)
    return inner(input_ids=given, use_cache=False).last_hidden_state[0]


def tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(VOCAB) for _ in range(count)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def new_cache(transformer: Transformer, slots: int, length: int) -> KVCache:
    cache = transformer.new_cache()
    cache.reserve(length)
    for _ in range(slots):
        cache.acquire()
    return cache


class Rows:
    """Rows that are written in any chunks and order, some taken back, some replaced by others in their slot."""

    def __init__(self, kind: str, seed: int) -> None:
        self.chance = random.Random(seed)
        self.transformer, self.reference = world(kind)
        self.cache = self.transformer.new_cache()
        slots = [self.cache.acquire() for _ in range(7)]
        for slot in self.chance.sample(slots, 3):
            self.cache.release(slot)
            slots.remove(slot)
        self.rows: dict[int, tuple[int, list[int]]] = {slot: (self.chance.randrange(3), []) for slot in slots}

    def step(self) -> None:
        chance, spans, keep, whole = self.chance, [], [], []
        for slot in chance.sample(list(self.rows), chance.randint(1, len(self.rows))):
            lane, ids = self.rows[slot]
            if chance.random() < 0.1:
                lane, ids = chance.randrange(3), []  # another row in this slot
            start = max(len(ids) - chance.choice([0, 0, 0, 1, 3]), 0)
            count = chance.choice([1, 1, 3, chance.randint(1, 9)])
            ids = ids[:start] + tokens(chance, count)
            self.rows[slot] = (lane, ids)
            spans.append(Span(slot, lane, start, ids[start:]))
            keep.append(chance.randint(1 if not spans[1:] else 0, count))
            whole.append((lane, ids))
        self.cache.reserve(max(len(ids) for _, ids in whole))
        parts = self.transformer(spans, keep, self.cache).split(keep)
        for part, count, (lane, ids) in zip(parts, keep, whole, strict=True):
            if count:
                assert_close(part, alone(self.reference, LANES[lane], ids)[-count:])


@pytest.mark.parametrize("kind", KINDS)
@SETTINGS
@given(seed=st.integers(0, 10**6), most=st.sampled_from([1, 7, 10**6]))
def test_rows_in_any_chunks_order_lanes_and_slots(kind: str, seed: int, most: int) -> None:
    rows = Rows(kind, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "MOST_TOKENS", most)
        for _ in range(6):
            rows.step()


@pytest.mark.parametrize("kind", KINDS)
def test_one_long_row_at_once(kind: str) -> None:
    transformer, reference = world(kind)
    ids = tokens(random.Random(3), 40)
    actual = transformer([Span(0, 1, 0, ids)], [40], new_cache(transformer, 1, 40))
    assert_close(actual, alone(reference, "whole", ids))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen2_window"])
def test_one_row_token_by_token(kind: str) -> None:
    transformer, reference = world(kind)
    ids, cache = tokens(random.Random(4), 16), new_cache(transformer, 1, 16)
    parts = [transformer([Span(0, 0, at, ids[at : at + 1])], [1], cache) for at in range(16)]
    assert_close(torch.cat(parts), alone(reference, None, ids))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("count", [1, 4])
def test_neighbours_with_as_many_new_tokens_and_other_lengths(kind: str, count: int) -> None:
    transformer, reference = world(kind)
    rows = [tokens(random.Random(length), length + count) for length in (9, 2, 14, 5)]
    cache = new_cache(transformer, 4, 20)
    for slot, row in enumerate(rows):
        transformer([Span(slot, slot % 3, 0, row[:-count])], [1], cache)
    spans = [Span(slot, slot % 3, len(row) - count, row[-count:]) for slot, row in enumerate(rows)]
    actual = transformer(spans, [count] * 4, cache)
    expected = [alone(reference, LANES[slot % 3], row)[-count:] for slot, row in enumerate(rows)]
    assert_close(actual, torch.cat(expected))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_other_tokens_after_a_rewind(kind: str) -> None:
    transformer, reference = world(kind)
    chance, cache = random.Random(5), new_cache(transformer, 1, 20)
    ids = tokens(chance, 12)
    transformer([Span(0, 0, 0, ids)], [1], cache)
    ids = ids[:7] + tokens(chance, 3)
    actual = transformer([Span(0, 0, 7, ids[7:])], [3], cache)
    assert_close(actual, alone(reference, None, ids)[-3:])


def test_what_is_returned_stands_in_the_order_of_the_spans() -> None:
    transformer, reference = world("llama")
    rows = {3: tokens(random.Random(1), 2), 0: tokens(random.Random(2), 5), 2: tokens(random.Random(3), 1)}
    spans = [Span(slot, 0, 0, ids) for slot, ids in rows.items()]
    actual = transformer(spans, [1, 2, 1], new_cache(transformer, 4, 5))
    expected = [alone(reference, None, ids)[-keep:] for ids, keep in zip(rows.values(), (1, 2, 1), strict=True)]
    assert_close(actual, torch.cat(expected))


def test_a_row_is_untouched_by_its_neighbours() -> None:
    transformer, reference = world("gemma2")
    chance, cache = random.Random(6), new_cache(transformer, 3, 12)
    ids = tokens(chance, 9)
    transformer([Span(1, 1, 0, ids[:8])], [1], cache)
    for _ in range(3):
        transformer([Span(0, 0, 0, tokens(chance, 12)), Span(2, 2, 0, tokens(chance, 12))], [1, 1], cache)
    assert_close(transformer([Span(1, 1, 8, ids[8:])], [1], cache), alone(reference, "whole", ids)[-1:])


def test_no_position_need_be_wanted() -> None:
    transformer, _ = world("llama")
    assert transformer([Span(0, 0, 0, [4, 5])], [0], new_cache(transformer, 1, 2)).shape == (0, 32)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_in_bfloat16_it_is_as_exact_as_transformers(kind: str) -> None:
    ids = tokens(random.Random(8), 12)
    exact = bare(kind).get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    model = bare(kind).to(torch.bfloat16)
    theirs = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0].float()
    transformer = Transformer(model)
    ours = transformer([Span(0, 0, 0, ids)], [12], new_cache(transformer, 1, 12)).float()
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


def test_the_cache_is_of_the_model_s_dtype() -> None:
    assert Transformer(bare("gemma2").to(torch.bfloat16)).new_cache().keys[0].dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------- merged, shared, alone


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("lane", LANES)
def test_merged_it_is_the_adapter_unmerged(kind: str, lane: str | None) -> None:
    ids, model = tokens(random.Random(9), 11), adapted(kind)
    expected = alone(model, lane, ids)
    transformer = Transformer(model.base_model.model, [lane], merge=True)
    assert_close(transformer([Span(0, 0, 0, ids)], [11], new_cache(transformer, 1, 11)), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_compiled_it_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, with a backend that needs no compiler for the machine: one graph of each function for all sizes."""
    ids, model, graphs = tokens(random.Random(9), 11), adapted(kind), []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    expected = alone(model, "whole", ids)
    transformer = Transformer(model.base_model.model, ["whole"], compile=True)
    cache = new_cache(transformer, 1, 11)
    parts = [transformer([Span(0, 0, start, ids[start:end])], [end - start], cache) for start, end in ((0, 7), (7, 11))]
    assert_close(torch.cat(parts), expected)
    assert len(graphs) == 2


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_the_model_gives_the_same_logits_after(kind: str, lane: str | None, merge: bool) -> None:
    ids, model = tokens(random.Random(10), 11), adapted(kind)
    before = alone(model, lane, ids)
    transformer = Transformer(model.base_model.model, [lane] if merge else LANES, merge=merge)
    transformer([Span(0, 0, 0, ids)], [1], new_cache(transformer, 1, 11))
    assert torch.equal(alone(model, lane, ids), before)


def test_the_model_can_be_saved_after(tmp_path: Any) -> None:
    model = bare("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Transformer(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert [name for name in before if not torch.equal(before[name], again[name])] == []


def test_base_weights_are_in_memory_once() -> None:
    model = adapted("llama")
    transformer = Transformer(model.base_model.model, LANES)
    held = {p.all.weight.untyped_storage().data_ptr() for layer in transformer.layers for p in layer[:4]}
    linear = [p for name, p in model.named_parameters() if "base_layer.weight" in name]
    assert {p.untyped_storage().data_ptr() for p in linear} == held


def test_a_model_without_adapters_is_one_lane() -> None:
    model, ids = bare("qwen2"), tokens(random.Random(11), 8)
    expected = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    transformer = Transformer(model)
    assert_close(transformer([Span(0, 0, 0, ids)], [8], new_cache(transformer, 1, 8)), expected)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3_text", "mixtral", "phi3"])
def test_other_architectures_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=kind):
        Shape.of(AutoConfig.for_model(kind))


def test_a_model_of_another_architecture_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=20)
    with pytest.raises(UnsupportedError, match="gpt2"):
        Transformer(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotations_that_change_with_the_length_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        Shape.of(AutoConfig.for_model("llama", **COMMON, rope_parameters=rope))


@pytest.mark.parametrize("extra", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1]}], ids=str)
def test_an_adapter_of_the_embedding_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="modules of its own"):
        Transformer(adapted("llama", **extra).base_model.model, LANES)


def test_lora_on_the_embedding_is_refused() -> None:
    model = get_peft_model(bare("llama"), LoraConfig(r=2, target_modules=["embed_tokens"]), "x")
    with pytest.raises(UnsupportedError, match="embedding"):
        Transformer(model.base_model.model, ["x"])


@pytest.mark.parametrize("name", ["norm", "input_layernorm", "mlp", "self_attn"])
def test_an_adapter_with_modules_of_its_own_is_refused(name: str) -> None:
    # PEFT swaps the whole module for the active adapter's copy, whatever the lane.
    extra = {"modules_to_save": [name], "target_modules": ["o_proj"] if name == "mlp" else ["up_proj"]}
    model = get_peft_model(bare("llama"), LoraConfig(r=2, **extra), "x")
    with pytest.raises(UnsupportedError):
        Transformer(model.base_model.model, [None, "x"])
