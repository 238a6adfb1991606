"""Collab against brute force on tiny models: no cache, no fork, every rollout from the whole row."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.conftest import SHAPES

from fusionroute import FusionRouteForCausalLM, load_tokenizer
from fusionroute.baselines.collab import Collab, CollabSettings, TextRequest
from fusionroute.decoding.members import Members
from fusionroute.decoding.rows import ALL
from fusionroute.errors import UsageError
from fusionroute.evaluation.answering import answer

PROMPTS = ([1, 40, 41, 42, 43], [9, 12] * 6, list(range(20, 43)))
NEW = 5


class Likes:
    """A reward that depends on every word, and on the prompt."""

    def __init__(self) -> None:
        self.rows: set[int] = set()
        self.broken: set[int] = set()

    def __call__(self, row: int, prompt: str, answers: Sequence[str]) -> list[float]:
        self.rows.add(row)
        return [math.nan if row in self.broken else like(prompt, answer) for answer in answers]

    def forget(self, row: int) -> None:
        self.rows.discard(row)


def like(prompt: str, answer: str) -> float:
    value = len(prompt)
    for character in answer:
        value = (value * 31 + ord(character)) % 1009
    return value / 1009


@pytest.fixture(scope="module")
def loaded(make_collection: Callable[[str], Any]) -> Callable[[str], tuple[FusionRouteForCausalLM, Any]]:
    known: dict[str, tuple[FusionRouteForCausalLM, Any]] = {}

    def get(shape: str) -> tuple[FusionRouteForCausalLM, Any]:
        if shape not in known:
            folder = make_collection(shape)
            model = FusionRouteForCausalLM.from_pretrained(folder)
            model.generation_config.eos_token_id = None
            known[shape] = (model, load_tokenizer(folder))
        return known[shape]

    return get


def brute_force(
    model: FusionRouteForCausalLM,
    tokenizer: Any,
    prompt: list[int],
    settings: CollabSettings,
    ends: Sequence[int] = (),
    reference: int = 0,
) -> list[tuple[int, str]]:
    """(token, expert's name) as the definition has it."""

    def logprobs(expert: int, ids: list[int]) -> torch.Tensor:
        name = model.config.expert_names[expert]
        with torch.no_grad():
            return model(torch.tensor([ids]), expert=name, alpha=0.0).logits[0].float().log_softmax(-1)

    ids, written = list(prompt), []
    for _ in range(NEW):
        proposals = []
        for expert in range(len(model.config.expert_names)):
            now, mass = logprobs(expert, ids)[-1], 0.0
            for token in now.argsort(descending=True)[: settings.candidates].tolist():
                if mass >= settings.top_p:
                    break
                mass += float(now[token].exp())
                whole = [*ids, token]
                for _ in range(settings.rollout):
                    if whole[-1] in ends:
                        break
                    whole.append(int(logprobs(expert, whole)[-1].argmax()))
                text = tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)
                value = like("the prompt", text)
                if settings.alpha:
                    mine, theirs = logprobs(expert, whole), logprobs(reference, whole)
                    at = range(len(ids) - 1, len(whole) - 1)
                    value -= settings.alpha * sum(float(mine[i, whole[i + 1]] - theirs[i, whole[i + 1]]) for i in at)
                proposals.append((value, token, expert))
        best = max(proposals, key=lambda proposal: proposal[0])  # the first of equals
        if best[1] in ends:
            break
        ids.append(best[1])
        disputed = len({token for _, token, _ in proposals}) > 1
        written.append((best[1], model.config.expert_names[best[2]] if disputed else ALL))
    return written


def drain(collab: Collab, requests: Sequence[TextRequest]) -> list[list[tuple[int, str]]]:
    numbers = [collab.submit(request) for request in requests]
    written: dict[int, list[tuple[int, str]]] = {number: [] for number in numbers}
    while collab.active:
        for event in collab.step():
            written[event.row] += [(token.id, token.expert) for token in event.tokens]
    return [written[number] for number in numbers]


SETTINGS = [
    CollabSettings(candidates=2, top_p=1.0, rollout=3),
    CollabSettings(candidates=3, top_p=0.02, rollout=2),
    CollabSettings(candidates=1, rollout=0),
    CollabSettings(candidates=2, top_p=1.0, rollout=3, alpha=0.3),
]


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("settings", SETTINGS, ids=["rollouts", "nucleus", "greedy", "divergence"])
def test_rows_together_are_written_as_the_definition_has_it(
    shape: str, settings: CollabSettings, loaded: Callable[[str], tuple[FusionRouteForCausalLM, Any]]
) -> None:
    model, tokenizer = loaded(shape)
    collab = Collab(model, tokenizer, Likes(), settings, members=Members(model, blocks=False))
    found = drain(collab, [TextRequest(prompt, NEW, text="the prompt") for prompt in PROMPTS])
    assert found == [brute_force(model, tokenizer, prompt, settings) for prompt in PROMPTS]


def test_distance_is_to_the_reference(loaded: Callable[[str], tuple[FusionRouteForCausalLM, Any]]) -> None:
    model, tokenizer = loaded("adapters")
    name = model.config.expert_names[-1]
    settings = CollabSettings(candidates=2, top_p=1.0, rollout=2, alpha=0.3, reference=name)
    (found,) = drain(Collab(model, tokenizer, Likes(), settings), [TextRequest(PROMPTS[0], NEW, text="the prompt")])
    reference = model.config.expert_index(name)
    assert found == brute_force(model, tokenizer, PROMPTS[0], settings, reference=reference)


def test_a_rollout_stops_at_an_end(loaded: Callable[[str], tuple[FusionRouteForCausalLM, Any]]) -> None:
    model, tokenizer = loaded("adapters")
    settings = SETTINGS[0]
    collab = Collab(model, tokenizer, Likes(), settings)
    ends = range(0, model.config.vocab_size, 3)
    collab.ends = frozenset(ends)
    found = drain(collab, [TextRequest(prompt, NEW, text="the prompt") for prompt in PROMPTS])
    assert found == [brute_force(model, tokenizer, prompt, settings, ends) for prompt in PROMPTS]
    assert any(len(tokens) < NEW for tokens in found)


def test_nothing_is_left_in_memory(loaded: Callable[[str], tuple[FusionRouteForCausalLM, Any]]) -> None:
    model, tokenizer = loaded("adapters")
    likes = Likes()
    collab = Collab(model, tokenizer, likes, SETTINGS[3])
    drain(collab, [TextRequest(prompt, NEW, text="the prompt") for prompt in PROMPTS])
    assert (collab.members.allocated, likes.rows) == (0, set())


def test_what_all_propose_is_not_rolled_out(loaded: Callable[[str], tuple[FusionRouteForCausalLM, Any]]) -> None:
    model, tokenizer = loaded("adapters")
    likes = Likes()
    collab = Collab(model, tokenizer, likes, CollabSettings(candidates=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collab, "_logprobs", lambda jobs: torch.eye(model.config.vocab_size)[[7] * len(jobs)])
        collab.submit(TextRequest(PROMPTS[0], NEW, text="the prompt"))
        (event,) = collab.step()
    assert [(token.id, token.expert) for token in event.tokens] == [(7, ALL)]
    assert not likes.rows


def test_a_reward_that_is_no_number_ends_its_row_alone(
    loaded: Callable[[str], tuple[FusionRouteForCausalLM, Any]],
) -> None:
    model, tokenizer = loaded("adapters")
    likes = Likes()
    collab = Collab(model, tokenizer, likes, SETTINGS[0])
    first, second = (collab.submit(TextRequest(prompt, NEW, text="the prompt")) for prompt in PROMPTS[:2])
    likes.broken.add(first)
    written = {first: 0, second: 0}
    failed = []
    while collab.active:
        for event in collab.step():
            written[event.row] += len(event.tokens)
            failed += [event.row] if event.finish == "error" else []
    assert (failed, written[second]) == ([first], NEW)
    assert (collab.members.allocated, likes.rows) == (0, set())


def test_a_step_that_fails_ends_the_rows_and_later_ones_begin_anew(
    loaded: Callable[[str], tuple[FusionRouteForCausalLM, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded("adapters")
    likes = Likes()
    collab = Collab(model, tokenizer, likes, SETTINGS[0])
    roll_out, failed = collab._roll_out, []

    def fail_once(candidates: Any) -> None:
        if not failed:
            failed.append(1)
            raise MemoryError("no room")
        roll_out(candidates)

    monkeypatch.setattr(collab, "_roll_out", fail_once)
    wanted = [(str(i), TextRequest(prompt, NEW, text="the prompt")) for i, prompt in enumerate(PROMPTS)]
    found = dict(answer(collab, wanted, 2))
    assert [found[key].error for key, _ in wanted] == ["MemoryError: no room"] * 2 + [None]
    assert (found["2"].tokens, collab.active, likes.rows) == (NEW, [], set())


@pytest.mark.parametrize("wrong", [{"candidates": 0}, {"top_p": 0.0}, {"rollout": -1}, {"alpha": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        CollabSettings(**wrong)


def test_a_prompt_that_leaves_no_room_is_refused(loaded: Callable[[str], tuple[FusionRouteForCausalLM, Any]]) -> None:
    model, tokenizer = loaded("adapters")
    collab = Collab(model, tokenizer, Likes(), CollabSettings(rollout=4))
    with pytest.raises(UsageError, match="context"):
        collab.submit(TextRequest([5] * (collab.context - 5), NEW, text="x"))
