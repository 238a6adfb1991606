"""What is checked before vLLM starts, where vLLM is not needed for it."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from fusionroute import collection
from fusionroute.configuration import MemberSpec
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.integrations.vllm import Placed, check_parallel, check_together, check_version, place
from fusionroute.integrations.vllm_server import Settings, _ranks, check_arguments, stored_dtype


def members(*configs: dict[str, Any]) -> list[Placed]:
    made = []
    for number, config in enumerate(configs):
        spec = MemberSpec(f"member{number}", "nowhere")
        made.append(Placed(spec, Path(), None, AutoConfig.for_model("llama", **config)))
    return made


HEADS = {
    "hidden_size": 144,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
}


@pytest.mark.parametrize(
    ("change", "ranks", "words"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, (2, 1), ["member1", "9 attention heads", "2 tensor"]),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, (4, 1), ["6 key-value heads", "4 tensor"]),
        ({"intermediate_size": 63}, (2, 1), ["63 columns", "2 tensor"]),
        ({"num_hidden_layers": 1}, (1, 2), ["1 layers", "2 pipeline"]),
    ],
)
def test_every_member_must_allow_the_split(
    change: dict[str, int], ranks: tuple[int, int], words: list[str], refuses: Any
) -> None:
    with refuses(UsageError, *words):
        check_parallel(members(HEADS, {**HEADS, **change}), *ranks)


def test_fewer_key_value_heads_than_ranks_are_repeated() -> None:
    check_parallel(members({**HEADS, "num_attention_heads": 8}), 4, 1)


def test_no_member_is_rounded(make_collection: Callable[[str], Path], refuses: Any) -> None:
    folder = make_collection("llama")
    config = collection.read_config(folder)
    config.experts[1]["dtype"] = "int8"
    with refuses(UsageError, "code in int8", "vLLM"):
        place(config, folder)


def test_members_stand_where_their_files_are(make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("mixed")
    placed = place(collection.read_config(folder), folder)
    assert [member.spec.module for member in placed] == ["router", "expert_math", "expert_code", "expert_general"]
    assert [member.config.model_type for member in placed] == ["llama", "gemma2", "llama", "qwen2"]
    assert [member.adapter is None for member in placed] == [False, True, False, True]
    assert placed[0].folder == placed[2].folder


def test_a_head_of_other_experts_is_refused(copy: Callable[[str], Path], refuses: Any) -> None:
    folder = copy("llama")
    config = collection.read_config(folder)
    config.set_members(config.router_spec, config.expert_specs[::-1])
    with refuses(FusionRouteError, "math, code", "code, math"):
        check_together(config, folder)


def test_members_of_two_dtypes_are_refused(refuses: Any) -> None:
    with refuses(UsageError, "member0 is float32", "member1 is bfloat16", "--dtype"):
        stored_dtype(members({**HEADS, "dtype": "float32"}, {**HEADS, "dtype": "bfloat16"}))


@pytest.mark.parametrize("argument", ["--served-model-name", "--served_model_name=x"])
def test_what_the_collection_decides_is_not_for_vllms_arguments(argument: str, refuses: Any) -> None:
    with refuses(UsageError, "--served-model-name is not for vLLM's arguments"):
        check_arguments(Settings(arguments=(argument,)))


@pytest.mark.parametrize("arguments", [("--hf-overrides", '{"alpha": 0.5}'), ("--hf_overrides.alpha=0.5",)])
def test_alpha_is_overridden_in_vllms_way_but_not_beside_another_base(arguments: tuple[str, ...], refuses: Any) -> None:
    check_arguments(Settings(arguments=arguments))
    with refuses(UsageError, "--base", "--hf-overrides", "exclude each other"):
        check_arguments(Settings(arguments=arguments, base="x/y"))


def test_ranks_are_found_however_they_are_spelt() -> None:
    assert _ranks(("--tensor_parallel_size=2", "--pipeline-parallel-size", "3", "--max_model_len", "9")) == (2, 3)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_it_says_what_to_install(refuses: Any) -> None:
    with refuses(FusionRouteError, "pip install 'fusionroute[vllm]'"):
        check_version()


def test_a_vllm_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Any) -> None:
    """A library that is missing has no module's name."""
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with refuses(FusionRouteError, "libcudart.so", "pip install 'fusionroute[vllm]'"):
        check_version()
