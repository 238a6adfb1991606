"""Collections on disk: found, read, put together; what is refused, and before what."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from fusionroute import collection, sources, tiny, weights
from fusionroute.configuration import MemberSpec
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.modeling import FusionRouteForCausalLM
from fusionroute.router import HEAD_FILE, RouteHead
from on_disk import IDS, config_of, digests, logits, rewrite

# ---- finding and reading one


def test_a_collection_is_found_by_its_path(make_collection: Callable[[str], Path]) -> None:
    assert collection.locate(make_collection("llama")) == make_collection("llama").resolve()


@pytest.mark.parametrize("name", ["no_such", "./a/b", "/a/b", "a/b/c", ""])
def test_unknown_collection_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FusionRouteError) as caught:
        collection.locate(name)
    assert "\n" not in str(caught.value)


def test_folder_without_config_is_refused(tmp_path: Path, refuses: Callable) -> None:
    with refuses(FusionRouteError, tmp_path / "config.json"):
        collection.locate(tmp_path)


def test_half_written_config_is_refused(copy: Callable[[str], Path], refuses: Callable) -> None:
    path = copy("adapters") / "config.json"
    path.write_text(path.read_text()[:200])
    with refuses(FusionRouteError, path):
        FusionRouteForCausalLM.from_pretrained(path.parent)


def test_another_model_type_is_refused(models: Callable[..., Path], refuses: Callable) -> None:
    with refuses(FusionRouteError, "'llama'", "'fusionroute'"):
        FusionRouteForCausalLM.from_pretrained(models("plain"))


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "{}"])
def test_config_that_is_no_object_of_ours_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FusionRouteError):
        collection.read_config(tmp_path)


@pytest.mark.parametrize("experts", [[], None])
def test_collection_without_experts_is_refused(copy: Callable[[str], Path], experts: Any) -> None:
    folder = copy("adapters")
    rewrite(folder, lambda config: config.update(experts=experts))
    with pytest.raises(FusionRouteError):
        FusionRouteForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("experts", [{"math": {"name": "math", "source": "x"}}, ["math"], [{"name": 5, "source": "x"}]])
def test_experts_in_another_form_are_refused(copy: Callable[[str], Path], experts: Any, refuses: Callable) -> None:
    folder = copy("llama")
    rewrite(folder, lambda config: config.update(experts=experts))
    with refuses(FusionRouteError, "config.json"):
        collection.read_config(folder)


def test_missing_generation_config_is_refused(copy: Callable[[str], Path], refuses: Callable) -> None:
    folder = copy("llama")
    (folder / "generation_config.json").unlink()
    with refuses(FusionRouteError, folder / "generation_config.json"):
        FusionRouteForCausalLM.from_pretrained(folder)


def test_experts_in_another_order_than_the_head_are_refused(copy: Callable[[str], Path], refuses: Callable) -> None:
    folder = copy("mixed")
    rewrite(folder, lambda config: config["experts"].reverse())
    with refuses(FusionRouteError, folder / "router" / HEAD_FILE, "math, code, general", "general, code, math"):
        FusionRouteForCausalLM.from_pretrained(folder)


def test_missing_head_is_refused(copy: Callable[[str], Path], refuses: Callable) -> None:
    folder = copy("adapters")
    (folder / "router" / HEAD_FILE).unlink()
    with refuses(FusionRouteError, folder / "router" / HEAD_FILE):
        FusionRouteForCausalLM.from_pretrained(folder)


def test_half_written_head_is_refused(copy: Callable[[str], Path], refuses: Callable) -> None:
    path = copy("adapters") / "router" / HEAD_FILE
    path.write_bytes(path.read_bytes()[:-7])
    with refuses(FusionRouteError, path):
        FusionRouteForCausalLM.from_pretrained(path.parents[1])


@pytest.mark.parametrize(("shape", "member"), [("llama", "expert_math"), ("llama", "router"), ("adapters", "base")])
def test_missing_weights_are_refused(
    embedded: Callable[[str], Path], shape: str, member: str, refuses: Callable
) -> None:
    folder = embedded(shape)
    (folder / member / "model.safetensors").unlink()
    with refuses(FusionRouteError, folder / member):
        FusionRouteForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "adapter_model.safetensors"])
def test_half_written_weights_are_refused(embedded: Callable[[str], Path], file: str, refuses: Callable) -> None:
    path = next(iter(sorted(embedded("adapters").rglob(file))))
    path.write_bytes(path.read_bytes()[:-1])
    with refuses(FusionRouteError, path):
        FusionRouteForCausalLM.from_pretrained(path.parents[1])


@pytest.mark.parametrize(
    ("shape", "file"),
    [("llama", "expert_math/model.safetensors"), ("adapters", "expert_math/adapter_model.safetensors")],
)
@pytest.mark.parametrize("digested", [True, False], ids=["digested", "without digests"])
def test_removed_weight_is_never_made_up(
    embedded: Callable[[str], Path], shape: str, file: str, digested: bool
) -> None:
    folder = embedded(shape)
    tensors = load_file(folder / file)
    save_file(dict(sorted(tensors.items())[1:]), folder / file, {"format": "pt"})
    if not digested:
        rewrite(folder, lambda config: [m.update(digest=None, adapter_digest=None) for m in config["experts"]] and None)
    with pytest.raises(FusionRouteError) as caught:
        FusionRouteForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert "math" in str(caught.value)


def test_wrong_digest_is_refused(copy: Callable[[str], Path], refuses: Callable) -> None:
    folder = copy("llama")
    found = config_of(folder)["experts"][1]["digest"]
    rewrite(folder, lambda config: config["experts"][1].update(digest="sha256:" + "0" * 64))
    with refuses(FusionRouteError, "code", found, "sha256:" + "0" * 64):
        FusionRouteForCausalLM.from_pretrained(folder)


def test_tokenizers_that_disagree_are_refused_before_any_weight_is_loaded(
    embedded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, refuses: Callable
) -> None:
    monkeypatch.setattr("fusionroute.members.load_model", lambda *_: pytest.fail("a weight was loaded"))
    folder = embedded("llama")
    path = folder / "expert_code" / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(raw))
    with refuses(FusionRouteError, "code"):
        FusionRouteForCausalLM.from_pretrained(folder)


# ---- putting one together


def test_members_that_disagree_are_not_put_together(models: Callable[..., Path], tmp_path: Path) -> None:
    router, math = models("router"), models("math", seed=1)
    raw = json.loads((math / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (math / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(FusionRouteError, match="math"):
        collection.assemble(tmp_path / "out", MemberSpec("router", str(router)), [MemberSpec("math", str(math))])
    assert not (tmp_path / "out").exists()


def test_padded_vocabularies_are_cropped_to_the_tokenizers(make_collection: Callable[[str], Path]) -> None:
    tokenizer = collection.load_tokenizer(make_collection("qwen2"))
    assert config_of(make_collection("qwen2"))["vocab_size"] == len(tokenizer)


def test_order_of_experts_is_as_given(make_collection: Callable[[str], Path]) -> None:
    assert [e["name"] for e in config_of(make_collection("mixed"))["experts"]] == ["math", "code", "general"]


def test_collection_ends_at_every_members_end_id(models: Callable[..., Path], tmp_path: Path) -> None:
    router, math = models("router"), models("math", seed=1)
    (math / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    config = collection.assemble(tmp_path / "out", MemberSpec("router", str(router)), [MemberSpec("math", str(math))])
    assert config.eos_token_id == [1, 2]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]


def test_generation_config_that_contradicts_itself_is_kept(models: Callable[..., Path], tmp_path: Path) -> None:
    """transformers refuses to save such a one, and published models have them."""
    router, math = models("router"), models("math", seed=1)
    (router / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    collection.assemble(tmp_path / "out", MemberSpec("router", str(router)), [MemberSpec("math", str(math))])
    FusionRouteForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    for name in ("out", "again"):
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["temperature"] == 0.6


def test_padding_token_that_experts_do_not_know_is_not_used(models: Callable[..., Path], tmp_path: Path) -> None:
    """Fine-tunes append one, and an id that not all members share is refused."""
    router, math = models("router"), models("math", seed=1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(router)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(router)
    config = collection.assemble(tmp_path / "out", MemberSpec("router", str(router)), [MemberSpec("math", str(math))])
    assert (config.vocab_size, config.pad_token_id) == (320, None)
    batch = collection.load_tokenizer(tmp_path / "out")(["a", "a b c d"], padding=True, return_tensors="pt")
    output = FusionRouteForCausalLM.from_pretrained(tmp_path / "out")(
        batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    assert output.logits.shape[:2] == batch["input_ids"].shape


def test_unknown_architecture_is_refused(models: Callable[..., Path], tmp_path: Path, refuses: Callable) -> None:
    router, math = models("router"), models("math", seed=1)
    rewrite(math, lambda config: config.update(model_type="no_such_model"))
    with refuses(FusionRouteError, math / "config.json", "no_such_model"):
        collection.assemble(tmp_path / "out", MemberSpec("router", str(router)), [MemberSpec("math", str(math))])
    assert not (tmp_path / "out").exists()


def test_gguf_file_is_referred_to_and_not_what_it_was_converted_to(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is in a cache."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    converted = models("converted")
    monkeypatch.setattr(sources, "resolve", lambda *_, **__: converted)
    monkeypatch.chdir(tmp_path)
    config = collection.assemble(
        tmp_path / "out", MemberSpec("router", "./m.gguf"), [MemberSpec("math", str(tmp_path / "m.gguf"))]
    )
    assert {spec.source for spec in config.member_specs} == {str(tmp_path / "m.gguf")}


def test_without_a_head_the_first_expert_writes_everything(models: Callable[..., Path], tmp_path: Path) -> None:
    members = [MemberSpec(n, str(models(n, seed=i))) for i, n in enumerate(("router", "math", "code"))]
    config = collection.assemble(tmp_path / "out", members[0], members[1:])
    assert not config.head_trained
    assert FusionRouteForCausalLM.from_pretrained(tmp_path / "out")(IDS).routes.eq(0).all()


def test_head_that_says_it_is_untrained_is_believed(models: Callable[..., Path], tmp_path: Path) -> None:
    members = [MemberSpec(n, str(models(n, seed=i))) for i, n in enumerate(("router", "math"))]
    RouteHead(16, ["math"]).save(tmp_path)
    config = collection.assemble(tmp_path / "out", members[0], members[1:], head=tmp_path)
    assert not config.head_trained


def test_alpha_is_kept(models: Callable[..., Path], tmp_path: Path) -> None:
    members = [MemberSpec(n, str(models(n, seed=i))) for i, n in enumerate(("router", "math"))]
    collection.assemble(tmp_path / "out", members[0], members[1:], alpha=0.5)
    assert FusionRouteForCausalLM.from_pretrained(tmp_path / "out").config.alpha == 0.5


def test_named_members_are_copied_in(models: Callable[..., Path], tmp_path: Path) -> None:
    members = [MemberSpec(n, str(models(n, seed=i))) for i, n in enumerate(("router", "math", "code"))]
    collection.assemble(tmp_path / "out", members[0], members[1:], embed=["math"])
    before = logits(FusionRouteForCausalLM.from_pretrained(tmp_path / "out"))
    shutil.rmtree(tmp_path / "math")
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(tmp_path / "out")), before)


def test_embedding_a_member_that_is_not_there_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    members = [MemberSpec(n, str(models(n))) for n in ("router", "math")]
    with pytest.raises(FusionRouteError, match="maths"):
        collection.assemble(tmp_path / "out", members[0], members[1:], embed=["maths"])


@pytest.mark.parametrize("written", ["./{}", "{}"])
def test_relative_reference_to_a_model_is_read_from_anywhere(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    models("router"), models("math", seed=1)
    monkeypatch.chdir(tmp_path)
    members = [MemberSpec(n, written.format(n)) for n in ("router", "math")]
    collection.assemble(tmp_path / "out", members[0], members[1:])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    FusionRouteForCausalLM.from_pretrained(tmp_path / "out")


def test_relative_reference_to_the_base_of_an_adapter_is_read_from_anywhere(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = models("base")
    for seed, name in enumerate(("router", "math")):
        tiny.make_adapter(tmp_path / f"adapter_{name}", tiny.make_model(base, width=16), seed=seed)
    monkeypatch.chdir(tmp_path)
    members = [MemberSpec(n, "./base", adapter=f"./adapter_{n}") for n in ("router", "math")]
    collection.assemble(tmp_path / "out", members[0], members[1:])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    FusionRouteForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("names", [["router"], ["math", "math"], ["math", "router"]])
def test_members_without_names_of_their_own_are_refused(
    models: Callable[..., Path], tmp_path: Path, names: list[str]
) -> None:
    source = str(models("model"))
    router, *experts = [MemberSpec("router", source), *(MemberSpec(name, source) for name in names)]
    with pytest.raises(FusionRouteError):
        collection.assemble(tmp_path / "out", router, experts)
    assert not (tmp_path / "out").exists()


def test_collection_of_no_experts_is_refused(models: Callable[..., Path], tmp_path: Path, refuses: Callable) -> None:
    with refuses(UsageError, "expert"):
        collection.assemble(tmp_path / "out", MemberSpec("router", str(models("model"))), [])


def test_adapter_in_one_folder_with_a_model_is_taken_by_itself(models: Callable[..., Path], tmp_path: Path) -> None:
    """Its digest is its own, or the collection could not be loaded."""
    base, adapter = models("base"), tmp_path / "adapter"
    tiny.make_adapter(adapter, tiny.make_model(base, width=16))
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base / name, adapter / name)
    expert = MemberSpec("math", str(base), adapter=str(adapter))
    collection.assemble(tmp_path / "out", MemberSpec("router", str(base)), [expert])
    FusionRouteForCausalLM.from_pretrained(tmp_path / "out")


def test_adapter_trained_on_another_base_is_refused(
    models: Callable[..., Path], tmp_path: Path, refuses: Callable
) -> None:
    base, adapter = models("base"), tmp_path / "adapter"
    tiny.make_adapter(adapter, tiny.make_model(base, width=16))
    (adapter / "provenance.json").write_text(json.dumps({"base_digest": "sha256:" + "0" * 64}))
    with refuses(FusionRouteError, "math", "sha256:" + "0" * 64, weights.digest(base)):
        collection.assemble(
            tmp_path / "out",
            MemberSpec("router", str(base)),
            [MemberSpec("math", str(base), adapter=str(adapter))],
        )


def test_head_of_other_experts_is_not_put_in(
    models: Callable[..., Path], make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    """Such a collection could not be loaded."""
    members = [MemberSpec(n, str(models(n))) for n in ("router", "math")]
    with pytest.raises(FusionRouteError, match="math, code"):
        collection.assemble(tmp_path / "out", members[0], members[1:], head=make_collection("llama") / "router")


def test_failed_assembly_leaves_nothing(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [MemberSpec(n, str(models(n))) for n in ("router", "math")]
    before = digests(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("as if")

    monkeypatch.setattr("fusionroute.card.write_card", fail)
    with pytest.raises(RuntimeError):
        collection.assemble(tmp_path / "out", members[0], members[1:], embed=["math"])
    assert digests(tmp_path) == before


# ---- the tokenizer and the rendering


def test_tokenizer_pads_on_the_left(make_collection: Callable[[str], Path]) -> None:
    tokenizer = collection.load_tokenizer(make_collection("llama"))
    assert tokenizer.padding_side == "left"
    assert tokenizer(["a", "a b c d"], padding=True)["attention_mask"][0][0] == 0


def test_conversation_is_rendered_up_to_the_answer(make_collection: Callable[[str], Path]) -> None:
    tokenizer = collection.load_tokenizer(make_collection("llama"))
    ids = collection.encode_chat(tokenizer, [{"role": "user", "content": "How many cows?"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nHow many cows?<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template_the_message_is_taken_as_it_is(make_collection: Callable[[str], Path]) -> None:
    tokenizer = collection.load_tokenizer(make_collection("llama"))
    tokenizer.chat_template = None
    ids = collection.encode_chat(tokenizer, [{"role": "user", "content": "How many cows?"}])
    assert tokenizer.decode(ids) == "How many cows?"


def test_without_a_template_tools_are_not_dropped_in_silence(
    make_collection: Callable[[str], Path], refuses: Callable
) -> None:
    tokenizer = collection.load_tokenizer(make_collection("llama"))
    tokenizer.chat_template = None
    with refuses(UsageError, "tools"):
        collection.encode_chat(tokenizer, [{"role": "user", "content": "How many cows?"}], [{"type": "function"}])


def test_conversation_of_no_messages_is_refused(make_collection: Callable[[str], Path], refuses: Callable) -> None:
    tokenizer = collection.load_tokenizer(make_collection("llama"))
    with refuses(UsageError, "at least one message"):
        collection.encode_chat(tokenizer, [])
