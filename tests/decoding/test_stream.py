from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute import FusionRouteForCausalLM, load_tokenizer
from fusionroute.decoding.stream import TextPieces, stream
from fusionroute.errors import UsageError

PROMPT = [1, 40, 41, 42, 43]


def test_greedy_stream_is_generate(any_collection: Path) -> None:
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(any_collection), load_tokenizer(any_collection)
    model.generation_config.eos_token_id = None
    tokens = list(stream(model, tokenizer, PROMPT, max_new_tokens=16))
    output = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    assert [t.id for t in tokens] == output.sequences[0, len(PROMPT) :].tolist()
    assert [t.expert for t in tokens] == [model.config.expert_names[i] for i in output.routes[0]]


def test_trace_of_a_token(make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("mixed")
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    first = next(stream(model, tokenizer, PROMPT, temperature=1.5, seed=4))
    ids = torch.tensor([PROMPT])
    output = model(ids)
    scores = output.scores[0, -1]
    expert = next(e for e in model.experts if e.name == first.expert)
    alone = expert(input_ids=ids).logits[0, -1, : model.config.vocab_size]
    router = model.router(input_ids=ids).logits[0, -1, : model.config.vocab_size]
    fused = alone + router
    assert first.weights == pytest.approx(
        dict(zip(model.config.expert_names, scores.softmax(-1).tolist(), strict=True))
    )
    assert first.expert_choice == int(alone.argmax())
    assert first.router_choice == int(router.argmax())
    assert first.fused_choice == int(fused.argmax())
    assert first.overruled == (first.fused_choice != first.expert_choice)
    gap = fused.log_softmax(-1)[first.id] - alone.log_softmax(-1)[first.id]
    assert first.gap == pytest.approx(float(gap), abs=1e-4)
    assert not first.drafted


def test_an_end_id_ends_the_stream_and_is_not_part_of_it(make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("llama")
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    model.generation_config.eos_token_id = None
    free = [t.id for t in stream(model, tokenizer, PROMPT, max_new_tokens=12)]
    model.generation_config.eos_token_id = [free[5]]
    assert [t.id for t in stream(model, tokenizer, PROMPT, max_new_tokens=12)] == free[: free.index(free[5])]


def test_the_same_seed_gives_the_same_text(make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("adapters")
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    model.generation_config.eos_token_id = None

    def ids(seed: int) -> list[int]:
        return [t.id for t in stream(model, tokenizer, PROMPT, max_new_tokens=12, temperature=2.0, seed=seed)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


@pytest.mark.parametrize("expert", ["math", "code"])
def test_a_forced_expert_without_complement_is_that_expert(expert: str, make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("adapters")
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    model.generation_config.eos_token_id = None
    tokens = list(stream(model, tokenizer, PROMPT, max_new_tokens=8, alpha=0, expert=expert))
    ids = list(PROMPT)
    member = next(e for e in model.experts if e.name == expert)
    for token in tokens:
        assert token.id == int(member(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        assert token.expert == expert
        assert not token.overruled
        ids.append(token.id)


def test_a_prompt_with_no_room_left_is_refused(make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("llama")
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    with pytest.raises(UsageError, match="the prompt has 600 tokens and the context 512"):
        next(stream(model, tokenizer, [5] * 600))


def test_the_context_is_never_exceeded(make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("llama")
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    model.generation_config.eos_token_id = None
    assert len(list(stream(model, tokenizer, [5] * 509, max_new_tokens=50))) == 3


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=30))
def test_pieces_make_up_the_text(text: str, make_collection: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(make_collection("llama"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TextPieces(tokenizer)
    parts = [pieces.push(token, last=index == len(ids) - 1) for index, token in enumerate(ids)]
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any(part.endswith("\ufffd") for part in parts[:-1]) or "\ufffd" in text
