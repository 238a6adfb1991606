"""What the engine does beside writing the right tokens: traces, ends, policies, faults, memory, refusals."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.decoding.conftest import LONGEST, PROMPTS, SAMPLINGS, write

from fusionroute import FusionRouteForCausalLM, load_tokenizer
from fusionroute.decoding.budget import KVBudget
from fusionroute.decoding.drafting import PromptLookup, RouterDraft
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.members import Members
from fusionroute.decoding.rows import Request
from fusionroute.decoding.sampling import Sampling
from fusionroute.errors import FusionRouteError, UsageError

Reference = Callable[[str, int, int], list[tuple[int, str]]]
Collection = Callable[[str], FusionRouteForCausalLM]
PROMPT = PROMPTS[1]


def test_trace_of_a_token(collection: Collection, make_collection: Callable[[str], Path]) -> None:
    model = collection("mixed")
    first = next(Engine(model, load_tokenizer(make_collection("mixed"))).stream(Request(PROMPT, 1)))
    ids = torch.tensor([PROMPT])
    output = model(ids)
    scores = output.scores[0, -1]
    names = model.config.expert_names
    chosen = model.experts[names.index(first.expert)]
    alone = chosen(input_ids=ids).logits[0, -1, : model.config.vocab_size]
    router = model.router(input_ids=ids).logits[0, -1, : model.config.vocab_size]
    fused = alone + router
    assert first.weights == pytest.approx(dict(zip(names, scores.softmax(-1).tolist(), strict=True)), abs=1e-5)
    assert first.expert == names[int(scores.argmax())]
    assert first.expert_choice == int(alone.argmax())
    assert first.router_choice == int(router.argmax())
    assert first.fused_choice == first.id == int(fused.argmax())
    assert first.overruled == (first.fused_choice != first.expert_choice)
    gap = fused.log_softmax(-1)[first.id] - alone.log_softmax(-1)[first.id]
    assert first.gap == pytest.approx(float(gap), abs=1e-4)
    assert not first.drafted


def test_an_end_id_ends_the_row_and_is_not_part_of_it(collection: Collection, reference: Reference) -> None:
    free = [token for token, _ in reference("llama", 1, 0)]
    engine = Engine(collection("llama"))
    engine.ends = frozenset([free[5]])
    (answer,) = engine.generate([Request(PROMPT, LONGEST)])
    assert answer.ids == free[: free.index(free[5])]
    assert answer.finish == "stop"


def test_end_ids_can_be_ignored(collection: Collection, reference: Reference) -> None:
    free = [token for token, _ in reference("llama", 1, 0)]
    engine = Engine(collection("llama"))
    engine.ends = frozenset([free[5]])
    (answer,) = engine.generate([Request(PROMPT, LONGEST, ignore_end=True)])
    assert (answer.ids, answer.finish) == (free, "length")


def test_min_tokens_puts_the_end_off(collection: Collection, reference: Reference) -> None:
    engine = Engine(collection("llama"))
    engine.ends = frozenset([reference("llama", 1, 0)[0][0]])
    (answer,) = engine.generate([Request(PROMPT, LONGEST, Sampling(min_tokens=4))])
    assert len(answer.ids) >= 4


@pytest.mark.parametrize("drafter", [None, PromptLookup(2, 1)])
def test_a_stop_string_ends_the_text_before_it(
    drafter: PromptLookup | None, collection: Collection, make_collection: Callable[[str], Path]
) -> None:
    model, tokenizer = collection("llama"), load_tokenizer(make_collection("llama"))
    (free,) = Engine(model, tokenizer).generate([Request(PROMPT, LONGEST)])
    stop = free.text[4:7]
    (answer,) = Engine(model, tokenizer, drafter=drafter).generate([Request(PROMPT, LONGEST, stop=[stop])])
    assert answer.text == free.text[: free.text.find(stop)]
    assert answer.finish == "stop"


def test_text_held_back_for_a_stop_string_comes_in_the_end(
    collection: Collection, make_collection: Callable[[str], Path]
) -> None:
    model, tokenizer = collection("llama"), load_tokenizer(make_collection("llama"))
    (free,) = Engine(model, tokenizer).generate([Request(PROMPT, LONGEST)])
    (answer,) = Engine(model, tokenizer).generate([Request(PROMPT, LONGEST, stop=[free.text[-1] + "never"])])
    assert answer.text == free.text


def test_logprobs_are_those_of_the_fused_distribution(collection: Collection) -> None:
    model = collection("qwen2")
    sampling = Sampling(temperature=3.0, seed=1)
    (answer,) = Engine(model).generate([Request(PROMPT, 3, sampling, logprobs=2)])
    logprobs = model(torch.tensor([PROMPT + answer.ids])).logits[0].log_softmax(-1)
    for step, found in enumerate(answer.logprobs):
        expected = logprobs[len(PROMPT) - 1 + step]
        assert found.logprob == pytest.approx(float(expected[answer.ids[step]]), abs=1e-4)
        assert [token for token, _ in found.top] == expected.topk(2).indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)


@pytest.mark.parametrize(("alpha", "expert"), [(0.0, None), (0.5, None), (None, "code"), (0.0, "code"), (2.0, "math")])
def test_rows_of_different_policies_share_a_step(
    alpha: float | None, expert: str | None, collection: Collection, reference: Reference
) -> None:
    model = collection("adapters")
    plain, own = Engine(model).generate([Request(PROMPT, 8), Request(PROMPT, 8, alpha=alpha, expert=expert)])
    assert [(t.id, t.expert) for t in plain.tokens] == reference("adapters", 1, 0)[:8]
    assert [(t.id, t.expert) for t in own.tokens] == write(model, PROMPT, Sampling(), 8, alpha, expert)


def test_a_forced_expert_without_complement_runs_no_other_member(collection: Collection) -> None:
    engine = Engine(collection("adapters"))
    engine.generate([Request(PROMPT, 4, alpha=0, expert="code")])
    assert engine.members.tokens == [0, 0, len(PROMPT) + 3, 0][: len(engine.members.tokens)]


def test_an_expert_never_chosen_has_no_cache(collection: Collection) -> None:
    engine = Engine(collection("llama"), mode="lazy")
    engine.submit(Request(PROMPT, 4, alpha=1, expert="math"))
    engine.step()
    of = dict(zip(["router", *engine.names], engine.members.of, strict=True))
    assert of["math"].allocated > 0
    assert of["code"].allocated == 0


def test_total_catch_up_is_at_most_one_prefill(collection: Collection) -> None:
    model = collection("llama")
    engine = Engine(model, mode="lazy")
    (answer,) = engine.generate([Request(PROMPT, LONGEST, SAMPLINGS[1])])
    assert len({token.expert for token in answer.tokens}) > 1
    assert max(engine.members.tokens) <= len(PROMPT) + LONGEST - 1


def fails_at_ten(ids: Sequence[int]) -> list[int]:
    if len(ids) == 10:
        raise RuntimeError("no grammar today")
    return list(range(3, 300))


@pytest.mark.parametrize("drafter", [None, PromptLookup(2, 1), RouterDraft()])
def test_a_mask_that_raises_ends_its_row_alone(drafter: Any, collection: Collection, reference: Reference) -> None:
    engine = Engine(collection("llama"), drafter=drafter)
    good, bad = engine.generate([Request(PROMPT, LONGEST), Request(PROMPT, LONGEST, Sampling(mask=fails_at_ten))])
    assert good.ids == [token for token, _ in reference("llama", 1, 0)]
    assert bad.finish == "error"
    assert str(bad.error) == "no grammar today"
    assert len(bad.ids) == 5
    assert engine.members.allocated == 0


def test_a_mask_that_allows_nothing_is_an_error_of_its_row(collection: Collection) -> None:
    (answer,) = Engine(collection("llama")).generate([Request(PROMPT, 4, Sampling(mask=lambda ids: []))])
    assert isinstance(answer.error, UsageError)


def test_drafts_of_the_step_that_ends_a_row_count_as_proposed(collection: Collection) -> None:
    engine = Engine(collection("llama"), drafter=PromptLookup(2, 1))
    # One token alone is allowed: whatever is drafted is right.
    (answer,) = engine.generate([Request(PROMPT, 40, Sampling(mask=lambda ids: [5]))])
    assert engine.proposed >= sum(token.drafted for token in answer.tokens) > 0


def test_what_members_that_fell_behind_must_read_counts_against_a_trial(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(collection("adapters"))
    weight = engine.model.router.route_head.weight
    monkeypatch.setattr(weight, "data", torch.zeros_like(weight))  # one expert writes, the other has read nothing
    steps: list[tuple[str, bool]] = []
    engine.modes.toll = lambda rows, seconds: steps.append((engine.modes.chosen[0], seconds > 0))  # type: ignore[method-assign]
    engine.generate([Request(PROMPT, 60)])
    first = next(i for i, (mode, _) in enumerate(steps) if mode == "all")
    assert not any(late for _, late in steps[:first])
    assert [late for _, late in steps[first : first + 3]] == [True, False, False]


def test_a_stream_that_is_left_frees_its_row(collection: Collection) -> None:
    engine = Engine(collection("llama"))
    stream = engine.stream(Request(PROMPT, LONGEST))
    next(stream)
    assert engine.members.allocated > 0
    stream.close()
    assert engine.members.allocated == 0


def test_a_stream_gives_what_was_held_back_for_a_stop_string(
    collection: Collection, make_collection: Callable[[str], Path]
) -> None:
    model, tokenizer = collection("llama"), load_tokenizer(make_collection("llama"))
    (free,) = Engine(model, tokenizer).generate([Request(PROMPT, LONGEST, SAMPLINGS[1])])
    engine = Engine(model, tokenizer)
    engine.ends = frozenset([max(free.ids, key=free.ids.index)])  # what came for the first time the latest
    (ended,) = engine.generate([Request(PROMPT, LONGEST, SAMPLINGS[1])])
    assert (ended.finish, bool(ended.text)) == ("stop", True)
    stop = ended.text[-1] + "never"
    tokens = list(engine.stream(Request(PROMPT, LONGEST, SAMPLINGS[1], stop=[stop])))
    assert [token.id for token in tokens] == ended.ids
    assert "".join(token.text for token in tokens) == ended.text


def test_streams_may_be_read_by_turns(collection: Collection, reference: Reference) -> None:
    engine = Engine(collection("llama"))
    streams = [engine.stream(Request(PROMPTS[number], LONGEST)) for number in (1, 3)]
    pairs = list(zip(*streams, strict=True))
    for place, number in enumerate((1, 3)):
        assert [pair[place].id for pair in pairs] == [token for token, _ in reference("llama", number, 0)]


def test_answers_may_be_generated_between_the_tokens_of_a_stream(collection: Collection, reference: Reference) -> None:
    engine = Engine(collection("llama"))
    stream = engine.stream(Request(PROMPT, LONGEST))
    ids = [next(stream).id]
    (answer,) = engine.generate([Request(PROMPTS[3], LONGEST)])
    ids += [token.id for token in stream]
    assert ids == [token for token, _ in reference("llama", 1, 0)]
    assert answer.ids == [token for token, _ in reference("llama", 3, 0)]


def test_a_refused_request_takes_those_beside_it_out(collection: Collection) -> None:
    engine = Engine(collection("llama"))
    with pytest.raises(UsageError, match="the prompt has no token"):
        engine.generate([Request(PROMPT, 4), Request([])])
    assert not engine.waiting


def out_of_memory(jobs: Sequence[Any]) -> list[torch.Tensor]:
    raise RuntimeError("out of memory")


def test_a_step_that_fails_leaves_no_row_behind(
    collection: Collection, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(collection("llama"))
    stream = engine.stream(Request(PROMPT, LONGEST))
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(engine.members, "run", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate([Request(PROMPTS[3], 4)])
    assert (engine.active, list(engine.waiting), engine.members.allocated) == ([], [], 0)
    with pytest.raises(FusionRouteError, match="the answer is cut off"):
        next(stream)
    (answer,) = engine.generate([Request(PROMPT, LONGEST)])
    assert answer.ids == [token for token, _ in reference("llama", 1, 0)]


def test_rows_wait_for_room(collection: Collection, reference: Reference) -> None:
    engine = Engine(collection("llama"))
    engine.budget = KVBudget(engine.members, engine.members.nbytes([len(PROMPT) + LONGEST]))
    for _ in range(3):
        engine.submit(Request(PROMPT, LONGEST))
    engine.step()
    assert (len(engine.active), len(engine.waiting)) == (1, 2)
    answers = engine.generate([Request(PROMPT, LONGEST)])
    assert answers[0].ids == [token for token, _ in reference("llama", 1, 0)]


def test_a_row_that_fits_alone_waits_for_smaller_ones(collection: Collection) -> None:
    engine = Engine(collection("llama"))
    engine.budget = KVBudget(engine.members, engine.members.nbytes([300]))
    engine.submit(Request(PROMPT, LONGEST))
    engine.submit(Request(PROMPT, LONGEST))
    engine.step()
    (answer,) = engine.generate([Request([5] * 280, 2)])
    assert (len(answer.ids), answer.finish) == (2, "length")


def test_a_row_that_never_fits_is_refused_with_both_sizes(collection: Collection) -> None:
    engine = Engine(collection("llama"), kv_budget=1000)
    with pytest.raises(UsageError, match=r"5 prompt .* and 16 new .* need [\d.]+ MB .* budget is 0\.001 MB"):
        engine.submit(Request(PROMPT, LONGEST))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "the prompt has no token"),
        (Request([5] * 600), "the prompt has 600 tokens and the context 512"),
        (Request([5, 9999]), "the prompt has token id 9999, the members share 320 ids"),
        (Request([5, -1, 7]), "the prompt has token id -1, the members share 320 ids"),
        (
            Request([5], sampling=Sampling(bias={4: 1.0, 400: 1.0})),
            "the bias has token id 400, the members share 320 ids",
        ),
        (Request([5], expert="poetry"), "poetry"),
        (Request([5], stop=["x"]), "stop strings need a tokenizer"),
        (Request([5], max_new_tokens=0), "max_new_tokens must be at least 1, not 0"),
        (Request([5], routing="tokens"), "routing must be token, query or uniform, not tokens"),  # type: ignore[arg-type]
        (Request([5], alpha=float("nan")), "alpha must be finite, not nan"),
        (Request([5], logprobs=-1), "logprobs must be at least 0, not -1"),
        (Request([5], candidates=-1), "candidates must be at least 0, not -1"),
    ],
)
def test_refusals(request_: Request, message: str, collection: Collection) -> None:
    with pytest.raises(UsageError, match=message):
        Engine(collection("llama")).submit(request_)


def test_a_mode_that_is_none_is_refused(collection: Collection) -> None:
    with pytest.raises(UsageError, match="mode must be one of lazy, predicted, all, auto, not 'fast'"):
        Engine(collection("llama"), mode="fast")  # type: ignore[arg-type]


def test_drafts_of_no_token_are_refused(collection: Collection) -> None:
    with pytest.raises(UsageError, match="draft_length must be at least 1, not 0"):
        Engine(collection("llama"), drafter=PromptLookup(), draft_length=0)


def test_the_context_is_never_exceeded(collection: Collection) -> None:
    (answer,) = Engine(collection("llama")).generate([Request([5] * 509, 50)])
    assert (len(answer.ids), answer.finish) == (3, "length")


def test_the_collection_still_works_beside_its_engine(collection: Collection, reference: Reference) -> None:
    model = collection("adapters")
    before = model(torch.tensor([PROMPT])).logits
    Engine(model)
    assert torch.allclose(model(torch.tensor([PROMPT])).logits, before, atol=1e-5)


def test_adapters_share_the_weights_of_their_base(collection: Collection) -> None:
    model = collection("adapters")
    (pool,) = Members(model, blocks=False).pools
    layer = model.experts[0].model.get_decoder().layers[0]
    fused = pool.transformer.layers[0].qkv.all.weight  # type: ignore[attr-defined]
    assert layer.self_attn.q_proj.base_layer.weight.data_ptr() == fused.data_ptr()


def test_samples_of_different_seeds_differ(collection: Collection) -> None:
    requests = [Request(PROMPT, 8, Sampling(temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    first, again, other = Engine(collection("llama")).generate(requests)
    assert first.ids == again.ids != other.ids


def test_first_tokens_follow_the_exact_fused_distribution(collection: Collection) -> None:
    model = collection("llama")
    logits = model(torch.tensor([PROMPT])).logits[0, -1]
    allowed = logits.topk(5).indices.tolist()
    exact = (logits[allowed] / 2).softmax(-1)
    count = 600
    sampling = [Sampling(temperature=2.0, seed=seed, mask=lambda ids: allowed) for seed in range(count)]
    answers = Engine(model).generate([Request(PROMPT, 1, each) for each in sampling])
    hits = torch.zeros(5)
    for answer in answers:
        hits[allowed.index(answer.ids[0])] += 1
    chi_square = float(((hits - exact * count) ** 2 / (exact * count)).sum())
    assert chi_square < 18.5  # 99.9 % point with 4 degrees of freedom


def test_every_way_of_sampling_is_reached(reference: Reference) -> None:
    texts = {tuple(reference("llama", 1, number)) for number in range(len(SAMPLINGS))}
    assert len(texts) == len(SAMPLINGS)
