"""A reward model that follows answers gives what it gives to whole texts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fusionroute.collection import read_config
from fusionroute.evaluation.reward import RewardModel
from fusionroute.evaluation.running_reward import RunningReward

GROWING = [
    ["a", "b", "the cat"],
    ["the cat", "the cat sat", "the dog sat on it"],
    ["the dog"],
    ["the dog sat on the mat and", "the dog sat on the mat", "the dog sat"],
    ["something else", "something other"],
]


@pytest.fixture(scope="module")
def reward(make_collection: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    torch.manual_seed(0)
    base = Path(read_config(make_collection("adapters")).router_spec.source)
    folder = tmp_path_factory.mktemp("reward")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return RewardModel(str(folder))


def test_beginnings_that_are_read_once_score_the_same(reward: RewardModel) -> None:
    running = RunningReward(reward)
    for answers in GROWING:
        for row, prompt in ((0, "Tell me"), (1, "What is 3 + 4, in words and figures?")):
            expected = reward.score([(prompt, answer) for answer in answers])
            assert running(row, prompt, answers) == pytest.approx(expected, abs=1e-4)


def test_an_end_that_is_padding_is_not_what_is_scored(reward: RewardModel) -> None:
    before, last = reward.tokenizer.pad_token, reward.encode("Tell me", "a")[-1]
    reward.tokenizer.pad_token = reward.tokenizer.convert_ids_to_tokens(last)
    reward.model.config.pad_token_id = last
    running = RunningReward(reward)
    for answers in GROWING:
        expected = reward.score([("Tell me", answer) for answer in answers])
        assert running(0, "Tell me", answers) == pytest.approx(expected, abs=1e-4)
    reward.tokenizer.pad_token = before
    reward.model.config.pad_token_id = reward.tokenizer.pad_token_id


def test_what_was_read_is_not_read_again(reward: RewardModel) -> None:
    running, lengths = RunningReward(reward), []
    backbone = running.backbone
    running.backbone = lambda **inputs: (lengths.append(inputs["input_ids"].shape[1]), backbone(**inputs))[1]
    running(0, "Tell me", ["the cat sat on", "the cat sat by"])
    first, lengths[:] = list(lengths), []
    running(0, "Tell me", ["the cat sat on it", "the cat sat on me"])
    assert sum(lengths) < sum(first)


def test_a_row_that_ended_is_forgotten(reward: RewardModel) -> None:
    running = RunningReward(reward)
    running(3, "Tell me", ["a", "b"])
    running.forget(3)
    assert not running.known


def test_what_is_too_long_is_scored_whole(reward: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "max_length", 12)
    pairs: list[tuple[str, str]] = [("Tell me", "a b c " * 10), ("Tell me", "d")]
    running = RunningReward(reward)
    assert running(0, "Tell me", [answer for _, answer in pairs]) == reward.score(pairs)


def test_a_model_without_a_cache_is_scored_whole(reward: RewardModel) -> None:
    running = RunningReward(reward)
    running.head = None
    pairs = [("Tell me", "a"), ("Tell me", "b c")]
    assert running(0, "Tell me", ["a", "b c"]) == reward.score(pairs)
