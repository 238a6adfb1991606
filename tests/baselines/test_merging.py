"""Merges against tensors computed by hand, against PEFT's, and against one another; and what is on disk afterwards."""

import json
import math
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionroute import tiny
from fusionroute.baselines import merging
from fusionroute.baselines.merging import MergeSettings, merge_collection, merge_deltas, merge_members
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.members import LoadOptions, load_model
from on_disk import config_of, digests, rewrite

METHODS = ["task-arithmetic", "dare", "ties"]


def merged(deltas: Sequence[Any], method: str, *, name: str = "w", seed: int = 0, **settings: Any) -> Tensor:
    """`merge_deltas` of tensors or lists of numbers; a None stays one."""
    tensors = [None if d is None else torch.as_tensor(d, dtype=torch.float32) for d in deltas]
    reads = [None if t is None else t.clone for t in tensors]
    return merge_deltas(reads, MergeSettings.of(method, seed=seed, **settings), name)


# ---- settings


@pytest.mark.parametrize(("method", "density"), [("task-arithmetic", 1.0), ("dare", 0.1), ("ties", 0.2)])
def test_settings_are_the_papers(method: str, density: float) -> None:
    assert MergeSettings.of(method) == MergeSettings(method, 1.0, density, 0)  # type: ignore[arg-type]


def test_settings_that_are_given_replace_the_papers() -> None:
    assert MergeSettings.of("ties", scale=0.5, density=0.3, seed=7) == MergeSettings("ties", 0.5, 0.3, 7)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"method": "slerp"}, "task-arithmetic, dare, ties"),
        ({"method": "ties", "density": 0.0}, "0.0"),
        ({"method": "ties", "density": 1.5}, "1.5"),
        ({"method": "ties", "density": math.nan}, "nan"),
        ({"method": "dare", "scale": math.inf}, "inf"),
        ({"method": "task-arithmetic", "density": 0.5}, "0.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], word: str, refuses: Callable) -> None:
    with refuses(UsageError, word):
        MergeSettings.of(**settings)


# ---- tensors, by hand


def test_task_arithmetic_adds() -> None:
    assert merged([[1.0, -2.0, 0.0], [3.0, 5.0, -1.0]], "task-arithmetic").tolist() == [4.0, 3.0, -1.0]


@pytest.mark.parametrize("method", METHODS)
def test_scale_multiplies_the_merged_delta(method: str) -> None:
    deltas = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(merged(deltas, method, scale=0.25), merged(deltas, method) * 0.25)


def test_ties_elects_the_sign_of_the_sum_and_averages_who_has_it() -> None:
    # Sums 2, −5, 3: of the first column 4 and 1 stay, of the second −6, of the third 3.
    deltas = [[4.0, -6.0, 3.0], [1.0, 1.0, 0.0], [-3.0, 0.0, 0.0]]
    assert merged(deltas, "ties", density=1.0).tolist() == [2.5, -6.0, 3.0]


def test_ties_elects_by_mass_and_not_by_count() -> None:
    assert merged([[9.0], [-1.0], [-2.0]], "ties", density=1.0).tolist() == [9.0]


def test_ties_trims_before_it_elects() -> None:
    # Kept are 9 and 8 of the first, −7 and −6 of the second; before the trim column 1 would have elected plus.
    deltas = [[9.0, 8.0, 5.0, 0.0], [-1.0, -7.0, -6.0, 0.0]]
    assert merged(deltas, "ties", density=0.5).tolist() == [9.0, 8.0, -6.0, 0.0]


def test_ties_keeps_a_fifth_by_default() -> None:
    delta = torch.arange(1.0, 101.0) * torch.tensor([1.0, -1.0]).repeat(50)
    kept = merged([delta], "ties")
    assert torch.equal(kept, torch.where(delta.abs() > 80, delta, 0))


def test_ties_of_density_one_trims_nothing() -> None:
    delta = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(merged([delta], "ties", density=1.0), delta)


def test_entries_that_tie_with_the_last_one_kept_are_all_kept() -> None:
    assert merged([[2.0, -2.0, 2.0, 1.0]], "ties", density=0.25).tolist() == [2.0, -2.0, 2.0, 0.0]


def test_a_density_below_one_entry_keeps_none() -> None:
    assert merged([[2.0, -3.0]], "ties", density=0.4).tolist() == [0.0, 0.0]


def test_a_sum_of_zero_elects_no_sign() -> None:
    assert merged([[2.0, 1.0], [-2.0, 1.0]], "ties", density=1.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("method", METHODS)
def test_a_column_of_zeros_stays_zero(method: str) -> None:
    deltas = [[[0.0, 1.0], [0.0, 2.0]], [[0.0, -3.0], [0.0, 4.0]]]
    assert merged(deltas, method)[:, 0].tolist() == [0.0, 0.0]


def test_an_expert_without_a_delta_does_not_count_in_the_mean() -> None:
    assert merged([None, [4.0], None, [2.0]], "ties", density=1.0).tolist() == [3.0]


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_of_none_is_a_delta_of_zeros(method: str) -> None:
    first, last = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    assert torch.equal(merged([first, None, last], method), merged([first, torch.zeros(30), last], method))


@pytest.mark.parametrize("method", METHODS)
def test_a_single_number_can_be_merged(method: str) -> None:
    settings = {} if method == "task-arithmetic" else {"density": 1.0}
    assert merged([torch.tensor(2.0), torch.tensor(4.0)], method, **settings).shape == ()


# ---- DARE's masks


def test_dare_keeps_a_tenth_and_makes_it_ten_times_larger() -> None:
    found = merged([torch.full((20000,), 3.0)], "dare")
    assert sorted(set(found.tolist())) == [0.0, 30.0]
    assert 0.09 < (found != 0).float().mean() < 0.11  # five standard deviations are 0.0106


def test_dare_is_task_arithmetic_on_average() -> None:
    deltas = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, 0.0]])
    mean = torch.stack([merged(deltas, "dare", density=0.5, seed=seed) for seed in range(2000)]).mean(0)
    # The standard error is √(Σδ² (1−p)/p / 2000): 0.07 at most.
    assert torch.allclose(mean, deltas.sum(0), atol=0.3)


def test_dare_of_several_experts_is_the_sum_of_each_alone() -> None:
    deltas = torch.randn(3, 500, generator=torch.Generator().manual_seed(3))
    alone = [merged([d if i == place else None for i, d in enumerate(deltas)], "dare") for place in range(3)]
    assert torch.equal(merged(deltas, "dare"), alone[0] + alone[1] + alone[2])


def test_dare_gives_the_same_every_time_and_anywhere() -> None:
    # A function of these words and nothing else, not of a machine or of what was drawn before.
    found = merged([torch.ones(40)], "dare", name="model.norm.weight", seed=5, density=0.25)
    assert found.nonzero().flatten().tolist() == [0, 4, 5, 8, 10, 16, 18, 24, 25, 31, 32, 36]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"name": "v"}])
def test_dare_draws_anew_for_another_seed_or_tensor(changed: dict[str, Any]) -> None:
    deltas = torch.ones(1, 200)
    assert not torch.equal(merged(deltas, "dare"), merged(deltas, "dare", **changed))


def test_dare_draws_anew_for_every_expert() -> None:
    ones = torch.ones(200)
    assert not torch.equal(merged([ones, None], "dare"), merged([None, ones], "dare"))


def test_dare_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    merged(torch.ones(2, 10), "dare")
    assert torch.equal(torch.get_rng_state(), state)


# ---- tensors, against others


def by_the_paper(deltas: Tensor, density: float) -> Tensor:
    """TIES as its paper's Algorithm 1 writes it, entry by entry."""
    experts = []
    for delta in deltas.tolist():
        keep = int(density * len(delta))
        least = sorted(map(abs, delta), reverse=True)[keep - 1] if keep else math.inf
        experts.append([value if abs(value) >= least else 0.0 for value in delta])
    result = []
    for column in zip(*experts, strict=True):
        mass = sum(column)
        agreeing = [value for value in column if value * mass > 0]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(result)


# Sums of these are exact in float32, in any order.
DELTAS = arrays.arrays(
    "float32", st.tuples(st.integers(1, 5), st.integers(1, 12)), elements=st.integers(-32, 32).map(lambda i: i / 8)
)


@given(DELTAS, st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_ties_is_the_papers(deltas: Any, density: float) -> None:
    assert torch.allclose(merged(deltas, "ties", density=density), by_the_paper(torch.tensor(deltas), density))


@given(DELTAS, st.sampled_from(["task-arithmetic", "ties"]), st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(deltas: Any, method: str, random: Any) -> None:
    shuffled = list(deltas)
    random.shuffle(shuffled)
    assert torch.equal(merged(deltas, method), merged(shuffled, method))


@given(DELTAS, st.integers(1, 6))
def test_ties_of_one_expert_several_times_is_that_expert(deltas: Any, times: int) -> None:
    assert torch.allclose(merged([deltas[0]] * times, "ties", density=1.0), torch.tensor(deltas[0]))


@given(DELTAS, st.sampled_from(METHODS))
def test_changing_every_sign_changes_the_result_s_sign(deltas: Any, method: str) -> None:
    assert torch.equal(merged(-deltas, method), -merged(deltas, method))


@given(DELTAS, st.sampled_from([0.25, 0.5, 1.0]))
def test_a_ties_entry_lies_between_zero_and_the_extreme_expert(deltas: Any, density: float) -> None:
    found, tensor = merged(deltas, "ties", density=density), torch.tensor(deltas)
    assert bool(((found <= tensor.amax(0).clamp(min=0)) & (found >= tensor.amin(0).clamp(max=0))).all())


@pytest.mark.parametrize("density", [0.2, 0.5, 0.99])
def test_ties_is_pefts(density: float) -> None:
    deltas = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(4))
    expected = merge_utils.ties(list(deltas), torch.ones(3), density)
    assert torch.allclose(merged(deltas, "ties", density=density), expected, atol=1e-6)


def test_task_arithmetic_is_pefts() -> None:
    deltas = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(5))
    expected = merge_utils.task_arithmetic(list(deltas), torch.full((3,), 0.7))
    assert torch.allclose(merged(deltas, "task-arithmetic", scale=0.7), expected, atol=1e-6)


def test_dare_is_pefts_with_our_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(6))
    masks = [merged([None] * place + [torch.ones(16, 24)], "dare", density=0.3) > 0 for place in range(3)]
    monkeypatch.setattr(torch, "bernoulli", lambda input: masks.pop(0).float())
    expected = merge_utils.dare_linear(list(deltas), torch.ones(3), 0.3)
    assert torch.allclose(merged(deltas, "dare", density=0.3), expected, atol=1e-6)


# ---- memory


@pytest.mark.parametrize(("method", "reads"), [("task-arithmetic", 1), ("dare", 1), ("ties", 2)])
def test_two_deltas_are_alive_at_most(method: str, reads: int) -> None:
    """One is the sum so far, which starts as the first delta; the other is the one just read."""
    alive: set[int] = set()
    most, calls = 0, 0

    def read() -> Tensor:
        nonlocal most, calls
        calls += 1
        tensor = torch.randn(64)
        alive.add(calls)
        weakref.finalize(tensor, alive.discard, calls)
        most = max(most, len(alive))
        return tensor

    merge_deltas([read] * 6, MergeSettings.of(method), "w")
    assert (most, calls) == (2, 6 * reads)


def test_one_tensor_of_the_model_is_merged_at_a_time(
    make_collection: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: set[int] = set()
    most, calls = 0, 0
    original = merging._merged

    def watched(*args: Any) -> Tensor:
        nonlocal most, calls
        most, calls = max(most, len(alive)), calls + 1
        tensor = original(*args)
        alive.add(calls)
        weakref.finalize(tensor, alive.discard, calls)
        return tensor

    monkeypatch.setattr(merging, "_merged", watched)
    merge_collection(make_collection("adapters"), MergeSettings.of("ties"), tmp_path / "out")
    assert calls > 10
    assert most == 0


# ---- on disk: what the tests start from


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, models of each family with it (`llama0`, `llama1`, …) and adapters on the first llama."""
    root = tmp_path_factory.mktemp("merging")
    tokenizer = tiny.make_tokenizer(root / "tokenizer")
    for family in ("llama", "qwen2", "gemma2"):
        for seed in range(3):
            folder = root / f"{family}{seed}"
            model = tiny.make_model(folder, family=family, seed=seed, vocab_size=len(tokenizer))
            tokenizer.save_pretrained(folder)
            if (family, seed) == ("llama", 0):
                for number in range(2):
                    tiny.make_adapter(root / f"adapter{number}", model, seed=20 + number)
    return root


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def resaved(source: Path, out: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None) -> Path:
    """A copy of a model or adapter folder with its tensors changed."""
    shutil.copytree(source, out)
    file = next(path for path in out.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return out


def as_dtype(source: Path, out: Path, dtype: torch.dtype) -> Path:
    """A copy of a model with its weights rounded to `dtype`."""
    return resaved(source, out, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))


def untied(source: Path, out: Path) -> Path:
    """A copy of a tied model whose LM head is half its embedding."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] / 2

    resaved(source, out, change)
    rewrite(out, lambda config: config.update(tie_word_embeddings=False))
    return out


def add_ids(source: Path, out: Path, ids: int) -> Path:
    """A copy of a model with so many more embedding rows, all ones; with fewer if negative."""

    def change(tensors: dict[str, Tensor]) -> None:
        rows = tensors["model.embed_tokens.weight"]
        grown = torch.cat([rows, torch.ones(ids, rows.shape[1])]) if ids > 0 else rows[:ids]
        tensors["model.embed_tokens.weight"] = grown

    resaved(source, out, change)
    rewrite(out, lambda config: config.update(vocab_size=config["vocab_size"] + ids))
    return out


def unloaded(base: Path, adapter: Path, out: Path) -> Path:
    """The model that PEFT makes of an adapter and its base."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    model.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def save_adapter(base: Path, out: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Make a random adapter of any shape on a model."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out, save_embedding_layers=False)
    return out


def assert_close(found: Path, expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    tensors = tensors_of(found)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, expected[name], atol=atol), name


# ---- whole models


def test_task_arithmetic_of_whole_models(place: Path, tmp_path: Path) -> None:
    models = [place / "llama0", place / "llama1", place / "llama2"]
    merge_members(models[0], models[1:], MergeSettings.of("task-arithmetic", scale=0.5), tmp_path / "out")
    base, first, second = map(tensors_of, models)
    assert_close(tmp_path / "out", {n: base[n] + 0.5 * ((first[n] - base[n]) + (second[n] - base[n])) for n in base})


def test_ties_of_whole_models_is_pefts_tensor_by_tensor(place: Path, tmp_path: Path) -> None:
    models = [place / "qwen20", place / "qwen21", place / "qwen22"]
    merge_members(models[0], models[1:], MergeSettings.of("ties"), tmp_path / "out")
    base, first, second = map(tensors_of, models)
    merge = {n: merge_utils.ties([first[n] - base[n], second[n] - base[n]], torch.ones(2), 0.2) for n in base}
    assert_close(tmp_path / "out", {n: base[n] + delta for n, delta in merge.items()})


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_one_expert_alone_is_that_expert(method: str, place: Path, tmp_path: Path) -> None:
    settings = MergeSettings.of(method, density=1.0)
    merge_members(place / "llama0", [place / "llama1"], settings, tmp_path / "out")
    assert_close(tmp_path / "out", tensors_of(place / "llama1"), atol=1e-6)


def test_one_bfloat16_expert_alone_is_that_expert_to_the_bit(place: Path, tmp_path: Path) -> None:
    base, expert = (as_dtype(place / name, tmp_path / name, torch.bfloat16) for name in ("llama0", "llama1"))
    merge_members(base, [expert], MergeSettings.of("task-arithmetic"), tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(expert)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_result_has_the_bases_dtype_and_is_rounded_once(place: Path, tmp_path: Path) -> None:
    base = as_dtype(place / "llama0", tmp_path / "base", torch.bfloat16)
    experts = [place / "llama1", place / "llama2"]
    merge_members(base, experts, MergeSettings.of("task-arithmetic"), tmp_path / "out")
    found, own, first, second = map(tensors_of, [tmp_path / "out", base, *experts])
    for name, tensor in own.items():
        exact = first[name].double() + second[name].double() - tensor.double()
        assert found[name].dtype == torch.bfloat16
        # Half a unit in the last of bfloat16's 8 binary digits, and what float32 lost before.
        assert bool(((found[name].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()), name


def test_the_base_among_the_experts_changes_nothing(place: Path, tmp_path: Path) -> None:
    base, expert = place / "llama0", place / "llama1"
    for name, experts in (("with", [base, expert]), ("without", [expert])):
        merge_members(base, experts, MergeSettings.of("ties"), tmp_path / name)
    assert_close(tmp_path / "with", tensors_of(tmp_path / "without"), atol=0)


def test_the_base_alone_is_merged_into_itself(place: Path, tmp_path: Path) -> None:
    merge_members(place / "llama0", [place / "llama0"], MergeSettings.of("dare"), tmp_path / "out")
    assert_close(tmp_path / "out", tensors_of(place / "llama0"), atol=0)


def test_the_experts_files_are_left_alone(place: Path, tmp_path: Path) -> None:
    folders = [place / "llama0", place / "llama1", place / "adapter0"]
    before = [digests(folder) for folder in folders]
    merge_members(folders[0], folders[1:], MergeSettings.of("ties"), tmp_path / "out")
    assert [digests(folder) for folder in folders] == before


# ---- adapters


@pytest.mark.parametrize("method", METHODS)
def test_adapters_merge_as_the_whole_models_made_of_them(method: str, place: Path, tmp_path: Path) -> None:
    base, adapters = place / "llama0", [place / "adapter0", place / "adapter1"]
    models = [unloaded(base, adapter, tmp_path / adapter.name) for adapter in adapters]
    merge_members(base, adapters, MergeSettings.of(method), tmp_path / "of_adapters")
    merge_members(base, models, MergeSettings.of(method), tmp_path / "of_models")
    found, expected = tensors_of(tmp_path / "of_adapters"), tensors_of(tmp_path / "of_models")
    assert found.keys() == expected.keys()
    far = sum(int(((found[n] - expected[n]).abs() > 1e-4).sum()) for n in found)
    # Rounding may carry one magnitude over a threshold of the trim; random ones are never that close here.
    assert far <= (2 if method == "ties" else 0)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_adapters_merge_as_peft_merges_them(method: str, place: Path, tmp_path: Path) -> None:
    names = ["first", "second"]
    # The smaller side of all these matrices is 32, so that PEFT's decomposition cuts nothing off.
    modules = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for seed, name in enumerate(names):
        save_adapter(place / "llama0", tmp_path / name, seed=seed, target_modules=modules, r=4, lora_alpha=6)
    base = AutoModelForCausalLM.from_pretrained(place / "llama0")
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / names[0]), adapter_name=names[0])
    model.load_adapter(str(tmp_path / names[1]), names[1])
    kind = {"task-arithmetic": "svd", "ties": "ties_svd"}[method]
    model.add_weighted_adapter(names, [1.0, 1.0], "both", combination_type=kind, svd_rank=32, density=0.2)
    model.set_adapter("both")
    expected = model.merge_and_unload().state_dict()
    merge_members(place / "llama0", [tmp_path / n for n in names], MergeSettings.of(method), tmp_path / "out")
    assert_close(tmp_path / "out", {n: t for n, t in expected.items() if n != "lm_head.weight"}, atol=1e-4)


LORAS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"q_proj": 5, ".*0.*v_proj": 3, "^model.layers.0.mlp.up_proj": 40},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", sorted(LORAS))
def test_one_adapter_alone_is_what_peft_unloads(kind: str, place: Path, tmp_path: Path) -> None:
    base = untied(place / "llama0", tmp_path / "base")
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | LORAS[kind]
    save_adapter(base, tmp_path / "adapter", **settings)
    expected = unloaded(base, tmp_path / "adapter", tmp_path / "unloaded")
    merge_members(base, [tmp_path / "adapter"], MergeSettings.of("task-arithmetic"), tmp_path / "out")
    assert_close(tmp_path / "out", tensors_of(expected))


def test_an_adapter_of_transposed_weights_is_what_peft_unloads(place: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "base"
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(place / "tokenizer").save_pretrained(base)
    save_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    expected = unloaded(base, tmp_path / "adapter", tmp_path / "unloaded")
    merge_members(base, [tmp_path / "adapter"], MergeSettings.of("task-arithmetic"), tmp_path / "out")
    assert_close(tmp_path / "out", tensors_of(expected))


def test_whole_models_and_adapters_merge_together(place: Path, tmp_path: Path) -> None:
    base, adapter, model = place / "llama0", place / "adapter0", place / "llama1"
    merge_members(base, [adapter, model], MergeSettings.of("task-arithmetic"), tmp_path / "out")
    own, first = tensors_of(base), tensors_of(unloaded(base, adapter, tmp_path / "unloaded"))
    second = tensors_of(model)
    assert_close(tmp_path / "out", {n: first[n] + second[n] - own[n] for n in own})


# ---- what is written


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_result_loads_without_a_missing_key_and_generates(family: str, place: Path, tmp_path: Path) -> None:
    models = [place / f"{family}{seed}" for seed in range(3)]
    merge_members(models[0], models[1:], MergeSettings.of("ties"), tmp_path / "out")
    model = load_model(tmp_path / "out", LoadOptions())  # refuses missing and unexpected keys
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out")("def add(a, b):", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_folder_holds_what_a_model_folder_holds(place: Path, tmp_path: Path) -> None:
    merge_members(place / "llama0", [place / "llama1"], MergeSettings.of("ties"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


@pytest.fixture
def sharded(place: Path, tmp_path: Path) -> Path:
    """The first llama in several files."""
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(place / "llama0").save_pretrained(folder, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(place / "llama0").save_pretrained(folder)
    return folder


def test_shards_are_the_bases(sharded: Path, place: Path, tmp_path: Path) -> None:
    merge_members(sharded, [place / "llama1"], MergeSettings.of("ties"), tmp_path / "out")
    names = [sorted(path.name for path in folder.glob("*.safetensors*")) for folder in (sharded, tmp_path / "out")]
    assert len(names[0]) > 3
    assert names[0] == names[1]
    load_model(tmp_path / "out", LoadOptions())


@pytest.mark.parametrize("method", METHODS)
def test_shards_do_not_change_the_result(method: str, sharded: Path, place: Path, tmp_path: Path) -> None:
    """Tensors are then visited in another order."""
    merge_members(sharded, [place / "llama1"], MergeSettings.of(method), tmp_path / "out")
    merge_members(place / "llama0", [place / "llama1"], MergeSettings.of(method), tmp_path / "single")
    assert_close(tmp_path / "out", tensors_of(tmp_path / "single"), atol=0)


def test_the_index_names_every_tensor_and_their_size(sharded: Path, place: Path, tmp_path: Path) -> None:
    merge_members(sharded, [place / "llama1"], MergeSettings.of("ties"), tmp_path / "out")
    ours, theirs = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (tmp_path / "out", sharded))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_tensors_stand_in_the_file_where_the_base_has_them(place: Path, tmp_path: Path) -> None:
    """Their alignment in the file is then the base's too."""
    merge_members(place / "llama0", [place / "llama1"], MergeSettings.of("ties"), tmp_path / "out")
    ours, theirs = (merging.read_header(f / "model.safetensors") for f in (tmp_path / "out", place / "llama0"))
    assert sorted(ours, key=lambda n: ours[n].begin) == sorted(theirs, key=lambda n: theirs[n].begin)


@pytest.mark.parametrize("which", ["base", "expert", "both"])
def test_tied_tensors_that_a_file_holds_twice_are_saved_once(which: str, place: Path, tmp_path: Path) -> None:
    def twice(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folders = [place / "llama0", place / "llama1"]
    merge_members(folders[0], folders[1:], MergeSettings.of("ties"), tmp_path / "expected")
    for number, name in enumerate(("base", "expert")):
        if which in (name, "both"):
            folders[number] = resaved(folders[number], tmp_path / name, twice)
    merge_members(folders[0], folders[1:], MergeSettings.of("ties"), tmp_path / "out")
    assert_close(tmp_path / "out", tensors_of(tmp_path / "expected"), atol=0)


def test_an_expert_may_hold_the_other_of_two_tied_tensors(place: Path, tmp_path: Path) -> None:
    def other(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    expert = resaved(place / "llama1", tmp_path / "expert", other)
    merge_members(place / "llama0", [expert], MergeSettings.of("task-arithmetic"), tmp_path / "out")
    assert_close(tmp_path / "out", tensors_of(place / "llama1"), atol=1e-6)


def test_an_untied_head_is_merged_on_its_own(place: Path, tmp_path: Path) -> None:
    base, expert = (untied(place / name, tmp_path / name) for name in ("llama0", "llama1"))
    merge_members(base, [expert], MergeSettings.of("task-arithmetic"), tmp_path / "out")
    assert_close(tmp_path / "out", tensors_of(expert), atol=1e-6)


@pytest.mark.parametrize("ids", [8, -8])
def test_rows_of_ids_that_base_and_expert_do_not_share_are_the_bases(ids: int, place: Path, tmp_path: Path) -> None:
    base = place / "llama0" if ids > 0 else add_ids(place / "llama0", tmp_path / "base", 8)
    expert = place / "llama1" if ids < 0 else add_ids(place / "llama1", tmp_path / "expert", 8)
    merge_members(base, [expert], MergeSettings.of("task-arithmetic"), tmp_path / "out")
    name = "model.embed_tokens.weight"
    found, own, theirs = (tensors_of(folder)[name] for folder in (tmp_path / "out", base, expert))
    assert torch.allclose(found, torch.cat([theirs[:320], own[320:]]), atol=1e-6)
    load_model(tmp_path / "out", LoadOptions())


def test_rotary_frequencies_of_old_files_are_left_out(place: Path, tmp_path: Path) -> None:
    def old(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    expert = resaved(place / "llama1", tmp_path / "expert", old)
    merge_members(place / "llama0", [expert], MergeSettings.of("task-arithmetic"), tmp_path / "out")
    assert_close(tmp_path / "out", tensors_of(place / "llama1"), atol=1e-6)


def test_integer_tensors_are_the_bases(place: Path, tmp_path: Path) -> None:
    base = resaved(place / "llama0", tmp_path / "base", lambda tensors: tensors.update(count=torch.tensor([3])))
    expert = resaved(place / "llama1", tmp_path / "expert", lambda tensors: tensors.update(count=torch.tensor([9])))
    merge_members(base, [expert], MergeSettings.of("task-arithmetic"), tmp_path / "out")
    assert tensors_of(tmp_path / "out")["count"].tolist() == [3]


def test_tokenizer_and_generation_config_may_be_anothers(place: Path, tmp_path: Path) -> None:
    text = Path(shutil.copytree(place / "llama1", tmp_path / "text"))
    (text / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    (text / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    merge_members(place / "llama0", [place / "llama1"], MergeSettings.of("ties"), tmp_path / "out", text=text)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[-1]['content'] }}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]


# ---- whole or not at all


def test_a_merge_that_breaks_off_leaves_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = merging._merged, 0

    def broken(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(merging, "_merged", broken)
    with pytest.raises(KeyboardInterrupt):
        merge_members(place / "llama0", [place / "llama1"], MergeSettings.of("ties"), tmp_path / "runs" / "out")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_expert_with_a_hole_is_refused_by_the_tensors_name(
    value: float, method: str, place: Path, tmp_path: Path, refuses: Callable
) -> None:
    def hole(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][3] = value

    expert = resaved(place / "llama1", tmp_path / "expert", hole)
    with refuses(FusionRouteError, "model.norm.weight of expert 2 of 2"):
        merge_members(place / "llama0", [place / "llama2", expert], MergeSettings.of(method), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sum_too_large_for_the_bases_dtype_is_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    base = as_dtype(place / "llama0", tmp_path / "base", torch.float16)
    with refuses(FusionRouteError, "float16", "scale"):
        merge_members(base, [place / "llama1"], MergeSettings.of("ties", scale=1e6), tmp_path / "out")


def test_a_folder_that_holds_something_is_not_overwritten(place: Path, tmp_path: Path, refuses: Callable) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with refuses(FusionRouteError, tmp_path / "out"):
        merge_members(place / "llama0", [place / "llama1"], MergeSettings.of("ties"), tmp_path / "out")
    assert digests(tmp_path / "out").keys() == {"thesis.txt"}


# ---- refusals


def test_no_experts_are_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    with refuses(UsageError, "no experts"):
        merge_members(place / "llama0", [], MergeSettings.of("ties"), tmp_path / "out")


def test_another_architecture_is_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    with refuses(FusionRouteError, place / "qwen20", place / "llama0", "qwen2", "llama"):
        merge_members(place / "llama0", [place / "qwen20"], MergeSettings.of("ties"), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 48}, ["model.embed_tokens.weight", "[320, 48]", "[320, 32]"]),
        ({"layers": 3}, ["0 tensors", "9 that it lacks", "model.layers.2"]),
        ({"layers": 1}, ["9 tensors", "0 that it lacks", "model.layers.1"]),
    ],
)
def test_another_size_is_refused(
    settings: dict[str, int], words: list[str], place: Path, tmp_path: Path, refuses: Callable
) -> None:
    tiny.make_model(tmp_path / "expert", vocab_size=320, **settings)
    AutoTokenizer.from_pretrained(place / "tokenizer").save_pretrained(tmp_path / "expert")
    with refuses(FusionRouteError, tmp_path / "expert", *words):
        merge_members(place / "llama0", [tmp_path / "expert"], MergeSettings.of("ties"), tmp_path / "out")


def test_a_tied_and_an_untied_model_are_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    expert = untied(place / "llama1", tmp_path / "expert")
    with refuses(FusionRouteError, expert, "lm_head.weight"):
        merge_members(place / "llama0", [expert], MergeSettings.of("ties"), tmp_path / "out")


def test_tied_tensors_that_differ_are_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    expert = untied(place / "llama1", tmp_path / "expert")
    rewrite(expert, lambda config: config.update(tie_word_embeddings=True))
    with refuses(FusionRouteError, expert, "tie_word_embeddings"):
        merge_members(place / "llama0", [expert], MergeSettings.of("ties"), tmp_path / "out")


def test_quantised_weights_are_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    expert = resaved(place / "llama1", tmp_path / "expert")
    rewrite(expert, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with refuses(FusionRouteError, expert, "quantised"):
        merge_members(place / "llama0", [expert], MergeSettings.of("ties"), tmp_path / "out")


def test_an_unknown_kind_of_model_is_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    expert = resaved(place / "llama1", tmp_path / "expert")
    rewrite(expert, lambda config: config.update(model_type="llama9"))
    with refuses(FusionRouteError, expert, "llama9"):
        merge_members(place / "llama0", [expert], MergeSettings.of("ties"), tmp_path / "out")


def test_another_tokenizer_is_refused(
    models: Callable[..., Path], place: Path, tmp_path: Path, refuses: Callable
) -> None:
    base, expert = models("base"), models("expert")
    swap = json.loads((expert / "tokenizer.json").read_text())
    vocab = swap["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (expert / "tokenizer.json").write_text(json.dumps(swap))
    with refuses(FusionRouteError, expert):
        merge_members(base, [expert], MergeSettings.of("ties"), tmp_path / "out")


def test_a_tokenizer_with_more_ids_than_the_base_has_rows_is_refused(
    place: Path, tmp_path: Path, refuses: Callable
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "text")
    with refuses(FusionRouteError, tmp_path / "text", 321, 320):
        merge_members(
            place / "llama0", [place / "llama1"], MergeSettings.of("ties"), tmp_path / "out", text=tmp_path / "text"
        )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "bias lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, "ties it to lm_head.weight"),
    ],
)
def test_an_adapter_that_is_more_than_its_factors_is_refused(
    settings: dict[str, Any], word: str, place: Path, tmp_path: Path, refuses: Callable
) -> None:
    base = place / "llama0"
    save_adapter(base, tmp_path / "adapter", **{"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    with refuses(FusionRouteError, tmp_path / "adapter", word):
        merge_members(base, [tmp_path / "adapter"], MergeSettings.of("ties"), tmp_path / "out")


def test_another_kind_of_adapter_is_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "llama0")
    config = peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with refuses(FusionRouteError, tmp_path / "adapter", "LOHA"):
        merge_members(place / "llama0", [tmp_path / "adapter"], MergeSettings.of("ties"), tmp_path / "out")


@pytest.mark.parametrize("part", ["lora_magnitude_vector.weight", "lora_B.bias", "lora_A.weight"])
def test_a_stray_tensor_in_an_adapter_is_refused(part: str, place: Path, tmp_path: Path, refuses: Callable) -> None:
    name = f"base_model.model.model.layers.7.self_attn.q_proj.{part}"
    adapter = resaved(place / "adapter0", tmp_path / "adapter", lambda tensors: tensors.update({name: torch.ones(4)}))
    with refuses(FusionRouteError, adapter, name):
        merge_members(place / "llama0", [adapter], MergeSettings.of("ties"), tmp_path / "out")


def test_an_adapter_of_more_layers_is_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    larger = tiny.make_model(tmp_path / "larger", vocab_size=320, layers=3)
    tiny.make_adapter(tmp_path / "adapter", larger)
    with refuses(FusionRouteError, tmp_path / "adapter", place / "llama0", "model.layers.2"):
        merge_members(place / "llama0", [tmp_path / "adapter"], MergeSettings.of("ties"), tmp_path / "out")


def test_an_adapter_of_another_width_is_refused(place: Path, tmp_path: Path, refuses: Callable) -> None:
    wider = tiny.make_model(tmp_path / "wider", vocab_size=320, width=48)
    tiny.make_adapter(tmp_path / "adapter", wider)
    with refuses(FusionRouteError, tmp_path / "adapter", place / "llama0", "48", "32"):
        merge_members(place / "llama0", [tmp_path / "adapter"], MergeSettings.of("ties"), tmp_path / "out")


# ---- collections


def member_folders(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Expert name to the folders of its weights and its adapter, read from config.json."""
    return {
        spec["name"]: (folder / spec["source"], None if spec["adapter"] is None else folder / spec["adapter"])
        for spec in config_of(folder)["experts"]
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_collection_of_adapters_is_merged_on_their_base(
    method: str, make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = make_collection("adapters")
    merge_collection(folder, MergeSettings.of(method), tmp_path / "out")
    experts = member_folders(folder)
    base = experts["math"][0]
    adapters = [adapter for _, adapter in experts.values() if adapter is not None]
    merge_members(base, adapters, MergeSettings.of(method), tmp_path / "expected")
    assert_close(tmp_path / "out", tensors_of(tmp_path / "expected"), atol=0)


def test_a_collection_of_whole_models_is_merged_on_the_base_that_is_named(
    copy: Callable[[str], Path], place: Path, tmp_path: Path
) -> None:
    folder = copy("llama")
    # Both experts of one size, as fine-tunes of one model are.
    rewrite(folder, lambda config: config["experts"][0].update(source=str(place / "llama1"), digest=None))
    settings = MergeSettings.of("task-arithmetic")
    merge_collection(folder, settings, tmp_path / "out", base=str(place / "llama0"))
    models = [place / "llama0", *(model for model, _ in member_folders(folder).values())]
    base, first, second = map(tensors_of, models)
    assert_close(tmp_path / "out", {n: first[n] + second[n] - base[n] for n in base})


def test_whole_models_without_a_base_are_refused(
    make_collection: Callable[[str], Path], tmp_path: Path, refuses: Callable
) -> None:
    with refuses(UsageError, "--base"):
        merge_collection(make_collection("llama"), MergeSettings.of("ties"), tmp_path / "out")


def test_adapters_on_two_bases_are_refused(copy: Callable[[str], Path], tmp_path: Path, refuses: Callable) -> None:
    folder = copy("two_bases")
    found = member_folders(folder)
    with refuses(UsageError, found["math"][0], found["code"][0]):
        merge_collection(folder, MergeSettings.of("ties"), tmp_path / "out")


def test_the_bare_base_among_the_experts_has_no_delta(make_collection: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_collection("bare")
    merge_collection(folder, MergeSettings.of("task-arithmetic"), tmp_path / "out")
    base, adapter = member_folders(folder)["code"]
    assert adapter is not None
    assert_close(tmp_path / "out", tensors_of(unloaded(base, adapter, tmp_path / "unloaded")))


def test_an_expert_of_another_family_is_refused(
    make_collection: Callable[[str], Path], tmp_path: Path, refuses: Callable
) -> None:
    with refuses(FusionRouteError, "gemma2", "llama"):
        merge_collection(make_collection("mixed"), MergeSettings.of("ties"), tmp_path / "out")


def test_the_merged_model_speaks_with_the_collections_tokenizer(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("adapters")
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    merge_collection(folder, MergeSettings.of("ties"), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[-1]['content'] }}"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [1, 2]


def test_an_adapter_that_is_not_the_collections_is_refused(
    copy: Callable[[str], Path], tmp_path: Path, refuses: Callable
) -> None:
    folder = copy("adapters")
    file = folder / "expert_code" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with refuses(FusionRouteError, "code", "digest"):
        merge_collection(folder, MergeSettings.of("ties"), tmp_path / "out")


def test_base_weights_that_are_not_the_collections_are_refused(
    copy: Callable[[str], Path], tmp_path: Path, refuses: Callable
) -> None:
    folder = copy("adapters")
    rewrite(folder, lambda config: config["experts"][1].update(digest="sha256:" + "0" * 64))
    with refuses(FusionRouteError, "code", "digest", "--base"):
        merge_collection(folder, MergeSettings.of("ties"), tmp_path / "out")


def test_another_base_under_the_adapters_takes_their_bases_place_with_a_warning(
    make_collection: Callable[[str], Path], place: Path, tmp_path: Path
) -> None:
    folder = make_collection("bare")
    with pytest.warns(UserWarning, match="digest"):
        merge_collection(folder, MergeSettings.of("task-arithmetic"), tmp_path / "out", base=str(place / "llama2"))
    _, adapter = member_folders(folder)["code"]
    assert adapter is not None
    assert_close(tmp_path / "out", tensors_of(unloaded(place / "llama2", adapter, tmp_path / "unloaded")))
