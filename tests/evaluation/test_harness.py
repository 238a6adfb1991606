"""A collection as a model of lm-eval, against the reference model position by position."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from fusionroute import FusionRouteForCausalLM
from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.harness import FusionRouteLM

SYSTEMS = ["fusionroute", "expert:math", "router", "query-level", "query-level-no-complement", "uniform", "fixed:code"]
PAIRS = [("What is 3 + 4?", " It is 7."), ("", "Hello"), ("a", " b c d e f g"), ("The end. ", "Or not"), ("x", " y")]


def ask(kind: Any, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


@pytest.fixture(scope="module")
def folder(make_collection: Callable[[str], Path]) -> Path:
    return make_collection("adapters")


@pytest.fixture(scope="module")
def reference(folder: Path) -> FusionRouteForCausalLM:
    return FusionRouteForCausalLM.from_pretrained(folder)


def expected(model: FusionRouteForCausalLM, system: str, context: list[int], continuation: list[int]) -> tuple:
    """Log-probability and greediness, one forward per token of the whole row."""
    kind, _, name = system.partition(":")
    policy: dict[str, Any] = {
        "expert": {"expert": name, "alpha": 0.0},
        "fixed": {"expert": name, "alpha": 1.0},
        "query-level": {"routing": "query", "prompt_length": len(context)},
        "query-level-no-complement": {"routing": "query", "prompt_length": len(context), "alpha": 0.0},
        "uniform": {"routing": "uniform", "alpha": 0.0},
    }.get(kind, {})
    total, greedy, ids = 0.0, True, list(context)
    for token in continuation:
        with torch.no_grad():
            if system == "router":
                logits = model.router(input_ids=torch.tensor([ids])).logits[..., : model.config.vocab_size]
            else:
                logits = model(torch.tensor([ids]), **policy).logits
        logprobs = logits[0, -1].float().log_softmax(-1)
        total += float(logprobs[token])
        greedy &= int(logprobs.argmax()) == token
        ids.append(token)
    return total, greedy


@pytest.mark.parametrize("system", SYSTEMS)
def test_loglikelihoods(system: str, folder: Path, reference: FusionRouteForCausalLM) -> None:
    lm = FusionRouteLM(str(folder), system, batch_size=3)
    found = lm.loglikelihood(ask("loglikelihood", PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        if context:
            before, after = lm._encode_pair(context, continuation)
        else:
            before, after = [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
        assert (value, greedy) == (pytest.approx(expected(reference, system, before, after)[0], abs=1e-3), greedy)
        assert greedy == expected(reference, system, before, after)[1]


@pytest.mark.parametrize("system", ["fusionroute", "router", "uniform"])
def test_what_it_generates_is_greedy_by_its_own_likelihood(system: str, folder: Path) -> None:
    lm = FusionRouteLM(str(folder), system)
    lm.engine.ends = frozenset()
    (text,) = lm.generate_until(ask("generate_until", [("Count to", {"until": [], "max_gen_toks": 6})]))
    ids = lm.tok_encode("Count to")
    (found,) = lm.engine.generate([lm._request("Count to", {"until": [], "max_gen_toks": 6})])
    assert found.text == text
    assert lm._loglikelihood_tokens([(None, ids, found.ids)])[0][1]


def test_a_stop_string_ends_an_answer(folder: Path) -> None:
    lm = FusionRouteLM(str(folder))
    (whole,) = lm.generate_until(ask("generate_until", [("Hi", {"until": None, "max_gen_toks": 8})]))
    stop = whole[len(whole) // 2 :][:2]
    (cut,) = lm.generate_until(ask("generate_until", [("Hi", {"until": stop, "max_gen_toks": 8})]))
    assert cut == whole[: whole.index(stop)]


def test_sampling_is_what_a_task_asks_for(folder: Path) -> None:
    lm = FusionRouteLM(str(folder))
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 3.0}
    asked = [("Hi", {**settings, "seed": seed}) for seed in (1, 1, 2)]
    first, again, other = lm.generate_until(ask("generate_until", asked))
    assert first == again != other


def test_a_request_that_is_repeated_is_drawn_anew(folder: Path) -> None:
    lm = FusionRouteLM(str(folder))
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 3.0}
    requests = ask("generate_until", [("Hi", settings)] * 3)
    texts = lm.generate_until(requests)
    assert len(set(texts)) == 3
    assert lm.generate_until(requests) == texts


@pytest.mark.parametrize(("given", "rows"), [("auto", 16), ("auto:4", 16), ("3", 3), (5, 5)])
def test_a_batch_size_is_what_lm_eval_takes(given: int | str, rows: int, folder: Path) -> None:
    assert FusionRouteLM(str(folder), batch_size=given).batch_size == rows


def test_rolling_likelihood_is_that_of_the_whole_text(folder: Path, reference: FusionRouteForCausalLM) -> None:
    lm = FusionRouteLM(str(folder))
    text = "one two three four"
    (found,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", [(text,)]))
    ids = lm.tok_encode(text, add_special_tokens=False)
    assert found == pytest.approx(expected(reference, "fusionroute", [lm.prefix_token_id], ids)[0], abs=1e-3)


def test_a_text_longer_than_the_context_is_read_in_windows(folder: Path) -> None:
    lm = FusionRouteLM(str(folder))
    lm.engine.context = 6
    ids = lm.tok_encode("one two three four five six seven eight", add_special_tokens=False)
    assert len(ids) > 12
    (found,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", [(lm.tokenizer.decode(ids),)]))
    assert found < 0


def test_a_request_that_cannot_run_is_an_error_and_not_an_answer(folder: Path) -> None:
    lm = FusionRouteLM(str(folder))
    lm.engine.context = 4
    with pytest.raises(FusionRouteError, match="1 of 1 requests failed"):
        lm.generate_until(ask("generate_until", [("a much longer prompt than that", {"until": []})]))


def test_a_continuation_that_does_not_fit_the_context_is_refused(folder: Path) -> None:
    lm = FusionRouteLM(str(folder))
    lm.engine.context = 4
    with pytest.raises(FusionRouteError, match="a continuation has 5 tokens and the context 4"):
        lm._loglikelihood_tokens([(None, [1, 2], [3, 4]), (None, [1], [5, 6, 7, 8, 9])])
