import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fusionroute import collection, inspection, tiny
from fusionroute.configuration import FusionRouteConfig, MemberSpec
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.inspection import inspect_collection, render
from fusionroute.modeling import FusionRouteForCausalLM

Make = Callable[[str], Path]
SHAPES = pytest.mark.parametrize("shape", ["adapters", "llama", "mixed"])


def members(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {member["name"]: member for member in report["members"]}


def copy(folder: Path, out: Path, edit: Callable[[dict[str, Any]], None] = lambda config: None) -> Path:
    """A copy of a collection whose config.json was edited by hand."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    edit(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


def with_own_math(folder: Path, out: Path) -> tuple[Path, Path]:
    """A copy of a collection whose expert `math` has a model folder of its own, to be tampered with."""
    model = out / "math"
    shutil.copytree(collection.read_config(folder).expert_specs[0].source, model)
    return copy(folder, out / "c", lambda config: config["experts"][0].update(source=str(model))), model


def make_plain(root: Path, **options: Any) -> Path:
    """A collection of one base as router and as its only expert, with an untrained head."""
    tiny.make_tokenizer(root / "base")
    tiny.make_model(root / "base", **options)
    source = str(root / "base")
    collection.assemble(root / "made", MemberSpec("router", source), [MemberSpec("math", source)])
    return root / "made"


def cache_bytes(model: FusionRouteForCausalLM, tokens: int) -> dict[str, int]:
    """Bytes of the tensors that a real forward leaves in each member's cache."""
    ids = torch.arange(tokens).unsqueeze(0) % 300
    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    assert cache is not None
    return {
        name: sum(layer.keys.nbytes + layer.values.nbytes for layer in member.layers)
        for name, member in cache.members.items()
    }


# ---- numbers


@SHAPES
def test_parameters_are_those_of_the_loaded_model(shape: str, make_collection: Make) -> None:
    from transformers import AutoModelForCausalLM

    for member in inspect_collection(make_collection(shape))["members"]:
        model = AutoModelForCausalLM.from_pretrained(member["source"])
        assert member["parameters"] == sum(p.numel() for p in model.parameters())


@SHAPES
def test_adapter_parameters_are_those_peft_adds(shape: str, make_collection: Make) -> None:
    folder = make_collection(shape)
    found = members(inspect_collection(folder))
    for member in FusionRouteForCausalLM.from_pretrained(folder).members:
        own = [p.numel() for name, p in member.model.named_parameters() if f".{member.name}." in name]
        assert found[member.name]["adapter_parameters"] == (sum(own) if own else None)


@SHAPES
def test_weights_in_memory_are_those_of_the_loaded_collection(shape: str, make_collection: Make) -> None:
    folder = make_collection(shape)
    model = FusionRouteForCausalLM.from_pretrained(folder)
    assert inspect_collection(folder)["memory"]["weights_bytes"] == sum(p.nbytes for p in model.parameters())


def test_an_adapter_counts_in_the_dtype_of_its_base(tmp_path: Path) -> None:
    tiny.make_tokenizer(tmp_path / "base")
    model = tiny.make_model(tmp_path / "base", dtype=torch.bfloat16)
    tiny.make_adapter(tmp_path / "adapter", model.float())
    source, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    made = tmp_path / "made"
    collection.assemble(made, MemberSpec("router", source, adapter=adapter), [MemberSpec("math", source)])
    loaded = FusionRouteForCausalLM.from_pretrained(made)
    assert inspect_collection(made)["memory"]["weights_bytes"] == sum(p.nbytes for p in loaded.parameters())


def test_memory_is_that_of_the_dtype_the_collection_asks_for(make_collection: Make, tmp_path: Path) -> None:
    """An expert in another dtype than the others on its base has a copy of it."""
    folder = copy(make_collection("adapters"), tmp_path / "c", lambda c: c["experts"][0].update(dtype="bfloat16"))
    model = FusionRouteForCausalLM.from_pretrained(folder)
    memory = inspect_collection(folder)["memory"]
    assert memory["weights_bytes"] == sum(p.nbytes for p in model.parameters())
    assert {name: 4 * size for name, size in memory["kv_bytes_per_token"]["members"].items()} == cache_bytes(model, 4)


@SHAPES
def test_kv_bytes_a_token_are_those_of_a_real_cache(shape: str, make_collection: Make) -> None:
    folder = make_collection(shape)
    per_token = inspect_collection(folder)["memory"]["kv_bytes_per_token"]
    real = cache_bytes(FusionRouteForCausalLM.from_pretrained(folder), 4)
    assert {name: 4 * size for name, size in per_token["members"].items()} == real
    assert 4 * per_token["total"] == sum(real.values())


def test_kv_bytes_follow_the_dtype_of_the_weights(tmp_path: Path) -> None:
    folder = make_plain(tmp_path, dtype=torch.bfloat16)
    memory = inspect_collection(folder)["memory"]
    real = cache_bytes(FusionRouteForCausalLM.from_pretrained(folder), 4)
    assert {name: 4 * size for name, size in memory["kv_bytes_per_token"]["members"].items()} == real


def test_example_counts_only_what_sliding_layers_keep(make_collection: Make) -> None:
    folder = make_collection("mixed")
    memory = inspect_collection(folder)["memory"]
    tokens = memory["example"]["tokens"]
    real = cache_bytes(FusionRouteForCausalLM.from_pretrained(folder), tokens)
    assert memory["example"]["bytes"] == sum(real.values()) < tokens * memory["kv_bytes_per_token"]["total"]


def test_sliding_layers_are_mentioned(make_collection: Make) -> None:
    notes = inspect_collection(make_collection("gemma2"))["memory"]["notes"]
    assert notes[1] == "math: 2 of 4 layers slide and keep only the last 5 tokens"


def test_bytes_are_those_of_the_tensors_in_the_files(make_collection: Make) -> None:
    from safetensors.torch import load_file

    folder = make_collection("adapters")
    member = members(inspect_collection(folder))["math"]
    files = [Path(member["source"]) / "model.safetensors", folder / "expert_math" / "adapter_model.safetensors"]
    assert member["bytes"] == sum(tensor.nbytes for file in files for tensor in load_file(file).values())


# ---- what the files say


def test_members_are_described_in_route_order(make_collection: Make) -> None:
    found = inspect_collection(make_collection("mixed"))["members"]
    assert [(m["index"], m["name"], m["architecture"], m["layers"], m["width"]) for m in found] == [
        (None, "router", "LlamaForCausalLM", 2, 32),
        (0, "math", "Gemma2ForCausalLM", 2, 48),
        (1, "code", "LlamaForCausalLM", 2, 32),
        (2, "general", "Qwen2ForCausalLM", 2, 32),
    ]


def test_members_on_one_base_say_so(make_collection: Make) -> None:
    found = inspect_collection(make_collection("mixed"))["members"]
    assert [member["shares_base_with"] for member in found] == [["code"], [], ["router"], []]


def test_a_base_written_in_two_ways_is_one(make_collection: Make, tmp_path: Path) -> None:
    def respell(config: dict[str, Any]) -> None:
        base = Path(config["router"]["source"])
        config["experts"][0]["source"] = f"{base.parent}/../{base.parent.name}/{base.name}"

    folder = copy(make_collection("adapters"), tmp_path / "c", respell)
    assert members(inspect_collection(folder))["math"]["shares_base_with"] == ["router", "code"]


def test_a_whole_collection_has_no_errors(any_collection: Path) -> None:
    report = inspect_collection(any_collection)
    assert not inspection.has_errors(report)
    assert all(member["digest_matches"] for member in report["members"])


def test_the_report_is_json(any_collection: Path) -> None:
    report = inspect_collection(any_collection)
    assert json.loads(json.dumps(report)) == report


def test_vocabulary_is_what_the_joint_check_says(make_collection: Make) -> None:
    folder = make_collection("qwen2")
    expected = collection.check_vocabulary_of(collection.read_config(folder), folder)
    assert inspect_collection(folder)["vocabulary"] == {
        "common": expected.common,
        "sizes": expected.sizes,
        "notes": list(expected.notes),
    }


# ---- warnings


def test_an_untrained_head_is_a_warning(tmp_path: Path) -> None:
    report = inspect_collection(make_plain(tmp_path))
    assert report["head"] == {"trained": False, "experts": ["math"]}
    assert "the route head is untrained: every prompt goes to expert math" in report["warnings"]


def test_a_trained_head_is_no_warning(make_collection: Make) -> None:
    report = inspect_collection(make_collection("llama"))
    assert report["head"] == {"trained": True, "experts": ["math", "code"]}
    assert not any("head" in warning for warning in report["warnings"])


def test_config_and_head_that_disagree_are_a_warning(make_collection: Make, tmp_path: Path) -> None:
    folder = copy(make_collection("llama"), tmp_path / "c", lambda config: config.update(head_trained=False))
    assert any(
        "head_trained False, the route head's file says True" in warning
        for warning in inspect_collection(folder)["warnings"]
    )


def test_another_digest_is_a_warning_with_both_values(make_collection: Make, tmp_path: Path) -> None:
    other = "sha256:" + "0" * 64
    folder = copy(make_collection("llama"), tmp_path / "c", lambda config: config["experts"][0].update(digest=other))
    real = collection.read_config(make_collection("llama")).expert_specs[0].digest
    report = inspect_collection(folder)
    assert [member["digest_matches"] for member in report["members"]] == [True, False, True]
    (warning,) = [warning for warning in report["warnings"] if "digest" in warning]
    assert f"math: the model has digest {real}, the collection expects {other}" in warning


def test_another_adapter_digest_is_a_warning(make_collection: Make, tmp_path: Path) -> None:
    other = "sha256:" + "0" * 64
    folder = copy(make_collection("adapters"), tmp_path / "c", lambda c: c["experts"][1].update(adapter_digest=other))
    report = inspect_collection(folder)
    assert members(report)["code"]["adapter_digest_matches"] is False
    assert any(warning.startswith("code: the adapter has digest") for warning in report["warnings"])


def test_no_recorded_digest_neither_matches_nor_differs(make_collection: Make, tmp_path: Path) -> None:
    folder = copy(make_collection("llama"), tmp_path / "c", lambda config: config["router"].update(digest=None))
    assert members(inspect_collection(folder))["router"]["digest_matches"] is None


def test_missing_licences_are_a_warning(make_collection: Make, tmp_path: Path) -> None:
    folder = copy(make_collection("llama"), tmp_path / "c", lambda config: config["router"].update(license="mit"))
    (warning,) = [warning for warning in inspect_collection(folder)["warnings"] if "licence" in warning]
    assert "for math, code:" in warning


def test_another_chat_template_is_a_warning(make_collection: Make, tmp_path: Path) -> None:
    folder, model = with_own_math(make_collection("llama"), tmp_path)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    report = inspect_collection(folder)
    assert [member["template"] for member in report["members"]] == ["same", "differs", "same"]
    assert [warning for warning in report["warnings"] if "template" in warning] == [
        "expert math was trained on another chat template than the collection's"
    ]


# ---- another base


def test_a_given_base_replaces_that_of_the_adapters_only(make_collection: Make, tmp_path: Path) -> None:
    folder = make_collection("mixed")
    shutil.copytree(collection.read_config(folder).router_spec.source, tmp_path / "base")
    found = members(inspect_collection(folder, base=str(tmp_path / "base")))
    assert [name for name, member in found.items() if member["source"] == str(tmp_path / "base")] == ["router", "code"]


def test_a_given_base_with_another_digest_is_a_warning(make_collection: Make, tmp_path: Path) -> None:
    folder = make_collection("adapters")
    shutil.copytree(collection.read_config(folder).router_spec.source, tmp_path / "base")
    tiny.make_model(tmp_path / "base", seed=77, vocab_size=320)
    report = inspect_collection(folder, base=str(tmp_path / "base"))
    assert inspection.errors(report) == []
    assert any("the result may differ from the published one" in warning for warning in report["warnings"])


def test_a_base_without_adapters_is_refused(make_collection: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has none"):
        inspect_collection(make_collection("llama"), base=str(tmp_path))


# ---- what is broken


def test_a_missing_member_leaves_the_rest_of_the_report(make_collection: Make, tmp_path: Path) -> None:
    folder = make_collection("llama")
    gone = str(tmp_path / "gone")
    broken = inspect_collection(copy(folder, tmp_path / "c", lambda c: c["experts"][0].update(source=gone)))
    assert inspection.errors(broken) == [f"math: {gone} is missing: check the path"]
    whole = inspect_collection(folder)
    assert [members(broken)[name] for name in ("router", "code")] == [
        members(whole)[name] for name in ("router", "code")
    ]
    assert broken["vocabulary"]["notes"] == ["math cannot be read and was not checked"]
    assert 0 < broken["memory"]["weights_bytes"] < whole["memory"]["weights_bytes"]


def test_a_missing_router_leaves_the_experts(make_collection: Make, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    folder = copy(make_collection("llama"), tmp_path / "c", lambda config: config["router"].update(source=gone))
    report = inspect_collection(folder)
    assert [("error" in member) for member in report["members"]] == [True, False, False]
    assert report["vocabulary"]["common"] == 320


def test_with_every_member_missing_there_is_still_a_report(make_collection: Make, tmp_path: Path) -> None:
    def lose(config: dict[str, Any]) -> None:
        for member in [config["router"], *config["experts"]]:
            member["source"] = "nobody/nothing"

    report = inspect_collection(copy(make_collection("adapters"), tmp_path / "c", lose))
    assert len(inspection.errors(report)) == 4  # three members and the vocabulary
    assert report["members"][0]["shares_base_with"] == ["math", "code"]


def test_a_truncated_weight_file_is_that_members_error(make_collection: Make, tmp_path: Path) -> None:
    folder, model = with_own_math(make_collection("llama"), tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    report = inspect_collection(folder)
    assert "is not a whole safetensors file" in members(report)["math"]["error"]


@pytest.mark.parametrize("config", [{"model_type": "unheard_of"}, {"model_type": "llama", "hidden_size": "wide"}])
def test_an_unknown_architecture_is_that_members_error(
    config: dict[str, Any], make_collection: Make, tmp_path: Path
) -> None:
    folder, model = with_own_math(make_collection("llama"), tmp_path)
    (model / "config.json").write_text(json.dumps(config))
    report = inspect_collection(folder)
    assert "cannot be read by transformers" in members(report)["math"]["error"]


def test_a_missing_head_is_an_error(make_collection: Make, tmp_path: Path) -> None:
    folder = copy(make_collection("llama"), tmp_path / "c")
    (folder / "router" / "route_head.safetensors").unlink()
    report = inspect_collection(folder)
    (error,) = inspection.errors(report)
    assert error.startswith("route head:")
    assert inspection.has_errors(report)


def test_tokenizers_that_disagree_are_an_error(make_collection: Make, tmp_path: Path) -> None:
    folder, model = with_own_math(make_collection("llama"), tmp_path)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    report = inspect_collection(folder)
    assert "tokenizers disagree" in report["vocabulary"]["error"]
    assert len(inspection.errors(report)) == 1


def test_a_collection_of_no_experts_is_refused(make_collection: Make, tmp_path: Path) -> None:
    folder = copy(make_collection("llama"), tmp_path / "c", lambda c: c.update(experts=[], head_trained=False))
    with pytest.raises(FusionRouteError, match="lists no experts"):
        inspect_collection(folder)


def test_a_broken_member_does_not_change_what_a_base_replaces(make_collection: Make, tmp_path: Path) -> None:
    """The vocabulary of the rest is checked on that base, also if the rest has no adapter."""
    folder = copy(make_collection("bare"), tmp_path / "c")
    for name in ("router", "expert_code"):
        (folder / name / "adapter_model.safetensors").unlink()
    base = collection.read_config(folder).router_spec.source
    report = inspect_collection(folder, base=base)
    assert [("error" in member) for member in report["members"]] == [True, False, True]
    assert report["vocabulary"]["common"] == 320


def test_half_a_config_is_refused(make_collection: Make, tmp_path: Path) -> None:
    folder = copy(make_collection("llama"), tmp_path / "c")
    (folder / "config.json").write_text('{"model_type": "fusi')
    with pytest.raises(FusionRouteError, match=r"config\.json"):
        inspect_collection(folder)


# ---- the table


def printed(report: dict[str, Any], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_cut_off_in_a_terminal(width: int, any_collection: Path) -> None:
    report = inspect_collection(any_collection)
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for member in report["members"]:
        for word in (member["name"], member["digest"].removeprefix("sha256:")[:12], member["dtype"]):
            assert word in text


def test_warnings_and_errors_are_printed(make_collection: Make, tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["experts"][0]["source"] = "nobody/nothing"
        config["head_trained"] = False

    text = printed(inspect_collection(copy(make_collection("llama"), tmp_path / "c", edit)), 100)
    assert "warning: config.json says head_trained False" in text
    assert "error: math: nobody/nothing is not" in text
    assert "at least" in text


def test_brackets_in_a_description_are_text(make_collection: Make, tmp_path: Path) -> None:
    folder = copy(make_collection("llama"), tmp_path / "c", lambda c: c["router"].update(description="[bold]a[/b]"))
    assert "[bold]a[/b]" in printed(inspect_collection(folder), 100)


@pytest.mark.parametrize(
    ("number", "size", "count"),
    [(0, "0 B", "0"), (999, "999 B", "999"), (999_600, "1 MB", "1 M"), (269_030_016, "269 MB", "269 M")],
)
def test_numbers_for_people(number: int, size: str, count: str) -> None:
    assert (inspection._size(number), inspection._count(number)) == (size, count)


def test_configuration_is_not_changed_by_a_look(make_collection: Make) -> None:
    folder = make_collection("mixed")
    before = (folder / "config.json").read_bytes()
    inspect_collection(folder)
    assert (folder / "config.json").read_bytes() == before
    assert isinstance(collection.read_config(folder), FusionRouteConfig)
