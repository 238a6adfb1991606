"""Annotations equal the live experts, survive a kill, and are never taken for another's."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute import tiny
from fusionroute.collection import read_config
from fusionroute.configuration import MemberSpec
from fusionroute.errors import FusionRouteError
from fusionroute.lm_head import Head
from fusionroute.members import LoadOptions, Member, load_members
from fusionroute.router import RouteHead
from fusionroute.training import annotation
from fusionroute.training.annotation import (
    annotate,
    annotate_batch,
    batches,
    read_columns,
    sequences_of,
    with_annotations,
)
from fusionroute.training.data import Item, Tokens

FLOAT32 = LoadOptions(dtype=torch.float32)


def random_sequences(count: int, *, vocab: int = 320, seed: int = 0, longest: int = 20) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for _ in range(count):
        prompt, length = (torch.randint(1, longest, (2,), generator=generator)).tolist()
        sequences.append(
            Tokens(tuple(torch.randint(0, vocab, (prompt + length,), generator=generator).tolist()), prompt)
        )
    return sequences


def same(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(left, right, strict=True)
    )


def shards(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("."))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expert")
    tiny.make_model(folder, seed=4)
    return folder


@pytest.fixture
def member(model_folder: Path) -> Member:
    (loaded,) = load_members([MemberSpec("math", str(model_folder))], None, FLOAT32)
    return loaded


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation, "SHARD", 4)


# ------------------------------------------------------------------------------------------------ live experts


def live(spec: MemberSpec, collection: Path, sequence: Tokens, vocab: int) -> torch.Tensor:
    """[L, V] log-probabilities at the completion, from transformers and PEFT alone, one sequence and no padding."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def place(path: str) -> Path:
        return collection / path if path.startswith("./") else Path(path)

    model: Any = AutoModelForCausalLM.from_pretrained(place(spec.source), dtype=torch.float32)
    if spec.adapter is not None:
        model = PeftModel.from_pretrained(model, str(place(spec.adapter)))
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([sequence.ids])).logits[0, sequence.start - 1 : -1, :vocab]
    return logits.float().log_softmax(-1)


def test_annotations_are_the_live_experts(any_collection: Path, tmp_path: Path) -> None:
    config = read_config(any_collection)
    sequences = random_sequences(5, vocab=config.vocab_size)
    # All members loaded together, so that the adapters of one base could disturb each other.
    members = load_members(config.member_specs, any_collection, FLOAT32)
    for spec, loaded in zip(config.member_specs, members, strict=True):
        columns = read_columns(annotate(loaded, sequences, tmp_path, config.vocab_size), sequences)
        for sequence, column in zip(sequences, columns, strict=True):
            expected = live(spec, any_collection, sequence, config.vocab_size)
            labels = torch.tensor(sequence.completion)
            torch.testing.assert_close(
                column["logprobs"], expected[torch.arange(len(labels)), labels], rtol=1e-4, atol=1e-4, msg=spec.name
            )
            assert column["greedy"].tolist() == expected.argmax(-1).tolist(), spec.name
            assert (column["logprobs"].dtype, column["greedy"].dtype) == (torch.float32, torch.int32)


def test_experts_disagree_in_the_fixture(make_collection: Callable[[str], Path], tmp_path: Path) -> None:
    # If adapters were ignored, the comparison above could pass for a bare base only by their being equal.
    folder = make_collection("adapters")
    config = read_config(folder)
    sequences = random_sequences(3)
    members = load_members(config.expert_specs, folder, FLOAT32)
    left, right = (read_columns(annotate(m, sequences, tmp_path, config.vocab_size), sequences) for m in members)
    assert not same(left, right)


def test_members_on_one_base_take_turns(make_collection: Callable[[str], Path]) -> None:
    folder = make_collection("adapters")
    config = read_config(folder)
    sequences = random_sequences(2, vocab=config.vocab_size)
    members = load_members(config.expert_specs, folder, FLOAT32)
    first, second = [[annotate_batch(m, Head(m.model), sequences) for m in members] for _ in range(2)]
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert not same(first[0], first[1])


def test_dropout_of_an_adapter_is_off(model_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(tmp_path / "adapter")
    spec = MemberSpec("math", str(model_folder), adapter=str(tmp_path / "adapter"))
    (loaded,) = load_members([spec], None, FLOAT32)
    (sequence,) = random_sequences(1)
    (column,) = read_columns(annotate(loaded, [sequence], tmp_path / "out", 320), [sequence])
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    own = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = own(input_ids=torch.tensor([sequence.ids])).logits[0, sequence.start - 1 : -1].log_softmax(-1)
    labels = torch.tensor(sequence.completion)
    torch.testing.assert_close(column["logprobs"], expected[torch.arange(len(labels)), labels], rtol=1e-4, atol=1e-4)


def test_annotating_leaves_the_weights_as_they_were(member: Member, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in member.model.state_dict().items()}
    annotate(member, random_sequences(3), tmp_path, 320)
    assert all(torch.equal(p, before[name]) for name, p in member.model.state_dict().items())


# ----------------------------------------------------------------------------------------------------- batches


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), max_size=50), budget=st.integers(1, 200), data=st.data())
def test_batches_respect_the_budget(lengths: list[int], budget: int, data: st.DataObject) -> None:
    sequences = [Tokens(tuple(range(n)), 1) for n in lengths]
    indices = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True)) if lengths else []
    got = list(batches(sequences, indices, budget))
    assert sorted(i for batch in got for i in batch) == sorted(indices)
    for batch in got:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_numbers_do_not_depend_on_the_batch(member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = random_sequences(9)
    together = read_columns(annotate(member, sequences, tmp_path / "a", 320), sequences)
    monkeypatch.setattr(annotation.batches, "__defaults__", (1,))
    alone = read_columns(annotate(member, sequences, tmp_path / "b", 320), sequences)
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left["logprobs"], right["logprobs"], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ resume


@pytest.mark.usefixtures("small_shards")
def test_finished_shards_are_not_computed_again(member: Member, tmp_path: Path) -> None:
    sequences = random_sequences(11)
    folder = annotate(member, sequences, tmp_path, 320)
    assert len(shards(folder)) == 3
    before = read_columns(folder, sequences)
    stats = {p: p.stat().st_mtime_ns for p in shards(folder)}
    shards(folder)[1].unlink()
    assert annotate(member, sequences, tmp_path, 320) == folder
    assert same(read_columns(folder, sequences), before)
    after = {p: p.stat().st_mtime_ns for p in shards(folder)}
    assert [stats[p] == after[p] for p in sorted(stats)] == [True, False, True]


@pytest.mark.usefixtures("small_shards")
def test_complete_annotations_run_no_model(member: Member, tmp_path: Path) -> None:
    sequences = random_sequences(5)
    folder = annotate(member, sequences, tmp_path, 320)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    handle = member.model.register_forward_pre_hook(fail)
    inner = member.model.get_decoder().register_forward_pre_hook(fail)
    assert annotate(member, sequences, tmp_path, 320) == folder
    handle.remove()
    inner.remove()


@pytest.mark.usefixtures("small_shards")
def test_truncated_shard_is_one_line_and_its_removal_mends_it(member: Member, tmp_path: Path) -> None:
    sequences = random_sequences(11)
    folder = annotate(member, sequences, tmp_path, 320)
    before = read_columns(folder, sequences)
    broken = shards(folder)[2]
    broken.write_bytes(broken.read_bytes()[:-5])
    with pytest.raises(FusionRouteError, match=broken.name) as error:
        read_columns(annotate(member, sequences, tmp_path, 320), sequences)
    assert "\n" not in str(error.value)
    broken.unlink()
    assert same(read_columns(annotate(member, sequences, tmp_path, 320), sequences), before)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from fusionroute.configuration import MemberSpec
from fusionroute.members import LoadOptions, load_members
from fusionroute.training import annotation
from fusionroute.training.data import Tokens

annotation.SHARD, model, out, ids = 4, sys.argv[1], Path(sys.argv[2]), eval(sys.argv[4])
sequences = [Tokens(tuple(i), s) for i, s in ids]

def run(kill, out):
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    if kill:
        import fusionroute.files
        rename, count = os.replace, [0]
        def replace(source, target):
            if str(target).endswith(".safetensors"):
                count[0] += 1
                if count[0] == 2:
                    os.kill(os.getpid(), signal.SIGKILL)  # the second shard is written but has no name yet
            rename(source, target)
        fusionroute.files.os.replace = replace
    (member,) = load_members([MemberSpec("math", model)], None, LoadOptions(dtype=torch.float32))
    annotation.annotate(member, sequences, out, 320)
    os._exit(0)

assert os.WTERMSIG(run(True, out)) == signal.SIGKILL
(folder,) = out.iterdir()
print([p.name for p in sorted(folder.glob("0*.safetensors"))])
first = (folder / "00000.safetensors").stat().st_mtime_ns
assert run(False, out) == 0
assert (folder / "00000.safetensors").stat().st_mtime_ns == first
assert run(False, Path(sys.argv[3])) == 0  # by as many threads: float sums differ in the last bit with their number
print("resumed")
"""


def test_killed_annotation_goes_on(
    model_folder: Path, tmp_path: Path, run_script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = random_sequences(11)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = run_script(KILLED, model_folder, killed, whole, [(s.ids, s.start) for s in sequences])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['00000.safetensors']", "resumed"]
    (resumed,), (uninterrupted,) = killed.iterdir(), whole.iterdir()
    assert resumed.name == uninterrupted.name
    assert len(shards(resumed)) == 3
    monkeypatch.setattr(annotation, "SHARD", 4)
    assert same(read_columns(resumed, sequences), read_columns(uninterrupted, sequences))


# ------------------------------------------------------------------------------------------ what is whose, errors


def test_folder_depends_on_all_that_the_numbers_do(
    model_folder: Path, make_head: Callable[..., RouteHead], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    for seed in (1, 2):
        tiny.make_adapter(tmp_path / f"adapter{seed}", model, seed=seed)
    shutil.copytree(tmp_path / "adapter1", tmp_path / "scaled")
    settings_file = tmp_path / "scaled" / "adapter_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"lora_alpha": 99}))
    tiny.make_model(tmp_path / "other", seed=5)
    rows = random_sequences(3)
    moved = [Tokens(rows[0].ids, rows[0].start + 1 if len(rows[0].completion) > 1 else rows[0].start - 1), *rows[1:]]

    def folder(
        sequences: list[Tokens] = rows,
        source: Path = model_folder,
        adapter: str | None = None,
        vocab: int = 320,
        options: LoadOptions = FLOAT32,
        head: RouteHead | None = None,
    ) -> str:
        spec = MemberSpec("math", str(source), adapter=None if adapter is None else str(tmp_path / adapter))
        (loaded,) = load_members([spec], None, options)
        return annotate(loaded, sequences, tmp_path / "out", vocab, route_head=head).name

    names = [
        folder(),
        folder(rows[:2]),
        folder(rows[::-1]),
        folder(moved),
        folder(source=tmp_path / "other"),
        folder(adapter="adapter1"),
        folder(adapter="adapter2"),
        folder(adapter="scaled"),
        folder(options=LoadOptions(dtype=torch.bfloat16)),
        folder(options=LoadOptions(dtype=torch.float32, attn_implementation="eager")),
        folder(head=make_head(seed=1)),
        folder(head=make_head(seed=2)),
        folder([Tokens(tuple(i % 300 for i in s.ids), s.start) for s in rows], vocab=300),
    ]
    assert len(set(names)) == len(names)
    assert folder() == names[0]
    assert all((tmp_path / "out" / name / "key.json").is_file() for name in names)


@pytest.mark.usefixtures("small_shards")
def test_incomplete_folder(member: Member, tmp_path: Path) -> None:
    sequences = random_sequences(11)
    folder = annotate(member, sequences, tmp_path, 320)
    shards(folder)[1].unlink()
    with pytest.raises(FusionRouteError, match=r"00001.safetensors is missing.*annotate") as error:
        read_columns(folder, sequences)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [random_sequences(3, seed=1), random_sequences(2), random_sequences(4)])
def test_data_of_another_size_is_refused(member: Member, tmp_path: Path, other: list[Tokens]) -> None:
    folder = annotate(member, random_sequences(3), tmp_path, 320)
    with pytest.raises(FusionRouteError, match="tokens, the data has") as error:
        read_columns(folder, other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("foreign", ["other ids", "another order"])
def test_other_data_of_the_same_size_is_refused(member: Member, tmp_path: Path, foreign: str) -> None:
    sequences = random_sequences(3)
    folder = annotate(member, sequences, tmp_path, 320)
    other = [Tokens(tuple(reversed(s.ids)), s.start) for s in sequences] if foreign == "other ids" else sequences[::-1]
    with pytest.raises(FusionRouteError):
        read_columns(folder, other)


def test_ids_beyond_the_common_vocabulary(member: Member, tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match=r"token id 310, the common vocabulary 300"):
        annotate(member, [Tokens((1, 310), 1)], tmp_path, 300)
    assert not any(tmp_path.iterdir())


def test_a_member_that_computes_nan(member: Member, tmp_path: Path) -> None:
    # LlamaRMSNorm keeps NaN, as overflow in half precision would.
    member.model.get_decoder().norm.weight.data[0] = float("nan")
    with pytest.raises(FusionRouteError, match="not finite"):
        annotate(member, random_sequences(2), tmp_path, 320)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_with_annotations_stacks_experts_in_route_order(
    make_collection: Callable[[str], Path], make_head: Callable[..., RouteHead], tmp_path: Path
) -> None:
    folder = make_collection("mixed")
    config = read_config(folder)
    rows = random_sequences(6, vocab=config.vocab_size)
    items = [Item((rows[0],), "a"), Item((rows[1], rows[2]), "b"), Item((rows[3],), "a"), Item((rows[4], rows[5]), "b")]
    router, *experts = load_members(config.member_specs, folder, FLOAT32)
    folders = {m.name: annotate(m, sequences_of(items), tmp_path, config.vocab_size) for m in experts}
    head = make_head(router.config.hidden_size, tuple(config.expert_names))
    folders["router"] = annotate(router, sequences_of(items), tmp_path, config.vocab_size, route_head=head)
    order = config.expert_names[::-1]
    annotated = with_annotations(items, [folders[name] for name in order], folders["router"])
    assert [(i.sequences, i.domain) for i in annotated] == [(i.sequences, i.domain) for i in items]
    flat = [side for item in annotated for side in item.annotations]
    for index, name in enumerate(order):
        for side, column in zip(flat, read_columns(folders[name], rows), strict=True):
            assert torch.equal(side["logprobs"][:, index], column["logprobs"])
            assert torch.equal(side["greedy"][:, index], column["greedy"])
    for side, column in zip(flat, read_columns(folders["router"], rows), strict=True):
        assert torch.equal(side["reference"], column["logprobs"])
        assert torch.equal(side["routes"], column["routes"])
    router.activate()
    for row, side in zip(rows, flat, strict=True):
        with torch.no_grad():
            output = router.model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        scores = output.hidden_states[-1][0, row.start - 1 : -1] @ head.weight.T
        assert side["routes"].tolist() == scores.argmax(-1).tolist()


def test_shards_are_readable_by_others(member: Member, tmp_path: Path) -> None:
    folder = annotate(member, random_sequences(2), tmp_path, 320)
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in shards(folder))
    assert {p.name for p in folder.iterdir()} == {"key.json", "00000.safetensors"}
    assert os.path.getsize(shards(folder)[0]) < 2000
