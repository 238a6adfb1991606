"""A request of the protocol becomes rows of the engine: prompts as ids, sampling, stops, policy, limits."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from fusionroute.collection import encode_chat
from fusionroute.configuration import FusionRouteConfig
from fusionroute.decoding.rows import Request
from fusionroute.decoding.sampling import Sampling
from fusionroute.errors import UsageError, first_line
from fusionroute.serving import policies, tools
from fusionroute.serving.errors import ApiError
from fusionroute.serving.grammar import Grammars
from fusionroute.serving.schema import ChatRequest, CompletionRequest, Message, NamedTool, ToolCall
from fusionroute.serving.settings import Limits

_COMPLETION_TOKENS = 16  # the protocol's default of `max_tokens` there
ECHO_TOKENS = 2048  # of a prompt whose own log-probabilities are asked for: every member's logits at once
# What templates and tokenizers raise on texts that are none.
_UNREADABLE = (TemplateError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class Asked:
    """What one request comes to.

    Attributes:
        rows: one a choice; those of one prompt stand together.
        prompts: their ids; of each, `n` rows.
        calls: functions may be called.
    """

    rows: list[Request]
    prompts: list[list[int]]
    n: int
    calls: bool = False

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


class Asking:
    """What a collection can be asked.

    Args:
        name: of the collection, as clients see it.
        tokenizer: that nobody else uses at the same time.
        defaults: sampling where a request says nothing, from the collection's generation settings.
        ends: end ids.
    """

    def __init__(
        self,
        name: str,
        config: FusionRouteConfig,
        tokenizer: Any,
        limits: Limits,
        defaults: dict[str, Any],
        ends: Sequence[int],
    ) -> None:
        self.name, self.config, self.tokenizer, self.limits, self.defaults = name, config, tokenizer, limits, defaults
        self.ends = sorted(ends)
        self._longest = max(map(len, tokenizer.get_vocab()))  # characters of a token, at the most
        self._grammars: Grammars | None = None

    @property
    def grammars(self) -> Grammars:
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.config.vocab_size, self.ends)
        return self._grammars

    def chat(self, body: ChatRequest) -> Asked:
        """Rows of a conversation's next turn.

        Raises:
            ApiError: what the body asks for cannot be done here.
        """
        self._check_count(1, body.n)
        self._check_length(sum(len(message.text) for message in body.messages), "messages")
        wanted = body.tools if body.tools and body.tool_choice != "none" else None
        if not body.tools and body.tool_choice not in (None, "auto", "none"):
            raise ApiError(400, "tool_choice asks for a call and there are no tools", "tool_choice")
        called = any(message.tool_calls or message.role == "tool" for message in body.messages)
        if (wanted or called) and not tools.known(self.tokenizer.chat_template):
            raise ApiError(
                400,
                "this collection's chat template has no form for tools that is known here; leave tools and calls out",
                "tools" if wanted else "messages",
                "tools_unsupported",
            )
        try:
            described = None if wanted is None else [tool.model_dump(exclude_none=True) for tool in wanted]
            ids = encode_chat(self.tokenizer, [_plain(message) for message in body.messages], described)
        except _UNREADABLE as error:
            message = f"the chat template refuses the messages: {first_line(error)}"
            raise ApiError(400, message, "messages", "invalid_messages") from None
        grammar = self._format(body)
        if wanted and body.tool_choice not in (None, "auto"):
            named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
            functions = [(t.function.name, t.function.parameters) for t in wanted if named in (None, t.function.name)]
            if not functions:
                raise ApiError(400, f"tool_choice names {named!r}, which is not among the tools", "tool_choice")
            if grammar is not None:
                raise ApiError(400, "response_format and a forced tool exclude each other", "tool_choice")
            grammar = self.grammars.of_calls(functions, tools.BEGIN, tools.END)
        if grammar is not None and body.ignore_eos:
            raise ApiError(
                400, "response_format and ignore_eos exclude each other: a whole text must end", "ignore_eos"
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        asked = getattr(body, field)
        return self._rows(body, [ids], asked, logprobs, grammar, fields=("messages", field), calls=wanted is not None)

    def completion(self, body: CompletionRequest) -> Asked:
        """Rows that go on from texts.

        Raises:
            ApiError: what the body asks for cannot be done here.
        """
        if body.suffix:
            raise ApiError(400, "suffix is not supported: no member was trained to fill in", "suffix")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, f"best_of is {body.best_of} and n {body.n or 1}: only equal values work", "best_of")
        if body.stream and body.echo:
            raise ApiError(400, "echo cannot be streamed; leave one of them out", "echo")
        if body.stream and body.max_tokens == 0:
            raise ApiError(400, "max_tokens is 0: there is nothing to stream", "max_tokens")
        if not body.prompts:
            raise ApiError(400, "there is no prompt", "prompt")
        self._check_count(len(body.prompts), body.n)
        prompts = []
        for prompt in body.prompts:
            self._check_length(len(prompt) if isinstance(prompt, str) else 0, "prompt")
            try:
                ids = list(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)
            except _UNREADABLE as error:
                raise ApiError(400, f"the prompt cannot be read: {first_line(error)}", "prompt") from None
            if any(not 0 <= i < self.config.vocab_size for i in ids):
                raise ApiError(400, f"a prompt has a token id outside 0 to {self.config.vocab_size - 1}", "prompt")
            if body.echo and body.logprobs is not None and len(ids) > ECHO_TOKENS:
                message = f"the prompt has {len(ids)} tokens; with echo and logprobs it may have {ECHO_TOKENS}"
                raise ApiError(400, message, "prompt", "context_length_exceeded")
            prompts.append(ids)
        asked = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return self._rows(body, prompts, asked, body.logprobs, None, fields=("prompt", "max_tokens"))

    def _check_length(self, characters: int, field: str) -> None:
        """Refuse a text that is surely too long, whose tokens would take long to find."""
        most = self.config.max_position_embeddings * self._longest
        if characters > most:
            message = (
                f"the prompt has {characters} characters, more than any {self.config.max_position_embeddings} tokens"
            )
            raise ApiError(400, f"{message}: shorten it", field, "context_length_exceeded")

    def _check_count(self, prompts: int, n: int | None) -> None:
        most = self.limits.rows + self.limits.waiting
        if prompts * (n or 1) > most:
            message = f"{prompts * (n or 1)} answers are asked for at once and {most} may be"
            raise ApiError(400, message, "n", "too_many_rows")

    def _format(self, body: ChatRequest) -> str | None:
        wanted = body.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return self.grammars.of_schema(None)
        if wanted.json_schema is None:
            raise ApiError(400, "response_format of type json_schema needs json_schema", "response_format")
        return self.grammars.of_schema(wanted.json_schema.schema_)

    def _rows(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        asked: int | None,
        logprobs: int | None,
        grammar: str | None,
        *,
        fields: tuple[str, str],
        calls: bool = False,
    ) -> Asked:
        experts = self.config.expert_names
        policy = policies.parse(body.model, self.name, experts)
        policy = policies.merge(policy, body.expert, body.alpha, body.routing, experts)
        sampling, n = self._sampling(body), body.n or 1
        rows = []
        for ids in prompts:
            seed = secrets.randbits(63) if body.seed is None else body.seed
            room = self._room(ids, asked, fields)
            for choice in range(n):
                # Choices differ, and the first is what the seed gives without others.
                mine = replace(
                    sampling,
                    seed=seed + choice * 0x9E3779B97F4A7C15,
                    mask=None if grammar is None else self.grammars.mask(grammar, len(ids)),
                )
                rows.append(
                    Request(
                        ids,
                        max(room, 1),
                        mine,
                        stop=[stop for stop in body.stops if stop],
                        ignore_end=bool(body.ignore_eos),
                        logprobs=logprobs,
                        candidates=body.candidates,
                        **policy.settings(),
                    )
                )
        return Asked(rows, prompts, n, calls)

    def _room(self, ids: list[int], asked: int | None, fields: tuple[str, str]) -> int:
        """New tokens for a prompt of these ids; `fields` are the body's that gave the prompt and the number."""
        context = self.config.max_position_embeddings
        longest = min(self.limits.prompt_tokens or context, context - 1)
        if not ids:
            raise ApiError(400, "the prompt is empty", fields[0])
        if len(ids) > longest:
            message = f"the prompt has {len(ids)} tokens and may have {longest}: shorten it"
            raise ApiError(400, message, fields[0], "context_length_exceeded")
        room = min(context - len(ids), self.limits.new_tokens or context)
        if asked is None:
            return min(room, self.limits.default_tokens)
        if asked > room:
            message = f"{asked} new tokens are asked for after {len(ids)} of prompt; there is room for {room}"
            raise ApiError(400, message, fields[1], "context_length_exceeded")
        return asked

    def _is_id(self, text: str) -> bool:
        # Its length first: Python refuses to read numbers of thousands of digits.
        return text.isdecimal() and len(text) <= 10 and int(text) < self.config.vocab_size

    def _sampling(self, body: ChatRequest | CompletionRequest) -> Sampling:
        def of(name: str, none: Any) -> Any:
            value = getattr(body, name)
            return self.defaults.get(name, none) if value is None else value

        bias = None
        if body.logit_bias:
            if bad := [key for key in body.logit_bias if not self._is_id(key)]:
                message = f"logit_bias has {bad[0][:40]!r}, which is no token id below {self.config.vocab_size}"
                raise ApiError(400, message, "logit_bias")
            bias = {int(key): value for key, value in body.logit_bias.items()}
        try:
            return Sampling(
                temperature=of("temperature", 1.0),
                top_k=max(of("top_k", 0), 0),
                top_p=of("top_p", 1.0),
                min_p=of("min_p", 0.0),
                repetition_penalty=of("repetition_penalty", 1.0),
                min_tokens=body.min_tokens or 0,
                frequency_penalty=body.frequency_penalty or 0.0,
                presence_penalty=body.presence_penalty or 0.0,
                bias=bias,
            )
        except UsageError as error:
            raise ApiError(400, str(error)) from None


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.tool_calls:
        plain["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments: Any = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
