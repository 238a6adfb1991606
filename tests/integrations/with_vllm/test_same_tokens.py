"""vLLM writes what the reference writes: tiny random collections of every kind, in float32, token by token."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionroute import collection, copying, tiny
from fusionroute.evaluation.systems import TOKENIZER_FILES
from fusionroute.integrations.vllm_server import on_base
from fusionroute.modeling import FusionRouteForCausalLM

# Whole models and adapters of Llama, Qwen2 and Gemma-2; different widths and depths; padded vocabularies; windows.
SHAPES = ["llama", "qwen2", "gemma2", "adapters", "bare", "two_bases", "mixed"]
NEW = 24
ROWS = [[5, 9, 250, 17, 33, 4, 4, 90, 12], [300, 8, 8, 41]]
# One that has a bit of everything but sliding windows, which are `mixed`'s.
VARIED = "two_bases"


@pytest.fixture(scope="module")
def eager(answers: Any, job: Any, make_collection: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    given = answers(*(job(make_collection(shape)) for shape in SHAPES))
    return dict(zip(SHAPES, given, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_eager(shape: str, eager: Any, reference: Any, make_collection: Callable[[str], Path]) -> None:
    assert eager[shape]["tokens"] == reference(make_collection(shape))


def test_the_routes_matter(reference: Any, make_collection: Callable[[str], Path]) -> None:
    """Else the tests here could not tell a right route from a wrong one."""
    folder = make_collection(VARIED)
    routed = reference(folder)
    assert all(routed != reference(folder, expert=name) for name in ("math", "code", "general"))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_another_weight_of_the_complement(
    alpha: float, answers: Any, job: Any, reference: Any, make_collection: Callable[[str], Path]
) -> None:
    folder = make_collection(VARIED)
    (given,) = answers(job(folder, {"hf_overrides": {"alpha": alpha}}))
    assert given["tokens"] == reference(folder, alpha=alpha)
    assert given["tokens"] != reference(folder)


def test_adapters_on_another_base(
    answers: Any, job: Any, make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    """What `fusionroute serve --base` tells vLLM."""
    folder = make_collection("adapters")
    tiny.make_model(tmp_path, width=128, scale=0.1, seed=77)
    copying.copy_tokenizer(folder, tmp_path)
    (given,) = answers(job(folder, {"hf_overrides": on_base(collection.read_config(folder), str(tmp_path))}, ROWS, NEW))
    with pytest.warns(UserWarning, match="digest"):
        model = FusionRouteForCausalLM.from_pretrained(folder, dtype="float32", base=str(tmp_path))
    for row, tokens in zip(ROWS, given["tokens"], strict=True):
        written = model.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False)
        assert written[0, len(row) :].tolist() == tokens


def test_the_tokenizer_is_the_bases_where_the_collection_has_none(
    answers: Any, job: Any, reference: Any, make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(make_collection("adapters"), tmp_path / "bare")
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    (given,) = answers(job(folder))
    assert given["tokens"] == reference(make_collection("adapters"))


def test_compiled(answers: Any, job: Any, reference: Any, make_collection: Callable[[str], Path]) -> None:
    """`adapters` has members of one configuration, whose compiled graphs must not be taken for each other's."""
    shapes = ["adapters", VARIED]
    given = answers(*(job(make_collection(shape), {"enforce_eager": False}) for shape in shapes))
    assert [each["tokens"] for each in given] == [reference(make_collection(shape)) for shape in shapes]


def test_prefix_caching(answers: Any, job: Any, reference: Any, make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("mixed")
    common = [(7 * i) % 290 + 10 for i in range(64)]
    rows = [[*common, 20 + i, 30, 40 + i] for i in range(5)]
    (given,) = answers(job(folder, {"enable_prefix_caching": True}, rows, more={"then": True}))
    assert min(given["cached"]) >= 64
    assert given["tokens"] == reference(folder, rows)


def test_preemption(answers: Any, job: Any, reference: Any, make_collection: Callable[[str], Path]) -> None:
    """Blocks for three answers, and eight are under way: some lose their keys and start again."""
    folder = make_collection(VARIED)
    rows = [[10 + i, 20 + i, 30, 40] for i in range(8)]
    settings = {"num_gpu_blocks_override": 7, "max_model_len": 96}
    (given,) = answers(job(folder, settings, rows, 60))
    assert given["preempted"] > 0
    assert given["tokens"] == reference(folder, rows, 60)


def test_prompts_read_in_pieces(answers: Any, job: Any, reference: Any, make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("mixed")
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16}
    (given,) = answers(job(folder, settings))
    assert given["tokens"] == reference(folder)


@pytest.mark.parametrize(
    "ranks",
    [
        {"tensor_parallel_size": 2},
        # vLLM's CPU ranks make the buffer that they receive in when they warm a traced graph up, so not with eager.
        {
            "pipeline_parallel_size": 2,
            "enforce_eager": False,
            "compilation_config": {"mode": 2, "backend": "eager"},
        },
    ],
    ids=["tensor", "pipeline"],
)
def test_two_ranks(
    ranks: dict[str, Any], answers: Any, job: Any, reference: Any, make_collection: Callable[[str], Path]
) -> None:
    folder = make_collection("mixed")
    (given,) = answers(job(folder, ranks))
    assert given["tokens"] == reference(folder)
