"""Pools: watermarks, catching up, and members that only transformers knows how to run."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.decoding.conftest import write

from fusionroute import FusionRouteForCausalLM, collection, tiny
from fusionroute.chat import Session
from fusionroute.configuration import MemberSpec
from fusionroute.decoding.drafting import PromptLookup, RouterDraft
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.members import Job, Members, PackedPool, PlainPool
from fusionroute.decoding.rows import Request
from fusionroute.decoding.sampling import Sampling
from fusionroute.errors import UsageError
from fusionroute.lm_head import hidden_states
from fusionroute.members import Member
from fusionroute.router import RouteHead

ROW = list(range(40, 60))


def states(members: Members, model: FusionRouteForCausalLM, number: int, ids: list[int]) -> torch.Tensor:
    """What member `number` gives for a whole row, by transformers' own forward."""
    member = model.members[number]
    member.activate()
    with torch.no_grad():
        return hidden_states(member.model, input_ids=torch.tensor([ids]))[0]


@pytest.fixture
def adapters(collection: Callable[[str], FusionRouteForCausalLM]) -> FusionRouteForCausalLM:
    return collection("adapters")


def test_adapters_on_one_base_are_one_pool(adapters: FusionRouteForCausalLM) -> None:
    assert [type(pool) for pool in Members(adapters).pools] == [PackedPool]


def test_separate_members_have_pools_of_their_own(adapters: FusionRouteForCausalLM) -> None:
    assert len(Members(adapters, separate=True).pools) == 3


@torch.inference_mode()
def test_catching_up_and_the_new_token_are_one_pass(adapters: FusionRouteForCausalLM) -> None:
    members = Members(adapters)
    members.run([Job(1, 0, ROW[:8], 1)])
    (hidden,) = members.run([Job(1, 0, ROW[:15], 3)])
    assert torch.allclose(hidden, states(members, adapters, 1, ROW[:15])[-3:], atol=1e-4)
    assert members.passes == [2]
    assert members.tokens == [0, 15, 0]
    assert members.visits == 1


@torch.inference_mode()
def test_rejected_tokens_only_lower_the_watermark(adapters: FusionRouteForCausalLM) -> None:
    members = Members(adapters)
    members.run([Job(0, 0, [*ROW[:10], 7, 7, 7], 1), Job(2, 0, ROW[:6], 1)])
    members.rewind(0, 10)
    assert [members.seen(number, 0) for number in range(3)] == [10, 0, 6]
    (hidden,) = members.run([Job(0, 0, ROW, 1)])
    assert torch.allclose(hidden, states(members, adapters, 0, ROW)[-1:], atol=1e-4)


def test_a_released_row_leaves_nothing(adapters: FusionRouteForCausalLM) -> None:
    members = Members(adapters)
    members.run([Job(0, 3, ROW, 1)])
    members.release(3)
    assert members.allocated == 0
    assert members.seen(0, 3) == 0


@torch.inference_mode()
@pytest.mark.parametrize("shape", ["adapters", "gemma2", "plain"])
def test_a_fork_goes_on_by_itself(
    shape: str, collection: Callable[[str], FusionRouteForCausalLM], tmp_path: Path
) -> None:
    if shape == "plain":  # an architecture that only transformers knows how to run
        from transformers import Qwen3Config, Qwen3ForCausalLM

        model = make(tmp_path, Qwen3ForCausalLM(Qwen3Config(**SIZES)))
    else:
        model = collection(shape)
    members = Members(model)
    members.run([Job(1, 0, ROW[:10], 1)])
    members.fork(1, 0, -7)
    assert members.seen(1, -7) == 10
    one, other = [*ROW[:10], 50, 51], [*ROW[:10], 60, 61, 62]
    found = [*members.run([Job(1, -7, other, 1)]), *members.run([Job(1, 0, one, 1)])]
    for hidden, ids in zip(found, (other, one), strict=True):
        assert torch.allclose(hidden, states(members, model, 1, ids)[-1:], atol=1e-4)
    assert members.tokens[1] == 10 + 2 + 3
    members.release(-7)
    assert (members.seen(1, -7), members.seen(1, 0)) == (0, 12)


def make(root: Path, model: Any) -> FusionRouteForCausalLM:
    """A collection of a Llama router, `model` as expert math and a Llama as expert code."""
    tokenizer = tiny.make_tokenizer(root / "tokenizer")
    tiny.make_model(root / "router", seed=1)
    tiny.make_model(root / "code", seed=2)
    model.eval().save_pretrained(root / "math")
    for name in ("router", "math", "code"):
        tokenizer.save_pretrained(root / name)
    head = RouteHead(32, ["math", "code"])
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0), std=3)
    head.trained = True
    (root / "head").mkdir()
    head.save(root / "head")
    specs = [MemberSpec(name, str(root / name)) for name in ("router", "math", "code")]
    collection.assemble(root / "collection", specs[0], specs[1:], head=root / "head")
    made = FusionRouteForCausalLM.from_pretrained(root / "collection")
    made.generation_config.eos_token_id = None
    return made


SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("drafter", [None, PromptLookup(2, 1), RouterDraft()])
def test_an_architecture_the_packed_pass_does_not_know(drafter: Any, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = make(tmp_path, Qwen3ForCausalLM(Qwen3Config(**SIZES)))
    engine = Engine(model, drafter=drafter, draft_length=3)
    assert [type(pool) for pool in engine.members.pools] == [PackedPool, PlainPool, PackedPool]
    sampling = Sampling(temperature=1.0, seed=2)
    answers = engine.generate([Request(ROW[:n], 12, sampling) for n in (3, 9)])
    for answer, n in zip(answers, (3, 9), strict=True):
        expected = write(model, ROW[:n], sampling, 12)
        assert [(token.id, token.expert) for token in answer.tokens] == expected
    assert engine.members.allocated == 0


def test_nothing_is_drafted_for_a_cache_that_cannot_take_tokens_back(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    model = make(tmp_path, Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=6)))
    with pytest.raises(UsageError, match="cannot take tokens back"):
        Engine(model, drafter=PromptLookup())
    Session(str(model.folder), quiet=True)  # the command line does not draft then
    (answer,) = Engine(model).generate([Request(ROW, 8)])
    assert [(token.id, token.expert) for token in answer.tokens] == write(model, ROW, Sampling(), 8)


def test_adapters_of_the_lm_head_are_each_member_s_own(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny.make_model(tmp_path, tie_word_embeddings=False)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), "router")
    wrapped.add_adapter("math", LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    loaded: Any = [Member("router", model, wrapped, "router"), Member("math", model, wrapped, "math")]
    loaded.append(Member("code", model, wrapped))  # the base as it stands
    collected: Any = SimpleNamespace(members=loaded, config=SimpleNamespace(vocab_size=320))
    members = Members(collected, blocks=False)
    assert [type(pool) for pool in members.pools] == [PlainPool] * 3
    with torch.inference_mode():
        hidden = members.run([Job(number, 0, ROW, 1) for number in range(3)])
        found = members.logits(list(enumerate(hidden)))
        for member, logits in zip(loaded, found, strict=True):
            expected = member(input_ids=torch.tensor([ROW])).logits[0, -1:]
            assert torch.allclose(logits, expected, atol=1e-4)
