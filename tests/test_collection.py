"""Collections on disk: found, put together, saved, pushed; what is refused, and before what."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusionroute import collection, tiny, weights
from fusionroute.configuration import MemberSpec
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.modeling import FusionRouteForCausalLM
from fusionroute.router import HEAD_FILE

IDS = torch.tensor([[5, 9, 250, 17, 33, 4, 4, 90, 12, 200]])
WHOLE = ["llama", "gemma2", "qwen2", "mixed"]


def logits(model: FusionRouteForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def digests(folder: Path) -> dict[str, str]:
    """Relative path to content hash, of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def copy(make_collection: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of a collection, to be damaged; its references still point at the shared members."""

    def make(shape: str) -> Path:
        return Path(shutil.copytree(make_collection(shape), tmp_path / f"copy_{shape}"))

    return make


@pytest.fixture
def embedded(load: Callable[[str], FusionRouteForCausalLM], tmp_path: Path) -> Callable[[str], Path]:
    """A private collection with all its members inside, to be damaged."""

    def make(shape: str) -> Path:
        load(shape).save_pretrained(tmp_path / f"embedded_{shape}", embed=True)
        return tmp_path / f"embedded_{shape}"

    return make


@pytest.fixture
def models(tmp_path: Path) -> Callable[..., Path]:
    """Makes a tiny model folder with its tokenizer."""

    def make(name: str, *, vocab_size: int = 320, eos: str = "<|im_end|>", **settings: Any) -> Path:
        tokenizer = tiny.make_tokenizer(tmp_path / name, vocab_size=vocab_size, eos=eos)
        tiny.make_model(tmp_path / name, vocab_size=len(tokenizer), width=16, **settings)
        return tmp_path / name

    return make


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


def test_without_a_head_the_first_expert_writes_everything(models: Callable[..., Path], tmp_path: Path) -> None:
    members = [MemberSpec(n, str(models(n, seed=i))) for i, n in enumerate(("router", "math", "code"))]
    config = collection.assemble(tmp_path / "out", members[0], members[1:])
    assert not config.head_trained
    assert FusionRouteForCausalLM.from_pretrained(tmp_path / "out")(IDS).routes.eq(0).all()


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


# ---- saving


@pytest.mark.parametrize("embed", [False, True], ids=["referenced", "embedded"])
def test_saved_collection_gives_the_same_logits_bit_for_bit(
    load: Callable[[str], FusionRouteForCausalLM], shape: str, embed: bool, tmp_path: Path
) -> None:
    load(shape).save_pretrained(tmp_path / "out", embed=embed)
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(tmp_path / "out")), logits(load(shape)))


@pytest.mark.parametrize("embed", [False, True], ids=["referenced", "embedded"])
def test_twice_saved_collection_gives_the_same_logits(
    load: Callable[[str], FusionRouteForCausalLM], embed: bool, tmp_path: Path
) -> None:
    load("mixed").save_pretrained(tmp_path / "once", embed=True)
    FusionRouteForCausalLM.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice", embed=embed)
    shutil.rmtree(tmp_path / "once")
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(tmp_path / "twice")), logits(load("mixed")))


@pytest.mark.parametrize("shape", ["mixed", "adapters", "llama"])
def test_embedded_collection_needs_nothing_else(
    embedded: Callable[[str], Path], shape: str, load: Callable[[str], FusionRouteForCausalLM], tmp_path: Path
) -> None:
    folder = embedded(shape)
    assert [
        m["source"] for m in [config_of(folder)["router"], *config_of(folder)["experts"]] if m["source"][0] != "."
    ] == []
    moved = folder.rename(tmp_path / "moved")
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(moved)), logits(load(shape)))


def test_saving_keeps_the_order_of_experts(
    load: Callable[[str], FusionRouteForCausalLM], shape: str, tmp_path: Path
) -> None:
    load(shape).save_pretrained(tmp_path / "out")
    assert [e["name"] for e in config_of(tmp_path / "out")["experts"]] == load(shape).config.expert_names


@pytest.mark.parametrize("shape", ["adapters", "bare"])
def test_referenced_adapters_are_saved_without_their_base(
    load: Callable[[str], FusionRouteForCausalLM], shape: str, tmp_path: Path
) -> None:
    load(shape).save_pretrained(tmp_path / "out")
    weights = {path.name for path in (tmp_path / "out").rglob("*.safetensors")}
    assert weights == {"adapter_model.safetensors", HEAD_FILE}


@pytest.mark.parametrize(("shape", "bases"), [("adapters", 1), ("bare", 1), ("two_bases", 2)])
def test_embedded_base_of_several_members_is_on_disk_once(
    embedded: Callable[[str], Path], shape: str, bases: int
) -> None:
    assert len(list(embedded(shape).rglob("model.safetensors"))) == bases


def test_embedded_model_of_two_experts_is_on_disk_once(models: Callable[..., Path], tmp_path: Path) -> None:
    router, model = str(models("router")), str(models("model", seed=1))
    experts = [MemberSpec("math", model), MemberSpec("code", model)]
    collection.assemble(tmp_path / "out", MemberSpec("router", router), experts)
    FusionRouteForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "embedded", embed=True)
    assert len(list((tmp_path / "embedded").rglob("model.safetensors"))) == 2


@pytest.mark.parametrize("shape", ["llama", "adapters"])
def test_tied_tensors_are_on_disk_once(embedded: Callable[[str], Path], shape: str) -> None:
    for path in embedded(shape).rglob("model.safetensors"):
        with safe_open(path, "pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_experts_files_are_copied_bit_for_bit(
    embedded: Callable[[str], Path], make_collection: Callable[[str], Path]
) -> None:
    folder, original = embedded("mixed"), config_of(make_collection("mixed"))["experts"][0]["source"]
    copied = (folder / "expert_math" / "model.safetensors").read_bytes()
    assert copied == (Path(original) / "model.safetensors").read_bytes()


def test_router_adapter_and_head_are_saved_as_they_are_in_memory(
    make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("adapters"))
    with torch.no_grad():
        model.router.route_head.weight.mul_(-1)
        for name, parameter in model.router.member.model.named_parameters():
            if "lora_B.router" in name:
                parameter.mul_(2)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_saving_a_changed_router_adapter_leaves_the_experts(
    make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("adapters"))
    with torch.no_grad():
        for name, parameter in model.router.member.model.named_parameters():
            if "lora_B.router" in name:
                parameter.mul_(2)
    model.save_pretrained(tmp_path / "out")
    assert digests(tmp_path / "out" / "expert_math") == digests(make_collection("adapters") / "expert_math")


def test_embedded_whole_router_is_saved_as_it_is_in_memory(
    make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("llama"))
    with torch.no_grad():
        model.router.member.model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "out", embed=True)
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_referenced_whole_router_that_was_changed_is_not_lost_in_silence(
    make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    """Either it is written, or saving without `embed` is refused."""
    model = FusionRouteForCausalLM.from_pretrained(make_collection("llama"))
    with torch.no_grad():
        model.router.member.model.model.norm.weight.mul_(1.5)
    try:
        model.save_pretrained(tmp_path / "out")
    except FusionRouteError:
        return
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("shape", ["llama", "adapters", "mixed"])
def test_collection_loaded_in_bfloat16_can_be_saved_and_loaded(
    make_collection: Callable[[str], Path], shape: str, tmp_path: Path
) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection(shape), dtype="bfloat16")
    model.save_pretrained(tmp_path / "out", embed=True)
    again = FusionRouteForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    assert torch.equal(logits(again), logits(model))


def test_collection_loaded_on_another_base_can_be_saved_embedded(
    make_collection: Callable[[str], Path], copy: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(config_of(make_collection("adapters"))["router"]["source"])
    other = Path(shutil.copytree(source, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({k: v * 1.01 for k, v in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="digest"):
        model = FusionRouteForCausalLM.from_pretrained(make_collection("adapters"), base=str(other))
    model.save_pretrained(tmp_path / "out", embed=True)
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_saving_leaves_the_model_as_it_was(load: Callable[[str], FusionRouteForCausalLM], tmp_path: Path) -> None:
    before = load("mixed").config.to_dict()
    load("mixed").save_pretrained(tmp_path / "out", embed=True)
    assert load("mixed").config.to_dict() == before


def test_saving_keeps_tokenizer_and_generation_config(
    load: Callable[[str], FusionRouteForCausalLM], make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    load("mixed").save_pretrained(tmp_path / "out")
    before, after = digests(make_collection("mixed")), digests(tmp_path / "out")
    kept = [name for name in before if "/" not in name and name not in ("config.json", "README.md")]
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}


def test_folder_with_something_in_it_is_not_written_to(
    load: Callable[[str], FusionRouteForCausalLM], tmp_path: Path, refuses: Callable
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with refuses(FusionRouteError, tmp_path / "out"):
        load("adapters").save_pretrained(tmp_path / "out")
    assert digests(tmp_path / "out").keys() == {"notes.txt"}


def test_empty_folder_is_written_to(load: Callable[[str], FusionRouteForCausalLM], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    load("adapters").save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=["disk full", "not allowed"])
def test_failed_save_leaves_nothing_and_says_why(
    load: Callable[[str], FusionRouteForCausalLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    refuses: Callable,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, "as if")

    # The last thing a save writes.
    monkeypatch.setattr("fusionroute.card.write_card", fail)
    with refuses(FusionRouteError, tmp_path / "out"):
        load("mixed").save_pretrained(tmp_path / "out", embed=True)
    assert list(tmp_path.iterdir()) == []


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


# ---- pushing


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the Hub, which there is none of here: records what is asked of it and the files it is given."""
    seen = SimpleNamespace(calls=[], files={})

    class Recorder:
        def __init__(self, **kwargs: Any) -> None:
            seen.calls.append(("HfApi", kwargs))

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            seen.calls.append(("create_repo", repo_id, kwargs))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, folder_path: Any, repo_id: str, **kwargs: Any) -> None:
            seen.calls.append(("upload_folder", repo_id, kwargs))
            folder = Path(folder_path)
            seen.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    monkeypatch.setattr("huggingface_hub.HfApi", Recorder)
    return seen


def test_push_of_local_members_is_refused_before_any_network(
    load: Callable[[str], FusionRouteForCausalLM], hub: SimpleNamespace, refuses: Callable
) -> None:
    with refuses(UsageError, "router", "math", "code", "general", "embed=True"):
        load("mixed").push_to_hub("me/mixed")
    assert hub.calls == []


def test_push_names_only_the_local_members(load: Callable[[str], FusionRouteForCausalLM], hub: SimpleNamespace) -> None:
    config = type(load("llama").config).from_dict(load("llama").config.to_dict())
    config.experts[0]["source"] = "org/math"
    assert [text.split(" ")[0] for text in collection.local_references(config)] == ["router", "code"]


def test_local_adapter_is_a_local_reference(load: Callable[[str], FusionRouteForCausalLM]) -> None:
    config = type(load("adapters").config).from_dict(load("adapters").config.to_dict())
    for member in [config.router, *config.experts]:
        member["source"] = "org/base"
    config.experts[0]["adapter"] = "/somewhere/adapter"
    assert [text.split(" ")[0] for text in collection.local_references(config)] == ["math"]


@pytest.mark.parametrize("shape", ["llama", "adapters", "mixed"])
def test_embedded_push_uploads_a_whole_collection(
    load: Callable[[str], FusionRouteForCausalLM], hub: SimpleNamespace, shape: str, tmp_path: Path
) -> None:
    load(shape).push_to_hub("me/collection", embed=True)
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(tmp_path)), logits(load(shape)))


@pytest.mark.parametrize("shape", ["llama", "adapters", "mixed"])
def test_embedded_push_tells_no_path_of_this_machine(
    load: Callable[[str], FusionRouteForCausalLM],
    make_collection: Callable[[str], Path],
    hub: SimpleNamespace,
    shape: str,
) -> None:
    load(shape).push_to_hub("me/collection", embed=True)
    secret = str(make_collection(shape).parent).encode()
    assert [name for name, content in hub.files.items() if secret in content] == []


def test_pushed_adapter_does_not_tell_where_its_base_lay(
    models: Callable[..., Path], tmp_path: Path, hub: SimpleNamespace
) -> None:
    base, adapter = models("base"), tmp_path / "adapter"
    tiny.make_adapter(adapter, tiny.make_model(base, width=16))
    # As PEFT writes it for a base that was loaded from a folder.
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    expert = MemberSpec("math", str(base), adapter=str(adapter))
    collection.assemble(tmp_path / "out", MemberSpec("router", str(base)), [expert])
    FusionRouteForCausalLM.from_pretrained(tmp_path / "out").push_to_hub("me/collection", embed=True)
    assert [name for name, content in hub.files.items() if str(base).encode() in content] == []


def test_push_passes_on_privacy_token_and_message(
    load: Callable[[str], FusionRouteForCausalLM], hub: SimpleNamespace
) -> None:
    load("adapters").push_to_hub("me/x", embed=True, private=True, token="hf_x", commit_message="first")
    assert [call[0] for call in hub.calls] == ["HfApi", "create_repo", "upload_folder"]
    assert hub.calls[0][1]["token"] == "hf_x"
    assert hub.calls[1][2]["private"] is True
    assert hub.calls[2][2]["commit_message"] == "first"


def test_save_and_push_in_one_call(
    load: Callable[[str], FusionRouteForCausalLM], hub: SimpleNamespace, tmp_path: Path
) -> None:
    load("mixed").save_pretrained(tmp_path / "out", embed=True, push_to_hub=True, repo_id="me/mixed")
    assert {name: hashlib.sha256(content).hexdigest() for name, content in hub.files.items()} == digests(
        tmp_path / "out"
    )


def test_save_and_push_of_local_members_writes_nothing(
    load: Callable[[str], FusionRouteForCausalLM], hub: SimpleNamespace, tmp_path: Path, refuses: Callable
) -> None:
    with refuses(UsageError, "math"):
        load("mixed").save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/mixed")
    assert (hub.calls, list(tmp_path.iterdir())) == ([], [])


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
