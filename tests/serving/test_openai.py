"""The stock client against a server that listens."""

import asyncio
import json
import math
from typing import Any

import openai
import pytest
import torch
from tests.serving.conftest import NAME, Live, Start

from fusionroute import FusionRouteForCausalLM, Request, encode_chat, load_tokenizer
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.sampling import Sampling

ASK: Any = [{"role": "user", "content": "How many cows has he now?"}]
OTHER: Any = [{"role": "user", "content": "Write a function that returns the sum of a list."}]


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return live.client()


@pytest.fixture(scope="module")
def alone(folder: Any) -> Any:
    """What the engine writes without a server: (messages, request settings) to a completion."""
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(folder), load_tokenizer(folder)

    def write(messages: Any, **settings: Any) -> Any:
        return Engine(model, tokenizer).generate([Request(encode_chat(tokenizer, messages), **settings)])[0]

    return write


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [
        "tiny", "tiny@expert=math,alpha=0", "tiny@expert=code,alpha=0", "tiny@expert=router", "tiny@routing=query"
    ]  # fmt: skip
    assert client.models.retrieve(names[1]).id == names[1]


def test_a_chat_is_what_the_engine_writes(client: openai.OpenAI, alone: Any) -> None:
    reply = client.chat.completions.create(model=NAME, messages=ASK, temperature=0, max_tokens=24)
    expected = alone(ASK, max_new_tokens=24)
    (choice,) = reply.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish
    assert reply.usage.completion_tokens == len(expected.tokens)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    trace = choice.model_extra["fusionroute"]
    assert [token["id"] for token in trace["tokens"]] == expected.ids
    assert [token["expert"] for token in trace["tokens"]] == [token.expert for token in expected.tokens]
    assert sum(trace["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        ("tiny@expert=math", {"expert": "math"}),
        ("tiny@expert=math,alpha=0", {"expert": "math", "alpha": 0.0}),
        ("tiny@expert=router", {"expert": "router"}),
        ("tiny@alpha=0.3", {"alpha": 0.3}),
        ("tiny@routing=query", {"routing": "query"}),
        ("tiny@routing=uniform", {"routing": "uniform"}),
    ],
)
def test_policies(client: openai.OpenAI, alone: Any, model: str, policy: dict[str, Any]) -> None:
    reply = client.chat.completions.create(model=model, messages=ASK, temperature=0, max_tokens=16)
    assert reply.choices[0].message.content == alone(ASK, max_new_tokens=16, **policy).text
    extra = client.chat.completions.create(model=NAME, messages=ASK, temperature=0, max_tokens=16, extra_body=policy)
    assert extra.choices[0].message.content == reply.choices[0].message.content


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    settings: Any = {"model": NAME, "messages": ASK, "seed": 5, "max_tokens": 24, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert all(c.choices[0].finish_reason is None for c in chunks[:-2])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    found = [each for c in chunks[1:-1] for each in c.choices[0].logprobs.content]
    assert found == whole.choices[0].logprobs.content
    traces = [token for c in chunks[1:-1] for token in c.choices[0].model_extra["fusionroute"]["tokens"]]
    assert traces == whole.choices[0].model_extra["fusionroute"]["tokens"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_no_usage_unless_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=NAME, messages=ASK, max_tokens=4, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_the_same_seed_is_the_same_text_alone_and_in_company(client: openai.OpenAI, live: Live) -> None:
    settings: Any = {"model": NAME, "messages": ASK, "seed": 11, "temperature": 1.0, "max_tokens": 24}
    alone = client.chat.completions.create(**settings).choices[0].message.content

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as many:
            others = [many.chat.completions.create(**{**settings, "messages": OTHER, "seed": i}) for i in range(6)]
            replies = await asyncio.gather(*others, many.chat.completions.create(**settings))
        return [reply.choices[0].message.content for reply in replies]

    texts = asyncio.run(together())
    assert texts[-1] == alone
    assert len(set(texts[:-1])) > 1


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    texts = {
        client.chat.completions.create(model=NAME, messages=ASK, max_tokens=16).choices[0].message.content
        for _ in range(4)
    }
    assert len(texts) > 1


def test_several_choices(client: openai.OpenAI, alone: Any) -> None:
    reply = client.chat.completions.create(model=NAME, messages=ASK, n=3, seed=2, max_tokens=12)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) == 3
    first = alone(ASK, max_new_tokens=12, sampling=Sampling(1.0, seed=2))
    assert reply.choices[0].message.content == first.text


@pytest.mark.parametrize("many", [False, True])
def test_stop_strings_are_left_out(client: openai.OpenAI, many: bool) -> None:
    free = (
        client.chat.completions.create(model=NAME, messages=ASK, temperature=0, max_tokens=24)
        .choices[0]
        .message.content
    )
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    reply = client.chat.completions.create(
        model=NAME, messages=ASK, temperature=0, max_tokens=24, stop=[stop, "never that"] if many else stop
    )
    assert reply.choices[0].message.content == free[: free.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_logprobs_are_of_the_fused_distribution(client: openai.OpenAI, folder: Any) -> None:
    reply = client.chat.completions.create(
        model=NAME, messages=ASK, temperature=1.7, seed=3, max_tokens=6, logprobs=True, top_logprobs=4
    )
    ids = encode_chat(load_tokenizer(folder), ASK)
    written = [token["id"] for token in reply.choices[0].model_extra["fusionroute"]["tokens"]]
    with torch.no_grad():
        logits = FusionRouteForCausalLM.from_pretrained(folder)(torch.tensor([ids + written])).logits[0]
    expected = logits.float().log_softmax(-1)[len(ids) - 1 :]
    assert written
    for row, token, found in zip(expected[:-1], written, reply.choices[0].logprobs.content, strict=True):
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [each.logprob for each in found.top_logprobs] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_completions(client: openai.OpenAI, folder: Any) -> None:
    reply = client.completions.create(model=NAME, prompt=["A farmer", "def add("], temperature=0, max_tokens=8, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].text == reply.choices[1].text != reply.choices[2].text
    ids = load_tokenizer(folder)("A farmer")["input_ids"]
    by_ids = client.completions.create(model=NAME, prompt=ids, temperature=0, max_tokens=8)
    assert by_ids.choices[0].text == reply.choices[0].text


def test_the_default_length_of_a_completion_is_the_protocols(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=NAME, prompt="A farmer", extra_body={"ignore_eos": True})
    assert reply.usage.completion_tokens == 16


def test_an_echo_scores_its_prompt(client: openai.OpenAI, folder: Any) -> None:
    text = "A farmer has 12 cows"
    reply = client.completions.create(model=NAME, prompt=text, echo=True, logprobs=1, max_tokens=0, temperature=0)
    ids = load_tokenizer(folder)(text)["input_ids"]
    with torch.no_grad():
        expected = FusionRouteForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    (choice,) = reply.choices
    assert choice.text == text
    assert choice.logprobs.token_logprobs[0] is None
    scores = [float(expected[i, token]) for i, token in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(scores, abs=1e-4)
    assert "".join(choice.logprobs.tokens) == text
    assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])


def test_an_echo_stands_before_its_answer(client: openai.OpenAI) -> None:
    text = "A farmer has"
    plain = client.completions.create(model=NAME, prompt=text, max_tokens=5, temperature=0, logprobs=2)
    echo = client.completions.create(model=NAME, prompt=text, max_tokens=5, temperature=0, logprobs=2, echo=True)
    assert echo.choices[0].text == text + plain.choices[0].text
    count = len(plain.choices[0].logprobs.tokens)
    assert echo.choices[0].logprobs.token_logprobs[-count:] == plain.choices[0].logprobs.token_logprobs


def test_streamed_completions(client: openai.OpenAI) -> None:
    settings: Any = {"model": NAME, "prompt": "A farmer", "seed": 1, "max_tokens": 10}
    whole = client.completions.create(**settings)
    pieces = list(client.completions.create(**settings, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_a_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"cows": {"type": "integer", "minimum": 0, "maximum": 50}, "sure": {"type": "boolean"}},
        "required": ["cows", "sure"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "cows", "schema": schema, "strict": True}}
    for seed in range(3):
        reply = client.chat.completions.create(
            model=NAME, messages=ASK, response_format=wanted, seed=seed, max_tokens=120, temperature=0.8
        )
        found = json.loads(reply.choices[0].message.content)
        assert 0 <= found["cows"] <= 50
        assert found["sure"] in (True, False)


def test_a_bias_forces_a_token(client: openai.OpenAI, folder: Any) -> None:
    (token,) = load_tokenizer(folder)("A", add_special_tokens=False)["input_ids"]
    reply = client.chat.completions.create(
        model=NAME, messages=ASK, max_tokens=3, temperature=0, logit_bias={str(token): 100}
    )
    assert reply.choices[0].message.content == "AAA"


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_penalties(client: openai.OpenAI, alone: Any, folder: Any, name: Any) -> None:
    (token,) = load_tokenizer(folder)("A", add_special_tokens=False)["input_ids"]
    settings: Any = {"model": NAME, "messages": ASK, "max_tokens": 24, "temperature": 0}
    settings |= {"logit_bias": {str(token): 1.0}, "extra_body": {"ignore_eos": True}}
    free = client.chat.completions.create(**settings)
    held = client.chat.completions.create(**settings, **{name: 2.0})
    expected = alone(ASK, max_new_tokens=24, sampling=Sampling(bias={token: 1.0}, **{name: 2.0}), ignore_end=True)
    assert held.choices[0].message.content == expected.text != free.choices[0].message.content


def test_the_vllm_extras(client: openai.OpenAI, live: Live) -> None:
    greedy = client.chat.completions.create(model=NAME, messages=ASK, temperature=0, max_tokens=8)
    top = client.chat.completions.create(
        model=NAME, messages=ASK, temperature=1.0, max_tokens=8, extra_body={"top_k": 1, "min_p": 0.0}
    )
    assert top.choices[0].message.content == greedy.choices[0].message.content
    ends = {str(end): 100 for end in live.engine.ends}
    ended = client.chat.completions.create(model=NAME, messages=ASK, temperature=0, max_tokens=8, logit_bias=ends)
    assert ended.usage.completion_tokens == 0
    assert ended.choices[0].finish_reason == "stop"
    least = client.chat.completions.create(
        model=NAME, messages=ASK, temperature=0, max_tokens=8, logit_bias=ends, extra_body={"min_tokens": 3}
    )
    assert least.usage.completion_tokens == 3
    ignored = client.chat.completions.create(
        model=NAME, messages=ASK, temperature=0, max_tokens=8, logit_bias=ends, extra_body={"ignore_eos": True}
    )
    assert (ignored.usage.completion_tokens, ignored.choices[0].finish_reason) == (8, "length")


def test_a_stream_of_several_choices(client: openai.OpenAI) -> None:
    settings: Any = {"model": NAME, "messages": ASK, "n": 3, "seed": 5, "max_tokens": 12, "stop": ["e"]}
    whole = client.chat.completions.create(**settings)
    texts, reasons = ["", "", ""], ["", "", ""]
    for chunk in client.chat.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            assert "fusionroute" in (choice.model_extra or {})
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_min_p_and_the_repetition_penalty(client: openai.OpenAI, folder: Any) -> None:
    def written(**extra: float) -> str:
        reply = client.chat.completions.create(
            model=NAME, messages=ASK, max_tokens=8, temperature=3.0, seed=2, extra_body={"ignore_eos": True, **extra}
        )
        return reply.choices[0].message.content or ""

    greedy = client.chat.completions.create(
        model=NAME, messages=ASK, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert written() != greedy.choices[0].message.content
    assert written(min_p=1.0) == greedy.choices[0].message.content
    held = client.chat.completions.create(
        model=NAME,
        messages=ASK,
        max_tokens=30,
        temperature=0,
        extra_body={"ignore_eos": True, "repetition_penalty": 1e6},
    )
    ids = [token["id"] for token in held.choices[0].model_extra["fusionroute"]["tokens"]]
    assert len({*ids, *encode_chat(load_tokenizer(folder), ASK)}) == len(ids) + len(
        set(encode_chat(load_tokenizer(folder), ASK))
    )


def test_any_json_object(client: openai.OpenAI) -> None:
    for seed in range(4):
        reply = client.chat.completions.create(
            model=NAME, messages=ASK, response_format={"type": "json_object"}, seed=seed, max_tokens=400
        )
        if reply.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(reply.choices[0].message.content), dict)
            return
    pytest.fail("no object came to its end")


def test_candidates_of_every_side(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=NAME, messages=ASK, temperature=0, max_tokens=4, extra_body={"candidates": 3}
    )
    for token in reply.choices[0].model_extra["fusionroute"]["tokens"]:
        sides = token["candidates"]
        assert [len(sides[side]) for side in ("fused", "expert", "router")] == [3, 3, 3]
        assert sides["fused"][0]["id"] == token["fused_choice"]
        assert sides["expert"][0]["id"] == token["expert_choice"]
        assert sides["router"][0]["id"] == token["router_choice"]
        assert sum(math.exp(each["logprob"]) for each in sides["fused"]) <= 1.001


def test_a_conversation_is_read_once(live: Live) -> None:
    client, messages = live.client(), list(OTHER)
    first = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=24)
    spared = live.engine.prefixes.spared
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *ASK]
    second = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=12)
    assert live.engine.prefixes.spared - spared >= first.usage.prompt_tokens
    live.engine.prefixes.shrink(0)
    again = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=12)
    assert again.choices[0].message.content == second.choices[0].message.content


def test_async_and_timeouts(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(
            model=NAME, messages=ASK, max_tokens=8, extra_body={"ignore_eos": True}
        )

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            assert (await ask(client)).usage.completion_tokens == 8
        live.slowed(monkeypatch, 0.2)
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", timeout=0.5, max_retries=0) as hurried:
            with pytest.raises(openai.APITimeoutError):
                await ask(hurried)
            assert live.engine.active

    asyncio.run(run())
    assert live.idle()


def test_a_wrong_key(start: Start) -> None:
    guarded = start(key="right")
    assert guarded.client().chat.completions.create(model=NAME, messages=ASK, max_tokens=2).choices
    with pytest.raises(openai.AuthenticationError) as refusal:
        guarded.client(api_key="wrong").models.list()
    assert refusal.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("settings", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"model": "tiny@expert=law"}, openai.NotFoundError, "model"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x " * 2000}]}, openai.BadRequestError, "messages"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"logit_bias": {"many": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, openai.BadRequestError, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "add"}}]}, openai.BadRequestError, "tools"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "response_format"),
    ],
)
def test_what_cannot_be_done_is_refused(client: openai.OpenAI, settings: Any, error: Any, param: str) -> None:
    with pytest.raises(error) as refusal:
        client.chat.completions.create(**{"model": NAME, "messages": ASK, "max_tokens": 2, **settings})
    assert (refusal.value.param or "").split(".")[0] == param
    assert refusal.value.body["message"]


def test_unknown_parameters_are_ignored(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(
        model=NAME, messages=ASK, max_tokens=2, extra_body={"from_another_server": 1}, user="me", store=False
    ).choices


def test_there_are_no_embeddings(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model=NAME, input="text")


def test_lm_evals_local_completions(live: Live, folder: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from fusionroute.evaluation.harness import FusionRouteLM

    theirs = LocalCompletionsAPI(
        model=NAME, base_url=f"{live.url}/v1/completions", tokenizer=str(folder), tokenizer_backend="huggingface",
        max_length=512, batch_size=2,
    )  # fmt: skip
    ours = FusionRouteLM(collection=str(folder), dtype="float32", batch_size=1)
    pairs = [("A farmer has", " 12 cows"), ("def add(a, b):", "\n    return a + b"), ("He", " has")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for found, expected in zip(theirs.loglikelihood(requests), ours.loglikelihood(requests), strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-3)
        assert found[1] == expected[1]
    asked = [
        Instance("generate_until", {}, (text, {"until": ["q"], "max_gen_toks": 12}), i)
        for i, (text, _) in enumerate(pairs)
    ]
    assert theirs.generate_until(asked) == ours.generate_until(asked)


def test_prompts_of_one_request_are_drawn_apart(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=NAME, prompt=["A farmer"] * 4, max_tokens=12)
    assert len({choice.text for choice in reply.choices}) > 1


def test_without_a_length_there_is_a_default(start: Start) -> None:
    short = start(default_tokens=7)
    reply = short.client().chat.completions.create(model=NAME, messages=ASK, extra_body={"ignore_eos": True})
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (7, "length")


def test_an_end_has_its_place_among_the_logprobs_of_a_completion(client: openai.OpenAI, live: Live) -> None:
    ends = {str(end): 100 for end in live.engine.ends}
    reply = client.completions.create(
        model=NAME, prompt="A farmer", max_tokens=1, logprobs=1, echo=True, temperature=0, logit_bias=ends
    )
    (choice,) = reply.choices
    assert choice.text == "A farmer"
    assert len(choice.logprobs.token_logprobs) == reply.usage.prompt_tokens + 1


TOOLS: Any = [
    {"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def calling(start: Start) -> openai.OpenAI:
    """A server whose chat template tells of tools as Qwen2.5's does."""
    live = start()
    tokenizer = live.service.asking.tokenizer
    tokenizer.chat_template = (
        "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}Answer with <tool_call>.{% endif %}"
        + tokenizer.chat_template
    )
    return live.client()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_tool_is_called(calling: openai.OpenAI, choice: Any) -> None:
    for seed in range(3):
        settings: Any = {"model": NAME, "messages": ASK, "tools": TOOLS, "tool_choice": choice, "seed": seed}
        (reply,) = calling.chat.completions.create(**settings, max_tokens=200).choices
        (call,) = reply.message.tool_calls
        assert reply.finish_reason == "tool_calls"
        assert reply.message.content is None
        assert call.function.name in ({"add", "stop"} if choice == "required" else {"add"})
        if call.function.name == "add":
            assert json.loads(call.function.arguments)["a"] in (1, 2)
        chunks = list(calling.chat.completions.create(**settings, max_tokens=200, stream=True))
        (streamed,) = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
        assert not "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_calls_is_understood(calling: openai.OpenAI) -> None:
    messages: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "15"},
    ]  # fmt: skip
    assert calling.chat.completions.create(model=NAME, messages=messages, tools=TOOLS, max_tokens=4).choices


def test_tools_may_be_left_alone(calling: openai.OpenAI) -> None:
    plain = calling.chat.completions.create(model=NAME, messages=ASK, temperature=0, max_tokens=8)
    none = calling.chat.completions.create(
        model=NAME, messages=ASK, temperature=0, max_tokens=8, tools=TOOLS, tool_choice="none"
    )
    assert none.choices[0].message.content == plain.choices[0].message.content


def test_a_tool_that_there_is_not(calling: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        calling.chat.completions.create(
            model=NAME, messages=ASK, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "law"}}
        )
