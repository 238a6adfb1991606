from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fusionroute.baselines.selection import select
from fusionroute.collection import read_config
from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.reward import RewardModel

PAIRS = [("What is 3 + 4?", "7"), ("Say hello", "hello there, how are you today?"), ("Say hello", ""), ("x", "y " * 40)]


@pytest.fixture(scope="module")
def base(make_collection: Callable[[str], Path]) -> Path:
    return Path(read_config(make_collection("adapters")).router_spec.source)


@pytest.fixture(scope="module")
def reward_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reward")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def alone(folder: Path, prompt: str, answer: str) -> float:
    """One pair at a time, no padding: the head at the last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        return float(model.score(hidden[0, -1]))


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_are_those_of_each_pair_alone(batch: int, reward_folder: Path) -> None:
    found = RewardModel(str(reward_folder)).score(PAIRS, batch)
    assert found == pytest.approx([alone(reward_folder, *pair) for pair in PAIRS], abs=1e-4)


def test_what_is_too_long_loses_its_beginning(reward_folder: Path) -> None:
    short = RewardModel(str(reward_folder), max_length=8)
    one, other = short.score(
        [("a long question, it is about something", "yes"), ("another long question, about", "yes")]
    )
    assert one == pytest.approx(other, abs=1e-5)


def test_a_language_model_is_no_reward_model(base: Path) -> None:
    with pytest.raises(FusionRouteError, match="no trained score head"):
        RewardModel(str(base))


def row(text: str) -> dict:
    return {"text": text, "tokens": len(text), "seconds": 2.0, "passes": 3.0, "pieces": [["expert", text, 1]]}


def test_the_highest_reward_wins_and_the_first_of_equals() -> None:
    candidates = [("a", row("x")), ("b", row("yy")), ("c", row("z"))]
    assert select(candidates, [0.1, 0.5, 0.2])["text"] == "yy"
    assert select(candidates, [0.5, 0.5, 0.2])["text"] == "x"


def test_a_selected_answer_costs_what_all_of_them_cost() -> None:
    found = select([("a", row("x")), ("b", row("yy"))], [0.0, 1.0])
    assert (found["seconds"], found["passes"], found["pieces"]) == (4.0, 6.0, [["b", "yy", 2]])


def test_a_classifier_of_several_labels_is_refused(base: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    with pytest.raises(FusionRouteError, match="one label"):
        RewardModel(str(tmp_path))
