"""A collection without tokenizer files: the tokenizer is that of its router's base, or of the base put in its place."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fusionroute import collection
from fusionroute.baselines.merging import MergeSettings, merge_collection
from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.systems import TOKENIZER_FILES, Sources, find
from fusionroute.inspection import inspect_collection
from fusionroute.loading import load_engine
from fusionroute.modeling import FusionRouteForCausalLM
from on_disk import config_of, rewrite

TEXT = "A farmer has 12 cows.\nHow many?"


def strip(folder: Path) -> Path:
    """Take the tokenizer files out of `folder`."""
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.fixture
def bare(copy: Callable[[str], Path]) -> Path:
    return strip(copy("adapters"))


@pytest.fixture
def another(tmp_path: Path, make_collection: Callable[[str], Path]) -> Path:
    """Another base for the adapters, with the same vocabulary under another chat template."""
    base = Path(config_of(make_collection("adapters"))["router"]["source"])
    folder = shutil.copytree(base, tmp_path / "another")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "another {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


def test_it_is_the_bases(bare: Path, make_collection: Callable[[str], Path]) -> None:
    ours, whole = (collection.load_tokenizer(folder) for folder in (bare, make_collection("adapters")))
    assert ours(TEXT)["input_ids"] == whole(TEXT)["input_ids"]
    assert ours.chat_template == whole.chat_template
    assert (type(ours), ours.padding_side, ours.pad_token) == (type(whole), whole.padding_side, whole.pad_token)


def test_it_is_the_other_bases(bare: Path, another: Path) -> None:
    assert collection.load_tokenizer(bare, base=str(another)).chat_template.startswith("another")
    assert load_engine(bare, base=str(another)).tokenizer.chat_template.startswith("another")


def test_what_the_collection_has_goes_before_the_bases(copy: Callable[[str], Path], another: Path) -> None:
    assert not collection.load_tokenizer(copy("adapters"), base=str(another)).chat_template.startswith("another")


def test_its_vocabulary_is_checked_against_it(bare: Path) -> None:
    config = collection.read_config(bare)
    assert collection.check_vocabulary_of(config, bare).common == config.vocab_size


def test_saving_puts_the_files_in(bare: Path, tmp_path: Path) -> None:
    FusionRouteForCausalLM.from_pretrained(bare).save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
    assert "apply_chat_template" in (tmp_path / "out" / "README.md").read_text()


def test_its_card_shows_a_conversation(bare: Path) -> None:
    collection.record_scores(bare, {"S": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}})
    assert "apply_chat_template" in (bare / "README.md").read_text()


def test_inspection_finds_its_template(bare: Path) -> None:
    report = inspect_collection(bare)
    assert "error" not in report["vocabulary"]
    assert {member["template"] for member in report["members"]} == {"same"}


def test_a_base_that_is_not_there_is_named(bare: Path, refuses: Callable) -> None:
    rewrite(bare, lambda config: config["router"].update(source="/nowhere/at/all"))
    with refuses(FusionRouteError, "/nowhere/at/all"):
        collection.load_tokenizer(bare)


def test_a_merge_gets_it(bare: Path, tmp_path: Path) -> None:
    merge_collection(bare, MergeSettings.of("ties"), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_answers_depend_on_it(bare: Path, another: Path, tmp_path: Path) -> None:
    """Two bases of the same weights, with one chat template each."""
    found = []
    for base in (config_of(bare)["router"]["source"], str(another)):
        system = find("fusionroute", Sources(bare, tmp_path / "work", base=base))
        found.append(system.identity(collection.read_config(bare), base))
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["text"] != found[1]["text"]
