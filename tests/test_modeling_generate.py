"""transformers' `generate` on the reference model, against an oracle that recomputes every token without a cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from fusionroute import tiny
from fusionroute.errors import UsageError
from fusionroute.modeling import FusionRouteForCausalLM

Load = Callable[[str], FusionRouteForCausalLM]

NEW = 12  # with these prompts, well past Gemma-2's window of 6
ROWS = [
    [5, 9, 250, 17, 33, 4, 4, 90, 12],
    [300, 8, 8, 41],
    [21, 100, 7, 64, 9, 9],
]
# What prompt lookup has something to find in.
REPEATING = [5, 9, 250, 17, 5, 9, 250, 17, 5, 9, 250]
POLICIES: list[dict[str, Any]] = [
    {},
    {"alpha": 0.5},
    {"alpha": 0},
    {"expert": "math"},
    {"expert": "code", "alpha": 0},
    {"routing": "uniform"},
    {"routing": "query"},
]
# Every policy on the shape that has a bit of everything, and the usual one on all shapes.
SHAPES = ["adapters", "bare", "gemma2", "llama", "mixed", "qwen2", "two_bases"]
CASES: list[tuple[str, dict[str, Any]]] = [(shape, {}) for shape in SHAPES] + [("mixed", p) for p in POLICIES[1:]]
QUERY = {"routing": "query"}
FEW = [("adapters", {}), ("gemma2", {}), ("mixed", {}), ("mixed", QUERY), ("gemma2", QUERY)]


def case_name(value: Any) -> str:
    return named(value) if isinstance(value, dict) else str(value)


def named(policy: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in policy.items()) or "default"


def greedy(model: FusionRouteForCausalLM, row: list[int], **kwargs: Any) -> list[int]:
    """The new tokens."""
    sequence = model.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False, **kwargs)[0]
    return sequence[len(row) :].tolist()


def routes_of(oracle: Any, prompt: list[int], new: list[int], **policy: Any) -> list[int]:
    """Teacher-forced: the route at each position that a new token was drawn from."""
    return oracle([*prompt, *new], prompt=len(prompt), **policy)[1][len(prompt) - 1 : -1]


# ---- greedy


@pytest.mark.parametrize(("shape", "policy"), CASES, ids=case_name)
def test_greedy_equals_recomputation(load: Load, oracle: Callable, shape: str, policy: dict[str, Any]) -> None:
    assert greedy(load(shape), ROWS[0], **policy) == oracle(shape).greedy(ROWS[0], NEW, **policy)


@pytest.mark.parametrize(("shape", "policy"), FEW, ids=case_name)
def test_greedy_without_a_cache_is_the_same(load: Load, oracle: Callable, shape: str, policy: dict[str, Any]) -> None:
    got = greedy(load(shape), ROWS[0], use_cache=False, **policy)
    assert got == oracle(shape).greedy(ROWS[0], NEW, **policy)


@pytest.mark.parametrize(("shape", "policy"), [*CASES[:8], ("mixed", QUERY)], ids=case_name)
def test_each_row_of_a_left_padded_batch_is_as_if_alone(
    load: Load, oracle: Callable, padded: Callable, shape: str, policy: dict[str, Any]
) -> None:
    ids, mask = padded(ROWS, "left")
    sequences = load(shape).generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **policy)
    for row, sequence in zip(ROWS, sequences[:, ids.shape[1] :].tolist(), strict=True):
        expected = oracle(shape).greedy(row, NEW, **policy)
        assert sequence[: len(expected)] == expected
        assert set(sequence[len(expected) :]) <= {0}


def test_left_padded_batch_without_a_cache_is_the_same(load: Load, oracle: Callable, padded: Callable) -> None:
    ids, mask = padded(ROWS, "left")
    options = {"max_new_tokens": NEW, "do_sample": False, "routing": "query"}
    sequences = load("mixed").generate(ids, attention_mask=mask, use_cache=False, **options)
    for row, sequence in zip(ROWS, sequences[:, ids.shape[1] :].tolist(), strict=True):
        expected = oracle("mixed").greedy(row, NEW, routing="query")
        assert sequence[: len(expected)] == expected


def test_generate_takes_what_a_tokenizer_gives(load: Load, oracle: Callable, padded: Callable) -> None:
    ids, mask = padded(ROWS[:1], "left")
    encoding = {"input_ids": ids, "attention_mask": mask}
    sequence = load("mixed").generate(**encoding, max_new_tokens=NEW, do_sample=False, routing="query")[0]
    assert sequence[len(ROWS[0]) :].tolist() == oracle("mixed").greedy(ROWS[0], NEW, routing="query")


def test_generation_ends_at_an_end_id(load: Load, oracle: Callable) -> None:
    expected = oracle("llama").greedy(ROWS[0], NEW)
    end = expected[4]
    assert greedy(load("llama"), ROWS[0], eos_token_id=end) == oracle("llama").greedy(ROWS[0], NEW, end=end)


@pytest.mark.parametrize(("shape", "policy"), FEW, ids=case_name)
def test_cache_handed_back_carries_on(load: Load, oracle: Callable, shape: str, policy: dict[str, Any]) -> None:
    model, cache = load(shape), load(shape).new_cache()
    options = {"do_sample": False, "return_dict_in_generate": True, "past_key_values": cache, **policy}
    first = model.generate(torch.tensor([ROWS[0]]), max_new_tokens=5, **options)
    turn = [*first.sequences[0].tolist(), 41, 8, 300]
    second = model.generate(torch.tensor([turn]), max_new_tokens=5, **options)
    new = second.sequences[0, len(turn) :].tolist()
    if policy:
        # One decision per prompt, and the first turn's stands while its cache does.
        routes = routes_of(oracle(shape), ROWS[0], turn[len(ROWS[0]) :] + new, **policy)[-len(new) :]
    else:
        assert new == oracle(shape).greedy(turn, 5)
        routes = routes_of(oracle(shape), turn, new)
    assert second.routes.tolist() == [routes]


@pytest.mark.parametrize("shape", ["adapters", "gemma2", "mixed"])
def test_prompt_in_chunks_gives_the_same_tokens_and_routes(load: Load, oracle: Callable, shape: str) -> None:
    output = load(shape).generate(
        torch.tensor([ROWS[0]]), max_new_tokens=NEW, do_sample=False, prefill_chunk_size=4, return_dict_in_generate=True
    )
    expected = oracle(shape).greedy(ROWS[0], NEW)
    assert output.sequences[0, len(ROWS[0]) :].tolist() == expected
    assert output.routes.tolist() == [routes_of(oracle(shape), ROWS[0], expected)]


def test_query_is_decided_at_the_end_of_a_prompt_in_chunks(load: Load, oracle: Callable) -> None:
    got = greedy(load("mixed"), ROWS[0], prefill_chunk_size=4, routing="query")
    assert got == oracle("mixed").greedy(ROWS[0], NEW, routing="query")


# ---- routes of the new tokens


@pytest.mark.parametrize(
    ("shape", "policy"), [*FEW, ("mixed", {"routing": "uniform"}), ("mixed", {"expert": "code"})], ids=case_name
)
def test_routes_are_those_of_teacher_forcing(
    load: Load, oracle: Callable, padded: Callable, shape: str, policy: dict[str, Any]
) -> None:
    ids, mask = padded(ROWS, "left")
    output = load(shape).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **policy
    )
    new = output.sequences[:, ids.shape[1] :].tolist()
    assert output.routes.shape == (len(ROWS), len(new[0]))
    for row, written, routes in zip(ROWS, new, output.routes.tolist(), strict=True):
        count = written.index(2) + 1 if 2 in written else len(written)
        assert routes[:count] == routes_of(oracle(shape), row, written[:count], **policy)


def test_dict_without_a_cache_has_no_routes(load: Load) -> None:
    output = load("llama").generate(
        torch.tensor([ROWS[0]]), max_new_tokens=3, use_cache=False, return_dict_in_generate=True
    )
    assert "routes" not in output


# ---- sampling


def test_first_sampled_token_follows_the_fused_distribution(load: Load, oracle: Callable) -> None:
    draws = 3000
    torch.manual_seed(0)
    sequences = load("mixed").generate(
        torch.tensor([ROWS[1]]),
        max_new_tokens=1,
        do_sample=True,
        num_return_sequences=draws,
        generation_config=GenerationConfig(top_k=0, top_p=1.0, temperature=1.5, pad_token_id=0),
    )
    observed = torch.bincount(sequences[:, -1], minlength=320).double()
    expected = draws * (oracle("mixed")(ROWS[1])[0][-1].double() / 1.5).softmax(-1)
    # Chi-square wants at least 5 expected in each cell; the rarer tokens share one.
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    freedom = len(expected) - 1
    assert freedom > 10
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_seeded_samples_are_the_same_again(load: Load) -> None:
    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return load("mixed").generate(torch.tensor([ROWS[0]]), max_new_tokens=NEW, do_sample=True)[0].tolist()

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("shape", ["adapters", "gemma2", "mixed"])
def test_each_of_several_samples_has_its_own_routes(load: Load, oracle: Callable, shape: str) -> None:
    torch.manual_seed(0)
    output = load(shape).generate(
        torch.tensor([ROWS[0]]),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
    )
    assert output.sequences.shape == (3, len(ROWS[0]) + 6)
    new = output.sequences[:, len(ROWS[0]) :].tolist()
    assert len({tuple(row) for row in new}) > 1
    assert output.routes.tolist() == [routes_of(oracle(shape), ROWS[0], row) for row in new]


# ---- beams


def beams(model: FusionRouteForCausalLM, rows: Any, **kwargs: Any) -> Any:
    ids, mask = rows
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=8, num_beams=4, num_return_sequences=3, do_sample=False,
        return_dict_in_generate=True, output_scores=True, **kwargs,
    )  # fmt: skip


def written(sequence: Tensor, prompt: int) -> list[int]:
    """The new tokens of one beam, up to its end id."""
    new = sequence[prompt:].tolist()
    return new[: new.index(2) + 1] if 2 in new else new


@pytest.mark.parametrize(("shape", "policy"), FEW, ids=case_name)
def test_beams_score_their_fused_log_probability(
    load: Load, oracle: Callable, padded: Callable, shape: str, policy: dict[str, Any]
) -> None:
    rows = ROWS[:2]
    output = beams(load(shape), padded(rows, "left"), **policy)
    for number, (sequence, score) in enumerate(zip(output.sequences, output.sequences_scores, strict=True)):
        prompt = rows[number // 3]
        new = written(sequence, len(rows[0]))
        logprobs = oracle(shape)([*prompt, *new], prompt=len(prompt), **policy)[0].log_softmax(-1)
        total = sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(new))
        assert score.item() == pytest.approx(float(total) / len(new), abs=1e-4)


@pytest.mark.parametrize(("shape", "policy"), FEW, ids=case_name)
def test_routes_of_beams_are_those_of_teacher_forcing(
    load: Load, oracle: Callable, padded: Callable, shape: str, policy: dict[str, Any]
) -> None:
    rows = ROWS[:2]
    output = beams(load(shape), padded(rows, "left"), **policy)
    for number, (sequence, routes) in enumerate(zip(output.sequences, output.routes.tolist(), strict=True)):
        prompt = rows[number // 3]
        new = written(sequence, len(rows[0]))
        assert routes[: len(new)] == routes_of(oracle(shape), prompt, new, **policy)
        assert set(routes[len(new) :]) <= {-1}


def test_one_beam_is_greedy(load: Load, oracle: Callable) -> None:
    assert greedy(load("mixed"), ROWS[0], num_beams=1) == oracle("mixed").greedy(ROWS[0], NEW)


def test_beams_need_no_cache(load: Load, padded: Callable) -> None:
    rows = padded(ROWS[:2], "left")
    cached, recomputed = beams(load("mixed"), rows), beams(load("mixed"), rows, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)


# ---- assisted


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that drafts what a collection seldom says."""
    model = tiny.make_model(tmp_path_factory.mktemp("assistant"), seed=77, width=16, layers=1, vocab_size=320)
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.assistant_confidence_threshold = 0
    return model


@pytest.mark.parametrize(("shape", "policy"), CASES, ids=case_name)
def test_prompt_lookup_gives_the_same_tokens(load: Load, oracle: Callable, shape: str, policy: dict[str, Any]) -> None:
    got = greedy(load(shape), REPEATING, prompt_lookup_num_tokens=4, max_matching_ngram_size=2, **policy)
    assert got == oracle(shape).greedy(REPEATING, NEW, **policy)


def test_assistant_changes_no_token(load: Load, oracle: Callable, shape: str, assistant: Any) -> None:
    assert greedy(load(shape), ROWS[0], assistant_model=assistant) == oracle(shape).greedy(ROWS[0], NEW)


@pytest.mark.parametrize("shape", ["gemma2", "llama"])
def test_assistant_whose_drafts_are_accepted_changes_no_token(
    make_collection: Callable[[str], Path], oracle: Callable, shape: str
) -> None:
    # Without complement, an expert drafts rightly what it is itself asked for.
    model, passes = FusionRouteForCausalLM.from_pretrained(make_collection(shape), alpha=0), []
    model.router.register_forward_hook(lambda *_: passes.append(1))
    expected = oracle(shape).greedy(ROWS[0], NEW, alpha=0)
    assert greedy(model, ROWS[0], assistant_model=oracle(shape).models[2]) == expected
    assert len(passes) < len(expected)


@pytest.mark.parametrize("policy", [{"expert": "math"}, {"alpha": 0.5}, {"routing": "query"}], ids=named)
def test_assistant_need_not_know_the_policy(
    load: Load, oracle: Callable, assistant: Any, policy: dict[str, Any]
) -> None:
    got = greedy(load("llama"), ROWS[0], assistant_model=assistant, **policy)
    assert got == oracle("llama").greedy(ROWS[0], NEW, **policy)


@pytest.mark.parametrize("shape", ["adapters", "gemma2", "mixed"])
@pytest.mark.parametrize("drafter", ["lookup", "assistant"])
def test_routes_of_assisted_tokens_are_those_of_teacher_forcing(
    load: Load, oracle: Callable, shape: str, assistant: Any, drafter: str
) -> None:
    options = {"prompt_lookup_num_tokens": 4} if drafter == "lookup" else {"assistant_model": assistant}
    output = load(shape).generate(
        torch.tensor([REPEATING]), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **options
    )
    new = output.sequences[0, len(REPEATING) :].tolist()
    assert output.routes.tolist() == [routes_of(oracle(shape), REPEATING, new)]


# transformers 5.16 cannot draft with any Gemma-2: its sliding cache hands out more than the mask was told of.
OLD = pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="sliding drafters need 5.18")


@pytest.mark.parametrize("shape", ["adapters", "qwen2", pytest.param("gemma2", marks=OLD)])
def test_collection_drafts_for_another_model(load: Load, assistant: Any, shape: str) -> None:
    ids = torch.tensor([ROWS[0]])
    alone = assistant.generate(ids, max_new_tokens=NEW, do_sample=False)
    drafted = assistant.generate(ids, max_new_tokens=NEW, do_sample=False, assistant_model=load(shape))
    assert torch.equal(drafted, alone)


# ---- streaming, processors


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.view(-1).tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("shape", ["adapters", "gemma2", "mixed"])
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}], ids=["plain", "drafted"])
def test_streamer_sees_every_token_once(load: Load, oracle: Callable, shape: str, options: dict[str, Any]) -> None:
    streamer = Collected()
    greedy(load(shape), REPEATING, streamer=streamer, **options)
    assert streamer.tokens == REPEATING + oracle(shape).greedy(REPEATING, NEW)
    assert streamer.ended


class Ban(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


@pytest.mark.parametrize("shape", ["adapters", "gemma2", "mixed"])
def test_logits_processor_acts_on_the_fused_logits(load: Load, oracle: Callable, shape: str) -> None:
    banned = oracle(shape).greedy(ROWS[0], 1)[0]

    def adjust(_: list[int], logits: Tensor) -> Tensor:
        logits[banned] = -torch.inf
        return logits

    got = greedy(load(shape), ROWS[0], logits_processor=LogitsProcessorList([Ban(banned)]))
    assert got == oracle(shape).greedy(ROWS[0], NEW, adjust=adjust)


@pytest.mark.parametrize("shape", ["adapters", "gemma2", "mixed"])
def test_repetition_penalty_acts_on_the_fused_logits(load: Load, oracle: Callable, shape: str) -> None:
    def adjust(ids: list[int], logits: Tensor) -> Tensor:
        seen = sorted(set(ids))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.8, logits[seen] / 1.8)
        return logits

    got = greedy(load(shape), ROWS[0], repetition_penalty=1.8)
    assert got == oracle(shape).greedy(ROWS[0], NEW, adjust=adjust)


def test_logits_of_generate_are_the_fused_ones(load: Load, oracle: Callable) -> None:
    output = load("qwen2").generate(
        torch.tensor([ROWS[0]]), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    expected = oracle("qwen2")(output.sequences[0, :-1].tolist())[0][-3:]
    assert torch.allclose(torch.cat(output.logits), expected, atol=1e-4)


# ---- refusals


def test_unknown_expert_is_refused(load: Load, refuses: Callable) -> None:
    with refuses(UsageError, "'maths'", "math, code"):
        greedy(load("llama"), ROWS[0], expert="maths")


def test_misspelt_argument_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match="alhpa"):
        greedy(load("llama"), ROWS[0], alhpa=0)


def test_embeddings_are_refused(load: Load) -> None:
    with pytest.raises((UsageError, ValueError), match="inputs_embeds"):
        load("llama").generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2)


def test_cache_of_one_model_is_refused(load: Load, refuses: Callable) -> None:
    with refuses(UsageError, "FusionCache"):
        greedy(load("llama"), ROWS[0], past_key_values=DynamicCache())


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_cache_of_another_kind_is_refused(load: Load, kind: str, refuses: Callable) -> None:
    with refuses(UsageError, repr(kind)):
        greedy(load("llama"), ROWS[0], cache_implementation=kind)


def test_generation_config_of_the_collection_is_used(make_collection: Callable[[str], Path], load: Load) -> None:
    stored = GenerationConfig.from_pretrained(make_collection("mixed"))
    assert load("mixed").generation_config.eos_token_id == stored.eos_token_id == [2]
    assert load("mixed").generation_config.pad_token_id == stored.pad_token_id == 0
