"""The reference model against an oracle that uses none of its code: `forward` and loading.

`generate` has a file of its own.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from fusionroute.configuration import FusionRouteConfig
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.modeling import FusionRouteForCausalLM

Load = Callable[[str], FusionRouteForCausalLM]

# Of different lengths, the longest twice Gemma-2's window.
ROWS = [
    [5, 9, 250, 17, 33, 4, 4, 90, 12, 200, 31, 77],
    [300, 8, 8, 41, 160],
    [21, 100, 7, 64, 9, 9, 110, 14],
]
POLICIES: list[dict[str, Any]] = [
    {},
    {"alpha": 0.5},
    {"alpha": 0},
    {"alpha": 1.7},
    {"expert": "math"},
    {"expert": "code", "alpha": 0},
    {"routing": "uniform"},
    {"routing": "uniform", "alpha": 0},
    {"routing": "query"},
    {"routing": "query", "alpha": 0},
    {"routing": "query", "expert": "code"},
]
# Every policy on the shape that has a bit of everything, and the usual ones on all shapes.
SHAPES = ["adapters", "bare", "gemma2", "llama", "mixed", "qwen2", "two_bases"]
CASES = [(shape, POLICIES[i]) for i in (0, 8) for shape in SHAPES] + [
    ("mixed", policy) for i, policy in enumerate(POLICIES) if i not in (0, 8)
]


def case_name(value: Any) -> str:
    return named(value) if isinstance(value, dict) else str(value)


def named(policy: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in policy.items()) or "default"


# ---- Eq. 1


@pytest.mark.parametrize("policy", POLICIES, ids=named)
def test_fused_logits_are_eq_1(load: Load, oracle: Callable, shape: str, policy: dict[str, Any]) -> None:
    expected, _ = oracle(shape)(ROWS[0], **policy)
    with torch.no_grad():
        logits = load(shape)(torch.tensor([ROWS[0]]), **policy).logits
    assert logits.dtype == torch.float32
    assert logits.shape == (1, *expected.shape)
    assert torch.allclose(logits[0], expected, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES, ids=named)
def test_routes_are_the_arg_max_of_the_head(load: Load, oracle: Callable, shape: str, policy: dict[str, Any]) -> None:
    _, expected = oracle(shape)(ROWS[0], **policy)
    with torch.no_grad():
        assert load(shape)(torch.tensor([ROWS[0]]), **policy).routes.tolist() == [expected]


def test_the_collections_route_to_more_than_one_expert(oracle: Callable, shape: str) -> None:
    """Else the tests above would see one expert only."""
    assert len(set(oracle(shape)(ROWS[0])[1])) > 1


def test_the_two_terms_and_the_scores_are_told(load: Load, oracle: Callable, shape: str) -> None:
    scores, router, experts = oracle(shape).terms(ROWS[0])
    with torch.no_grad():
        output = load(shape)(torch.tensor([ROWS[0]]))
    chosen = torch.stack([experts[e, t] for t, e in enumerate(output.routes[0])])
    assert torch.allclose(output.scores[0], scores, atol=1e-4)
    assert torch.allclose(output.router_logits[0], router, atol=1e-4)
    assert torch.allclose(output.expert_logits[0], chosen, atol=1e-4)


def test_equal_scores_go_to_the_lowest_index(make_collection: Callable[[str], Path]) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("mixed"))
    # Rows 1 and 2 equal, and above row 0 half of the time.
    model.router.route_head.weight.data[2] = model.router.route_head.weight.data[1]
    with torch.no_grad():
        assert set(model(torch.tensor([ROWS[0]])).routes[0].tolist()) == {0, 1}


def test_zero_head_always_picks_the_first_expert(make_collection: Callable[[str], Path]) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("mixed"))
    model.router.route_head.weight.data.zero_()
    with torch.no_grad():
        assert model(torch.tensor([ROWS[0]])).routes.eq(0).all()


def test_alpha_of_the_configuration_is_the_default(make_collection: Callable[[str], Path], oracle: Callable) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("qwen2"), alpha=0.25)
    with torch.no_grad():
        logits = model(torch.tensor([ROWS[0]])).logits
    assert torch.allclose(logits[0], oracle("qwen2")(ROWS[0], alpha=0.25)[0], atol=1e-4)


# ---- padding


@pytest.mark.parametrize("policy", [{}, {"expert": "code"}], ids=named)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_position(
    load: Load, oracle: Callable, padded: Callable, shape: str, side: str, policy: dict[str, Any]
) -> None:
    ids, mask = padded(ROWS, side)
    with torch.no_grad():
        output = load(shape)(ids, attention_mask=mask, **policy)
    for row, real, logits, routes in zip(ROWS, mask.bool(), output.logits, output.routes, strict=True):
        expected, expected_routes = oracle(shape)(row, **policy)
        assert torch.allclose(logits[real], expected, atol=1e-4)
        assert routes[real].tolist() == expected_routes


@pytest.mark.parametrize("side", ["left", "right"])
def test_query_is_decided_at_the_last_real_position_of_each_row(
    load: Load, oracle: Callable, padded: Callable, side: str
) -> None:
    ids, mask = padded(ROWS, side)
    with torch.no_grad():
        output = load("mixed")(ids, attention_mask=mask, routing="query")
    assert output.routes[:, 0].tolist() == [oracle("mixed")(row, routing="query")[1][0] for row in ROWS]


def test_query_is_decided_at_the_end_of_the_prompt(load: Load, oracle: Callable, shape: str) -> None:
    for length in range(1, len(ROWS[0]) + 1):
        expected, routes = oracle(shape)(ROWS[0], routing="query", prompt=length)
        with torch.no_grad():
            output = load(shape)(torch.tensor([ROWS[0]]), routing="query", prompt_length=length)
        assert output.routes.tolist() == [routes]
        assert torch.allclose(output.logits[0], expected, atol=1e-4)


# ---- cache


@pytest.mark.parametrize(("shape", "policy"), CASES, ids=case_name)
def test_cached_steps_equal_one_pass(load: Load, oracle: Callable, shape: str, policy: dict[str, Any]) -> None:
    model, row, prompt = load(shape), ROWS[0], 4
    expected, routes = oracle(shape)(row, prompt=prompt, **policy)
    cache, got = model.new_cache(), []
    with torch.no_grad():
        # A prompt, two tokens at once, then one by one, past Gemma-2's window.
        for start, end in [(0, prompt), (prompt, 6), *((i, i + 1) for i in range(6, len(row)))]:
            got.append(model(torch.tensor([row[start:end]]), past_key_values=cache, **policy).logits[0])
    assert torch.allclose(torch.cat(got), expected, atol=1e-4)
    assert cache.routes is not None
    assert cache.routes.tolist() == [routes]


def test_cached_steps_under_left_padding_equal_each_row_alone(
    load: Load, oracle: Callable, padded: Callable, shape: str
) -> None:
    model = load(shape)
    ids, mask = padded(ROWS, "left")
    cache = model.new_cache()
    with torch.no_grad():
        model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        last = [
            model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
            for i in range(9, ids.shape[1])
        ]
    for number, row in enumerate(ROWS):
        assert torch.allclose(torch.cat(last, 1)[number], oracle(shape)(row)[0][-3:], atol=1e-4)


def test_use_cache_makes_a_cache(load: Load) -> None:
    with torch.no_grad():
        cache = load("llama")(torch.tensor([ROWS[0]]), use_cache=True).past_key_values
    assert cache.get_seq_length() == len(ROWS[0])


@pytest.mark.parametrize(
    ("first", "then", "left_out"),
    [({"expert": "math"}, {}, "code"), ({"expert": "math", "alpha": 0}, {"expert": "math"}, "router")],
)
def test_cache_of_another_policy_is_refused(
    load: Load, first: dict[str, Any], then: dict[str, Any], left_out: str, refuses: Callable
) -> None:
    cache = load("llama").new_cache()
    with torch.no_grad():
        load("llama")(torch.tensor([ROWS[0]]), past_key_values=cache, **first)
        with refuses(UsageError, left_out, len(ROWS[0])):
            load("llama")(torch.tensor([[5]]), past_key_values=cache, **then)


# ---- logits_to_keep, labels


@pytest.mark.parametrize(("shape", "policy"), CASES, ids=case_name)
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 7, 3])], ids=["1", "3", "tensor"])
def test_kept_positions_are_those_of_the_whole(
    load: Load, shape: str, keep: int | torch.Tensor, policy: dict[str, Any]
) -> None:
    ids = torch.tensor([ROWS[0]])
    index = slice(-keep, None) if isinstance(keep, int) else keep
    with torch.no_grad():
        whole, kept = load(shape)(ids, **policy), load(shape)(ids, logits_to_keep=keep, **policy)
    for name in ("logits", "routes", "scores", "router_logits", "expert_logits"):
        expected, got = getattr(whole, name), getattr(kept, name)
        if expected is None:
            assert got is None
        else:
            assert torch.allclose(got, expected[:, index], atol=1e-5), name


def test_loss_is_the_cross_entropy_of_the_next_token(load: Load, oracle: Callable, shape: str) -> None:
    labels = [-100, -100, *ROWS[0][2:9], -100, *ROWS[0][10:]]
    logprobs = oracle(shape)(ROWS[0])[0].log_softmax(-1)
    terms = [-logprobs[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != -100]
    with torch.no_grad():
        loss = load(shape)(torch.tensor([ROWS[0]]), labels=torch.tensor([labels])).loss
    assert loss.item() == pytest.approx((sum(terms) / len(terms)).item(), abs=1e-4)


def test_loss_counts_no_padding(load: Load, oracle: Callable, padded: Callable) -> None:
    ids, mask = padded(ROWS, "right")
    logprobs = [oracle("mixed")(row)[0].log_softmax(-1) for row in ROWS]
    terms = [-p[t - 1, row[t]] for row, p in zip(ROWS, logprobs, strict=True) for t in range(1, len(row))]
    with torch.no_grad():
        loss = load("mixed")(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert loss.item() == pytest.approx((sum(terms) / len(terms)).item(), abs=1e-4)


@pytest.mark.parametrize("items", [40, torch.tensor(40)])
def test_loss_is_divided_by_the_items_that_a_trainer_counted(load: Load, items: int | torch.Tensor) -> None:
    """With gradients accumulated, the Trainer passes the items of all batches and does not divide by the batches."""
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        mean = load("llama")(ids, labels=ids).loss
        loss = load("llama")(ids, labels=ids, num_items_in_batch=items).loss
    assert loss.item() == pytest.approx(mean.item() * (len(ROWS[0]) - 1) / 40, rel=1e-5)


def test_gradients_reach_the_router_and_no_expert(make_collection: Callable[[str], Path]) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("llama"))
    model.requires_grad_(True)
    ids = torch.tensor([ROWS[0]])
    model(ids, labels=ids).loss.backward()
    assert model.router.member.model.get_input_embeddings().weight.grad is not None
    assert [p.grad for expert in model.experts for p in expert.parameters() if p.grad is not None] == []


# ---- refusals of forward


def test_unknown_expert_is_refused_with_the_names(load: Load, refuses: Callable) -> None:
    with refuses(UsageError, "'maths'", "math, code"):
        load("llama")(torch.tensor([ROWS[0]]), expert="maths")


def test_unknown_routing_is_refused(load: Load, refuses: Callable) -> None:
    with refuses(UsageError, "'sequence'", "token", "query", "uniform"):
        load("llama")(torch.tensor([ROWS[0]]), routing="sequence")


def test_embeddings_are_refused(load: Load, refuses: Callable) -> None:
    with refuses(UsageError, "input_ids"):
        load("llama")(inputs_embeds=torch.zeros(1, 3, 32))


def test_embeddings_beside_ids_are_refused(load: Load, refuses: Callable) -> None:
    with refuses(UsageError, "input_ids"):
        load("llama")(torch.tensor([[1]]), inputs_embeds=torch.zeros(1, 1, 32))


def test_cache_of_one_model_is_refused(load: Load, refuses: Callable) -> None:
    with refuses(UsageError, "FusionCache", "DynamicCache"):
        load("llama")(torch.tensor([ROWS[0]]), past_key_values=DynamicCache())


@pytest.mark.parametrize("shape", ["llama", "qwen2"], ids=["bare vocabulary", "padded vocabulary"])
def test_id_outside_the_common_vocabulary_is_refused(load: Load, shape: str, refuses: Callable) -> None:
    vocab = load(shape).config.vocab_size
    with refuses(UsageError, vocab):
        load(shape)(torch.tensor([[5, vocab]]))


def test_misspelt_argument_is_not_swallowed(load: Load) -> None:
    with pytest.raises((UsageError, TypeError)):
        load("llama")(torch.tensor([ROWS[0]]), alhpa=0.0)


# ---- memory


def stored(tensors: Any) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def size_of(path: Path) -> int:
    from safetensors.torch import load_file

    return sum(t.nbytes for t in load_file(path).values())


@pytest.mark.parametrize(("shape", "adapters"), [("adapters", 3), ("bare", 2)])
def test_members_on_one_base_use_its_memory_once(
    load: Load, make_collection: Callable[[str], Path], shape: str, adapters: int
) -> None:
    folder, model = make_collection(shape), load(shape)
    base = size_of(Path(model.config.router_spec.source) / "model.safetensors")
    assert len(list(folder.glob("*/adapter_model.safetensors"))) == adapters
    parts = [base, *map(size_of, folder.rglob("*.safetensors"))]
    assert stored(model.parameters()) == sum(parts)


def test_modules_carry_the_names_of_the_members(load: Load) -> None:
    names = {name.split(".")[0] for name in load("mixed").state_dict()}
    assert names == {"router", "expert_math", "expert_code", "expert_general"}


# ---- loading


def test_auto_model_loads_a_collection(make_collection: Callable[[str], Path], load: Load, shape: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_collection(shape))
    assert type(model) is FusionRouteForCausalLM
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(shape)(ids).logits)


def test_auto_model_takes_dtype_and_alpha(make_collection: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_collection("adapters"), dtype="bfloat16", alpha=0.5)
    assert {p.dtype for p in model.router.member.parameters()} == {torch.bfloat16}
    assert model.config.alpha == 0.5


def test_auto_tokenizer_loads_the_routers(make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("llama")
    own = AutoTokenizer.from_pretrained(folder.parent / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "def add(a, b): return 12 + 3  # <|im_end|>"
    assert loaded(text)["input_ids"] == own(text)["input_ids"]
    assert loaded.chat_template == own.chat_template


def test_auto_tokenizer_needs_no_fusionroute(make_collection: Callable[[str], Path]) -> None:
    script = f"from transformers import AutoTokenizer as A; A.from_pretrained({str(make_collection('llama'))!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr.splitlines()[-1]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_bfloat16_members_and_a_float32_head(make_collection: Callable[[str], Path], dtype: Any) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("mixed"), dtype=dtype)
    assert {p.dtype for member in model.members for p in member.parameters()} == {torch.bfloat16}
    assert model.router.route_head.weight.dtype == torch.float32


def test_bfloat16_members_are_added_in_float32(make_collection: Callable[[str], Path]) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("mixed"), dtype="bfloat16")
    with torch.no_grad():
        output = model(torch.tensor([ROWS[0]]))
    assert output.logits.dtype == torch.float32
    assert torch.equal(output.logits, output.router_logits.float() + output.expert_logits.float())


def test_torch_dtype_is_not_ignored(make_collection: Callable[[str], Path]) -> None:
    """The name that most code on the Hub still uses: honoured or refused."""
    try:
        model = FusionRouteForCausalLM.from_pretrained(make_collection("adapters"), torch_dtype=torch.bfloat16)
    except UsageError:
        return
    assert {p.dtype for p in model.router.member.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bf17", "Tensor", ""])
def test_unknown_dtype_is_refused(make_collection: Callable[[str], Path], dtype: str, refuses: Callable) -> None:
    with refuses(UsageError, repr(dtype), "float32, bfloat16 or float16"):
        FusionRouteForCausalLM.from_pretrained(make_collection("llama"), dtype=dtype)


def test_integer_dtype_is_refused(make_collection: Callable[[str], Path]) -> None:
    with pytest.raises(FusionRouteError) as caught:
        FusionRouteForCausalLM.from_pretrained(make_collection("llama"), dtype="int8")
    assert "\n" not in str(caught.value)


def test_unknown_argument_is_refused(make_collection: Callable[[str], Path], refuses: Callable) -> None:
    with refuses(UsageError, "load_in_3bit"):
        FusionRouteForCausalLM.from_pretrained(make_collection("llama"), load_in_3bit=True)


def test_attention_implementation_reaches_the_members(make_collection: Callable[[str], Path], load: Load) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("mixed"), attn_implementation="eager")
    assert {member.config._attn_implementation for member in model.members} == {"eager"}
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, load("mixed")(ids).logits, atol=1e-4)


def test_another_base_warns_with_both_digests_and_works(
    make_collection: Callable[[str], Path], oracle_of: Callable, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_collection("adapters")
    model = AutoModelForCausalLM.from_pretrained(FusionRouteConfig.from_pretrained(folder).router_spec.source)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v * 1.05 for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    expected = FusionRouteConfig.from_pretrained(folder).router_spec.digest
    with pytest.warns(UserWarning, match=rf"router: {tmp_path} has digest sha256:\w+.*{expected}"):
        loaded = FusionRouteForCausalLM.from_pretrained(folder, base=str(tmp_path))
    with torch.no_grad():
        logits = loaded(torch.tensor([ROWS[0]])).logits[0]
    assert torch.allclose(logits, oracle_of(folder, base=tmp_path)(ROWS[0])[0], atol=1e-4)


def test_callers_configuration_is_left_alone(make_collection: Callable[[str], Path]) -> None:
    config = FusionRouteConfig.from_pretrained(make_collection("adapters"))
    FusionRouteForCausalLM.from_pretrained(make_collection("adapters"), config=config, alpha=0.5)
    assert config.alpha == 1.0


def test_import_is_light() -> None:
    script = (
        "import sys, fusionroute, fusionroute.errors\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "print(*sorted(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "\n"


def test_every_public_name_can_be_had() -> None:
    import fusionroute

    assert [name for name in fusionroute.__all__ if not hasattr(fusionroute, name)] == []
