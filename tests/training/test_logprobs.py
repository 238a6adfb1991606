"""Label log-probabilities in chunks equal log_softmax of the model's own logits, in value, gradient and size."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from fusionroute.errors import FusionRouteError
from fusionroute.lm_head import Head, hidden_states
from fusionroute.training.logprobs import score_labels

FAMILIES = ["llama", "qwen2", "gemma2"]
CHUNKS = [1, 7, 1000]
IDS = torch.randint(0, 320, (3, 9), generator=torch.Generator().manual_seed(5))
LABELS = torch.randint(0, 300, (27,), generator=torch.Generator().manual_seed(6))
# Unequal weights of the positions, as a loss with several terms has.
WEIGHTS = torch.rand(27, generator=torch.Generator().manual_seed(7)) - 0.3


def own_logprobs(model: Any, vocab: int | None = None) -> torch.Tensor:
    """[27, V] from the model's own forward."""
    return model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)[..., :vocab].float().log_softmax(-1)


def flat_hidden(model: Any) -> torch.Tensor:
    return hidden_states(model, input_ids=IDS).flatten(0, 1)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("vocab", [None, 300])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_greedy_ids(make_lm: Callable[..., Any], family: str, vocab: int | None, chunk: int) -> None:
    model = make_lm(family)
    with torch.no_grad():
        expected = own_logprobs(model, vocab)
        got = score_labels(flat_hidden(model), Head(model, vocab), LABELS, chunk)
    torch.testing.assert_close(got.logprobs, expected[torch.arange(27), LABELS], rtol=1e-5, atol=1e-5)
    assert torch.equal(got.greedy, expected.argmax(-1))


def test_gemma_is_really_capped(make_lm: Callable[..., Any]) -> None:
    # Without the cap the test above would prove nothing: it must change the values.
    model = make_lm("gemma2")
    head = Head(model)
    with torch.no_grad():
        capped = score_labels(flat_hidden(model), head, LABELS).logprobs
        head.cap = None
        plain = score_labels(flat_hidden(model), head, LABELS).logprobs
    assert (capped - plain).abs().max() > 1e-3


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_in_hidden_states_with_a_frozen_head(make_lm: Callable[..., Any], family: str, chunk: int) -> None:
    model = make_lm(family).requires_grad_(False)
    head = Head(model, 300)
    hidden = flat_hidden(model)
    left, right = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (head(left).float().log_softmax(-1)[torch.arange(27), LABELS] * WEIGHTS).sum().backward()
    got = score_labels(right, head, LABELS, chunk)
    (got.logprobs * WEIGHTS).sum().backward()
    torch.testing.assert_close(right.grad, left.grad, rtol=1e-4, atol=1e-6)
    assert not got.greedy.requires_grad


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_in_every_parameter(make_lm: Callable[..., Any], family: str, tied: bool, chunk: int) -> None:
    model = make_lm(family).requires_grad_(True)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    reference = copy.deepcopy(model)
    if tied:
        reference.lm_head.weight = reference.get_input_embeddings().weight
        assert model.lm_head.weight is model.get_input_embeddings().weight
    (own_logprobs(reference, 300)[torch.arange(27), LABELS] * WEIGHTS).sum().backward()
    (score_labels(flat_hidden(model), Head(model, 300), LABELS, chunk).logprobs * WEIGHTS).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_gradient_in_the_head_alone(make_lm: Callable[..., Any]) -> None:
    model = make_lm().requires_grad_(False)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    hidden = flat_hidden(model)
    assert not hidden.requires_grad
    score_labels(hidden, Head(model), LABELS, 7).logprobs.sum().backward()
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    (hidden @ weight.T).log_softmax(-1)[torch.arange(27), LABELS].sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)


def test_lora_on_the_head_gets_its_gradient(make_lm: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(make_lm(), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    model = wrapped.get_base_model()
    score_labels(flat_hidden(model), Head(model), LABELS, 7).logprobs.sum().backward()
    (factor,) = [p for name, p in wrapped.named_parameters() if "lora_B" in name]
    assert factor.grad is not None
    assert factor.grad.abs().max() > 0


def test_no_position_at_all(make_lm: Callable[..., Any]) -> None:
    got = score_labels(torch.zeros(0, 32), Head(make_lm()), torch.zeros(0, dtype=torch.long))
    assert (got.logprobs.shape, got.greedy.shape) == ((0,), (0,))
    assert got.greedy.dtype == torch.long


def test_bfloat16_logits_are_normalised_in_float32(make_lm: Callable[..., Any]) -> None:
    model = make_lm(dtype=torch.bfloat16).requires_grad_(False)
    hidden = flat_hidden(model).detach().requires_grad_()
    got = score_labels(hidden, Head(model), LABELS, 7).logprobs
    expected = Head(model)(hidden.detach()).float().log_softmax(-1)[torch.arange(27), LABELS]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.detach(), expected, rtol=1e-6, atol=1e-6)
    got.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------ memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor any operation gives, views of weights apart."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_never_more_than_a_chunk_of_logits(grad: bool, trainable: bool) -> None:
    positions, width, vocab, chunk = 1000, 8, 1500, 32
    linear = torch.nn.Linear(width, vocab, bias=False).requires_grad_(trainable)

    class Plain:
        def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
            return linear(hidden)

    head = Plain()
    head.trainable = trainable  # type: ignore[attr-defined]
    hidden = torch.randn(positions, width, requires_grad=grad)
    labels = torch.randint(0, vocab, (positions,))
    with Largest() as largest, torch.set_grad_enabled(grad):
        got = score_labels(hidden, head, labels, chunk)
        if grad:
            got.logprobs.sum().backward()
    assert largest.numel == chunk * vocab  # and not positions * vocab; equality shows that the mode saw the logits


@pytest.mark.parametrize("trainable", [False, True])
def test_nothing_of_the_size_of_the_vocabulary_waits_for_the_backward_pass(trainable: bool) -> None:
    positions, width, vocab, chunk = 64, 8, 500, 16
    linear = torch.nn.Linear(width, vocab, bias=False).requires_grad_(trainable)

    class Held:
        """Alive as long as the graph keeps the tensor."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    saved: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Held:
        held = Held(tensor)
        saved.add(held)
        return held

    class Plain:
        def __init__(self) -> None:
            self.trainable = trainable

        def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
            return linear(hidden)

    hidden = torch.randn(positions, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        got = score_labels(hidden, Plain(), torch.zeros(positions, dtype=torch.long), chunk)
    kept = [h.tensor.numel() for h in saved if h.tensor.data_ptr() != linear.weight.data_ptr()]
    assert got.logprobs.requires_grad
    assert max(kept, default=0) <= positions * width


# ------------------------------------------------------------------------------------------------------- check


class OddLlama(LlamaForCausalLM):
    """Scales its logits by a number that no configuration names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vocab", [None, 300])
def test_check_accepts_known_families(make_lm: Callable[..., Any], family: str, vocab: int | None) -> None:
    model = make_lm(family)
    Head(model, vocab).check(model)


def test_check_refuses_an_unknown_scaling(make_lm: Callable[..., Any]) -> None:
    model = make_lm()
    model.__class__ = OddLlama
    with pytest.raises(FusionRouteError, match="OddLlama") as error:
        Head(model).check(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "config", "extra"),
    [
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
        (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}),
    ],
)
def test_scaled_logits_are_known_from_the_configuration(kind: Any, config: Any, extra: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
            **extra,
        )
    ).eval()
    with torch.no_grad():
        got = score_labels(flat_hidden(model), Head(model), LABELS, 7)
        torch.testing.assert_close(got.logprobs, own_logprobs(model)[torch.arange(27), LABELS], rtol=1e-4, atol=1e-4)
    Head(model).check(model)
