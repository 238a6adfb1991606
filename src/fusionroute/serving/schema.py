"""What clients may ask, as the OpenAI protocol and vLLM's extensions have it. Unknown fields are ignored.

Limits stand here where they are the protocol's own; those of a collection are checked where it is known.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fusionroute.modeling import Routing

LARGEST_SEED = 2**63 - 1
STOPS = 16  # the protocol has four; templates of some clients send more
CHOICES = 16


class _Asked(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class Part(_Asked):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Function(_Asked):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Asked):
    type: Literal["function"]
    function: Function


class FunctionCall(_Asked):
    name: str
    arguments: str


class ToolCall(_Asked):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Asked):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class JsonSchema(_Asked):
    name: str = "answer"
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Asked):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class NamedFunction(_Asked):
    name: str


class NamedTool(_Asked):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(_Asked):
    include_usage: bool = False


class _Common(_Asked):
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=STOPS)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED - 1, le=LARGEST_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    # ours: the policy, which the model's name may also give, and what the page shows
    alpha: Annotated[float, Field(ge=-100, le=100)] | None = None
    expert: str | None = None
    routing: Routing | None = None
    candidates: Annotated[int, Field(ge=0, le=20)] = 0

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def ends_with_usage(self) -> bool:
        """Whether a stream has a last chunk that says how many tokens were read and written."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Common):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None


class CompletionRequest(_Common):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]
