import copy
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.errors import FusionRouteError
from fusionroute.vocabulary import check_vocabularies, template_of

TEXTS = [
    "The quick brown fox jumps over the lazy dog; the dog didn't mind, and the fox doesn't either.",
    "def quick(n: int) -> int:\n    return n + 10  # the 10 of the 100 or 2010",
    "Le café naïve était fermé; the café in the street was open at 10:30.",
] * 4

Raw = dict[str, Any]


@cache
def _bpe() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


@cache
def _unigram() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def bpe() -> Raw:
    return json.loads(_bpe())


def unigram() -> Raw:
    return json.loads(_unigram())


SIZE = len(bpe()["model"]["vocab"])


def add(raw: Raw, *texts: str) -> Raw:
    """Append added tokens behind everything else, as a fine-tune does."""
    raw = copy.deepcopy(raw)
    following = 1 + max([*raw["model"]["vocab"].values(), *(token["id"] for token in raw["added_tokens"])])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw["added_tokens"] += [{"id": following + i, "content": text, **flags} for i, text in enumerate(texts)]
    return raw


def rename(raw: Raw, old: str, new: str) -> Raw:
    raw = copy.deepcopy(raw)
    vocab = raw["model"]["vocab"]
    if old in vocab:
        vocab[new] = vocab.pop(old)
    for token in raw["added_tokens"]:
        if token["content"] == old:
            token["content"] = new
    return raw


def changed(raw: Raw, change: Callable[[Raw], object]) -> Raw:
    raw = copy.deepcopy(raw)
    change(raw)
    return raw


def save(folder: Path, raw: Raw, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@contextmanager
def saved(**members: Raw) -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        yield {name: save(Path(folder) / name, raw) for name, raw in members.items()}


def refusal(**members: Raw) -> str:
    with saved(**members) as folders, pytest.raises(FusionRouteError) as caught:
        check_vocabularies(folders)
    message = str(caught.value)
    assert "\n" not in message
    return message


def report(**members: Raw) -> Any:
    with saved(**members) as folders:
        return check_vocabularies(folders)


# --- equal members


def test_equal_files_share_everything_without_notes() -> None:
    result = report(router=bpe(), math=bpe(), code=bpe())
    assert (result.common, result.notes) == (SIZE, ())
    assert result.sizes == {"router": SIZE, "math": SIZE, "code": SIZE}


def test_another_key_order_is_equal() -> None:
    shuffled = dict(reversed(bpe().items()))
    shuffled["model"]["vocab"] = dict(reversed(shuffled["model"]["vocab"].items()))
    result = report(router=bpe(), math=shuffled)
    assert (result.common, result.notes) == (SIZE, ())


def test_merges_as_strings_equal_merges_as_pairs() -> None:
    joined = changed(bpe(), lambda raw: raw["model"].update(merges=[" ".join(pair) for pair in raw["model"]["merges"]]))
    assert report(router=bpe(), math=joined).common == SIZE


def test_the_post_processor_is_not_compared() -> None:
    template = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    assert report(router=bpe(), math=bpe() | {"post_processor": template}).notes == ()


def test_members_of_a_unigram_family_share_everything() -> None:
    other = unigram() | {"decoder": None}
    assert report(router=unigram(), math=other).common == len(unigram()["model"]["vocab"])


# --- vocabulary refused


def test_a_moved_string_is_named_with_both_ids() -> None:
    def swap(raw: Raw) -> None:
        vocab = raw["model"]["vocab"]
        vocab["Ġthe"], vocab["Ġfox"] = vocab["Ġfox"], vocab["Ġthe"]

    vocab = bpe()["model"]["vocab"]
    first, second = sorted(["Ġthe", "Ġfox"], key=vocab.__getitem__)
    assert refusal(router=bpe(), math=changed(bpe(), swap)) == (
        f"tokenizers disagree: '{first}' is id {vocab[first]} in router but {vocab[second]} in expert math; "
        "members of a collection must share one vocabulary"
    )


def test_only_the_expert_that_differs_is_named() -> None:
    message = refusal(router=bpe(), math=bpe(), code=rename(bpe(), "Ġthe", "Ġder"))
    assert "expert code" in message
    assert "math" not in message


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_two_exchanged_ids_are_refused_naming_one_of_the_strings(data: st.DataObject) -> None:
    raw = add(bpe(), "[PAD]", "<think>", "</think>")
    strings = {i: text for text, i in raw["model"]["vocab"].items()}
    strings |= {token["id"]: token["content"] for token in raw["added_tokens"]}
    first, second = data.draw(st.lists(st.sampled_from(sorted(strings)), min_size=2, max_size=2, unique=True))
    exchange = {first: second, second: first}
    other = copy.deepcopy(raw)
    for text, i in raw["model"]["vocab"].items():
        other["model"]["vocab"][text] = exchange.get(i, i)
    for token in other["added_tokens"]:
        token["id"] = exchange.get(token["id"], token["id"])
    other["added_tokens"].sort(key=lambda token: token["id"])
    message = refusal(router=raw, math=other)
    assert repr(strings[first]) in message or repr(strings[second]) in message


def test_a_string_of_the_model_that_another_replaces_is_refused() -> None:
    place = bpe()["model"]["vocab"]["Ġthe"]
    message = refusal(router=bpe(), math=rename(bpe(), "Ġthe", "Ġder"))
    assert f"id {place} is 'Ġthe' in router but 'Ġder' in expert math" in message


def test_a_hole_in_one_member_is_refused() -> None:
    place = bpe()["model"]["vocab"]["Ġthe"]
    message = refusal(router=bpe(), math=changed(bpe(), lambda raw: raw["model"]["vocab"].pop("Ġthe")))
    assert f"id {place} is 'Ġthe' in router but unused in expert math" in message


def test_a_hole_in_all_members_is_equal() -> None:
    holed = changed(bpe(), lambda raw: raw["model"]["vocab"].update(Ġzz=SIZE + 10))
    assert report(router=holed, math=holed | {"decoder": None}).common == SIZE + 11


def test_more_text_in_the_model_of_an_expert_is_refused() -> None:
    longer = changed(bpe(), lambda raw: raw["model"]["vocab"].update(Ġzz=SIZE))
    assert f"'Ġzz' is id {SIZE} in expert math but unknown to router, which has {SIZE} ids" in refusal(
        router=bpe(), math=longer
    )


def test_a_control_token_at_another_place_of_the_tail_is_refused() -> None:
    message = refusal(router=add(bpe(), "<think>"), math=add(bpe(), "[PAD]", "<think>"))
    assert f"'<think>' is id {SIZE} in router but {SIZE + 1} in expert math" in message


def test_a_replaced_first_token_is_refused() -> None:
    message = refusal(router=bpe(), math=rename(bpe(), "<|endoftext|>", "<|pad|>"))
    assert "id 0 is '<|endoftext|>' in router but '<|pad|>' in expert math" in message


def test_another_kind_of_model_is_refused() -> None:
    assert "router is a BPE tokenizer but expert math is Unigram" in refusal(router=bpe(), math=unigram())


def test_a_router_behind_the_reference_is_not_called_an_expert() -> None:
    message = refusal(collection=bpe(), router=rename(bpe(), "Ġthe", "Ġder"))
    assert "in collection but 'Ġder' in router" in message


def test_the_first_differing_merge_is_named() -> None:
    def swap(raw: Raw) -> None:
        merges = raw["model"]["merges"]
        merges[3], merges[5] = merges[5], merges[3]

    merges = [" ".join(pair) for pair in bpe()["model"]["merges"]]
    message = refusal(router=bpe(), math=changed(bpe(), swap))
    assert f"merge 3 is '{merges[3]}' in router but '{merges[5]}' in expert math" in message


def test_a_missing_merge_is_named() -> None:
    last = len(bpe()["model"]["merges"]) - 1
    message = refusal(router=bpe(), math=changed(bpe(), lambda raw: raw["model"]["merges"].pop()))
    assert f"merge {last} is '" in message
    assert "but missing in expert math" in message


def test_a_differing_unigram_score_is_named() -> None:
    piece, score = unigram()["model"]["vocab"][40]
    other = changed(unigram(), lambda raw: raw["model"]["vocab"].__setitem__(40, [piece, score - 0.5]))
    assert f"the score of '{piece}' (id 40) is {score} in router but {score - 0.5} in expert math" in refusal(
        router=unigram(), math=other
    )


def test_unigram_scores_may_have_fewer_digits() -> None:
    rounded = changed(
        unigram(),
        lambda raw: raw["model"].update(
            vocab=[[piece, float(f"{score:.8g}")] for piece, score in raw["model"]["vocab"]]
        ),
    )
    assert rounded != unigram()
    assert report(router=unigram(), math=rounded).notes == ()


# --- tails cropped


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2), st.integers(1, 5))
def test_tokens_appended_to_one_member_are_cropped(who: int, count: int) -> None:
    members = {name: bpe() for name in ("router", "math", "code")}
    name = list(members)[who]
    members[name] = add(bpe(), *(f"<extra_{i}>" for i in range(count)))
    result = report(**members)
    assert result.common == SIZE
    assert result.sizes[name] == SIZE + count
    assert len(result.notes) == 1
    assert f"{name}: ids from {SIZE} on are cropped ('<extra_0>'" in result.notes[0]


def test_experts_may_append_different_tokens_in_any_order() -> None:
    result = report(router=bpe(), math=add(bpe(), "[PAD]"), code=add(bpe(), "<think>", "[PAD]"))
    assert (result.common, len(result.notes)) == (SIZE, 2)


def test_a_shared_tail_counts_as_common() -> None:
    result = report(router=add(bpe(), "<think>"), math=add(bpe(), "<think>", "[PAD]"))
    assert result.common == SIZE + 1


def test_padding_written_into_the_model_is_cropped() -> None:
    padded = changed(bpe(), lambda raw: raw["model"]["vocab"].update({f"[PAD{SIZE + i}]": SIZE + i for i in range(3)}))
    assert report(router=bpe(), math=padded).common == SIZE


def test_a_renamed_reserved_slot_is_equal() -> None:
    # Llama 3 -> 3.1: one slot got a name and the reserved ones after it moved down.
    older = add(bpe(), "<|reserved_0|>", "<|reserved_1|>", "<|eot_id|>")
    newer = add(bpe(), "<|python_tag|>", "<|reserved_0|>", "<|eot_id|>")
    assert report(router=older, math=newer).common == SIZE + 3


def test_a_router_whose_end_token_is_cropped_is_refused(tmp_path: Path) -> None:
    router = save(tmp_path / "router", add(bpe(), "<end>"), eos_token={"content": "<end>"})
    with pytest.raises(
        FusionRouteError, match=rf"'<end>' \(id {SIZE}\) but expert math shares only the ids below {SIZE}"
    ):
        check_vocabularies({"router": router, "math": save(tmp_path / "math", bpe())})


def test_an_expert_whose_end_token_is_cropped_is_noted(tmp_path: Path) -> None:
    math = save(tmp_path / "math", add(bpe(), "<end>"), eos_token="<end>")
    (note,) = check_vocabularies({"router": save(tmp_path / "router", bpe()), "math": math}).notes
    assert note.endswith("its end token '<end>' is among them")


# --- rules: normalizer, pre-tokenizer, flags


def test_a_pre_tokenizer_that_cuts_elsewhere_is_refused_with_text_and_ids() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    other = bpe() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, bpe()["pre_tokenizer"]]}}
    message = refusal(router=bpe(), math=other)
    assert "becomes [" in message
    assert "in expert math (differing: pre_tokenizer)" in message


def test_a_normalizer_that_changes_text_is_refused() -> None:
    assert "(differing: normalizer)" in refusal(router=bpe(), math=bpe() | {"normalizer": {"type": "NFC"}})


def test_a_flag_of_the_model_that_changes_ids_is_refused() -> None:
    # A word of a probe text that no merge makes: only `ignore_merges` finds it.
    raw = changed(bpe(), lambda raw: raw["model"]["vocab"].update(Ġjumps=SIZE))
    other = changed(raw, lambda raw: raw["model"].update(ignore_merges=True))
    message = refusal(router=raw, math=other)
    assert message.startswith("tokenizers disagree: 'The quick brown fox jumps over the lazy dog.' becomes […, ")
    assert f", {SIZE}, " in message
    assert "(differing: model)" in message


def test_rules_spelled_differently_that_behave_alike_are_noted() -> None:
    other = bpe() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [bpe()["pre_tokenizer"]]}}
    (note,) = report(router=bpe(), math=other).notes
    assert note.startswith("expert math spells pre_tokenizer differently from router; all ")


def test_an_added_token_that_eats_spaces_is_refused() -> None:
    greedy = changed(bpe(), lambda raw: raw["added_tokens"][2].update(lstrip=True, rstrip=True))
    assert "(differing: added_tokens)" in refusal(router=bpe(), math=greedy)


def test_whether_an_added_token_is_special_does_not_matter() -> None:
    plain = changed(bpe(), lambda raw: raw["added_tokens"][2].update(special=False))
    assert report(router=bpe(), math=plain).notes == ()


def test_text_that_spells_a_cropped_token_is_no_disagreement() -> None:
    # A probe text contains "[MASK]"; the pre-tokenizer is spelled differently so that probes run.
    other = add(bpe(), "[MASK]") | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [bpe()["pre_tokenizer"]]}}
    assert report(router=bpe(), math=other).common == SIZE


def test_rules_the_library_cannot_load_name_the_file() -> None:
    message = refusal(router=bpe(), math=bpe() | {"normalizer": {"type": "FromTheFuture"}})
    assert "tokenizer.json cannot be loaded" in message


# --- files


def test_a_missing_file_says_how_to_convert(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match=r"tokenizer\.json is missing: .*AutoTokenizer.*save_pretrained"):
        check_vocabularies({"router": tmp_path})


def test_a_half_written_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(_bpe()[:1000], encoding="utf-8")
    with pytest.raises(FusionRouteError, match=r"tokenizer\.json is not whole JSON"):
        check_vocabularies({"router": tmp_path})


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}'])
def test_another_json_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(FusionRouteError, match=r"tokenizer\.json is not a tokenizer file"):
        check_vocabularies({"router": tmp_path})


def test_a_file_that_contradicts_the_loader_is_refused() -> None:
    wrong = changed(add(bpe(), "[PAD]"), lambda raw: raw["added_tokens"][-1].update(id=SIZE + 5))
    assert f"'[PAD]' as id {SIZE + 5}, but loading it gives id {SIZE}" in refusal(router=wrong)


def test_ids_are_those_of_the_library(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = save(tmp_path, add(bpe(), "<think>", "[PAD]"))
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    assert check_vocabularies({"router": folder}).sizes["router"] == 1 + max(loaded.values())


# --- templates


def test_the_template_is_read_from_the_configuration(tmp_path: Path) -> None:
    assert template_of(save(tmp_path, bpe(), chat_template="{{ messages }}")) == "{{ messages }}"


def test_the_jinja_file_goes_first(tmp_path: Path) -> None:
    save(tmp_path, bpe(), chat_template="old")
    (tmp_path / "chat_template.jinja").write_text("new", encoding="utf-8")
    assert template_of(tmp_path) == "new"


def test_of_named_templates_the_default_counts(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert template_of(save(tmp_path, bpe(), chat_template=named)) == "plain"


def test_no_template_is_none(tmp_path: Path) -> None:
    assert template_of(tmp_path) is None


def test_an_expert_with_another_template_is_noted_and_one_without_is_not(tmp_path: Path) -> None:
    folders = {
        "router": save(tmp_path / "router", bpe(), chat_template="A"),
        "math": save(tmp_path / "math", bpe(), chat_template="B"),
        "code": save(tmp_path / "code", bpe()),
    }
    assert check_vocabularies(folders).notes == ("expert math was trained on another chat template than router's",)


def test_a_last_newline_is_no_other_template(tmp_path: Path) -> None:
    folders = {"router": save(tmp_path / "router", bpe(), chat_template="A"), "math": save(tmp_path / "math", bpe())}
    (folders["math"] / "chat_template.jinja").write_text("A\n", encoding="utf-8")
    assert check_vocabularies(folders).notes == ()


def test_a_template_that_writes_a_cropped_token_is_noted(tmp_path: Path) -> None:
    router = save(tmp_path / "router", add(bpe(), "<think>"), chat_template="{{ '<think>' }}")
    notes = check_vocabularies({"router": router, "math": save(tmp_path / "math", bpe())}).notes
    assert f"the chat template of router writes '<think>' (id {SIZE}), which not all experts know" in notes


# --- files of other versions


@pytest.mark.parametrize("raw", [bpe(), unigram(), add(bpe(), "[PAD]")], ids=["bpe", "unigram", "added"])
def test_a_tokenizer_that_was_loaded_and_saved_is_the_same(tmp_path: Path, raw: Raw) -> None:
    from transformers import PreTrainedTokenizerFast

    before = save(tmp_path / "before", raw)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(before)
    tokenizer(["a"], truncation=True, max_length=4)  # leaves its mark in the file
    tokenizer.save_pretrained(tmp_path / "after")
    assert (before / "tokenizer.json").read_bytes() != (tmp_path / "after" / "tokenizer.json").read_bytes()
    result = check_vocabularies({"router": before, "math": tmp_path / "after"})
    assert (result.common, result.notes) == (result.sizes["router"], ())


def _age(raw: Raw) -> None:
    """Write the file as early versions of the library did."""
    for key in ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "type"):
        del raw["model"][key]
    del raw["pre_tokenizer"]["use_regex"]
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]


def test_a_file_of_an_early_version_is_the_same() -> None:
    result = report(router=bpe(), math=changed(bpe(), _age))
    assert (result.common, result.notes) == (SIZE, ())


def test_a_metaspace_of_an_early_version_is_the_same() -> None:
    old = unigram() | {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}}
    assert report(router=unigram(), math=old).notes == ()


# --- weight


def test_the_module_imports_nothing_heavy() -> None:
    code = "import sys, fusionroute.vocabulary; print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_large_shuffled_vocabulary_needs_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Building a tokenizer of 150 000 ids takes a second; equal rules must not pay for it.
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    other = bpe()
    items = list(other["model"]["vocab"].items())
    random.Random(0).shuffle(items)
    other["model"]["vocab"] = dict(items)
    folders = {"router": save(tmp_path / "router", bpe()), "math": save(tmp_path / "math", other)}
    assert check_vocabularies(folders).common == SIZE
