"""Collections saved and pushed: the same logits, nothing twice, nothing of this machine."""

import errno
import hashlib
import json
import os
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
from fusionroute.hub import local_references
from fusionroute.modeling import FusionRouteForCausalLM
from fusionroute.router import HEAD_FILE
from on_disk import config_of, digests, logits, rewrite


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


def test_reference_that_starts_at_the_collection_is_read_from_another_place(
    copy: Callable[[str], Path], load: Callable[[str], FusionRouteForCausalLM], tmp_path: Path
) -> None:
    folder, out = copy("llama"), tmp_path / "deep" / "er" / "out"
    source = os.path.relpath(config_of(folder)["experts"][0]["source"], folder)
    rewrite(folder, lambda config: config["experts"][0].update(source=source))
    FusionRouteForCausalLM.from_pretrained(folder).save_pretrained(out)
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(out)), logits(load("llama")))


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


def test_changed_router_whose_weights_an_expert_shares_is_not_lost_in_silence(
    models: Callable[..., Path], tmp_path: Path, refuses: Callable
) -> None:
    source = str(models("model"))
    collection.assemble(tmp_path / "out", MemberSpec("router", source), [MemberSpec("math", source)])
    model = FusionRouteForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.router.member.model.model.norm.weight.mul_(1.5)
    with refuses(UsageError, "math", source):
        model.save_pretrained(tmp_path / "again", embed=True)


@pytest.mark.parametrize("trained", [True, False])
def test_config_says_of_the_head_what_its_file_does(
    make_collection: Callable[[str], Path], tmp_path: Path, trained: bool
) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("adapters"))
    model.router.route_head.trained = trained
    model.save_pretrained(tmp_path / "out")
    assert collection.read_config(tmp_path / "out").head_trained is trained


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
    assert [text.split(" ")[0] for text in local_references(config)] == ["router", "code"]


@pytest.mark.parametrize(("source", "local"), [("./expert_math", []), ("./../math", ["math"]), (".", ["math"])])
def test_path_out_of_the_collection_is_a_local_reference(
    load: Callable[[str], FusionRouteForCausalLM], source: str, local: list[str]
) -> None:
    config = type(load("llama").config).from_dict(load("llama").config.to_dict())
    for member in [config.router, *config.experts]:
        member["source"] = "org/base"
    config.experts[0]["source"] = source
    assert [text.split(" ")[0] for text in local_references(config)] == local


def test_push_to_another_branch_is_not_one_to_the_main_branch(
    load: Callable[[str], FusionRouteForCausalLM], hub: SimpleNamespace
) -> None:
    with pytest.raises(TypeError, match="revision"):
        load("adapters").push_to_hub("me/x", embed=True, revision="dev")
    assert hub.calls == []


def test_local_adapter_is_a_local_reference(load: Callable[[str], FusionRouteForCausalLM]) -> None:
    config = type(load("adapters").config).from_dict(load("adapters").config.to_dict())
    for member in [config.router, *config.experts]:
        member["source"] = "org/base"
    config.experts[0]["adapter"] = "/somewhere/adapter"
    assert [text.split(" ")[0] for text in local_references(config)] == ["math"]


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


def test_pushed_provenance_does_not_tell_where_the_base_lay(
    models: Callable[..., Path], tmp_path: Path, hub: SimpleNamespace
) -> None:
    base, adapter = models("base"), tmp_path / "adapter"
    tiny.make_adapter(adapter, tiny.make_model(base, width=16))
    # As training writes it.
    provenance = {"base": str(base), "base_digest": weights.digest(base)}
    (adapter / "provenance.json").write_text(json.dumps(provenance))
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
