"""What the engine wrote becomes replies of the protocol: whole answers and the chunks of a stream.

Log-probabilities are those of the fused distribution before temperature. Beside the protocol each choice has
`fusionroute`: who wrote each token, with what weights, and whether the complement overruled the expert.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusionroute.decoding.rows import Candidates, Event, Finish, Logprobs
from fusionroute.errors import UsageError
from fusionroute.fusion import TokenTrace, overruled_rate, shares, switch_rate
from fusionroute.serving.asking import Asked
from fusionroute.serving.errors import ApiError
from fusionroute.serving.tools import Calls
from fusionroute.serving.words import Words


@dataclass
class Choice:
    """One answer as far as it has come."""

    tokens: list[TokenTrace] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    candidates: list[Candidates] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    end: tuple[int, Logprobs] | None = None
    calls: Calls | None = None

    def add(self, event: Event) -> str:
        """Take in what a step gave; returns the text that may be shown.

        Raises:
            ApiError: the row failed.
        """
        if event.finish in ("error", "cancelled"):
            error = event.error
            if isinstance(error, UsageError):
                raise ApiError(400, str(error), code="generation_failed")
            raise ApiError(500, "the answer failed; the server's log says more", code="generation_failed")
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.candidates += event.candidates
        self.finish, self.end = event.finish, event.end
        text = "".join(token.text for token in event.tokens) + event.tail
        if self.calls is not None:
            text = self.calls.push(text, last=event.finish is not None)
        self.text += text
        return text

    @property
    def reason(self) -> str | None:
        return "tool_calls" if self.finish == "stop" and self.calls and self.calls.calls else self.finish


class Replies:
    """Builds the replies to one request.

    Args:
        kind: `chat.completion` or `text_completion`.
        model: the name that the client asked for.
        names: of the experts.
        words: ids as text.
    """

    def __init__(self, kind: str, model: str, names: Sequence[str], words: Words, asked: Asked) -> None:
        self.kind, self.model, self.names, self.words, self.asked = kind, model, names, words, asked
        self.chat = kind == "chat.completion"
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.choices = [Choice(calls=Calls() if asked.calls else None) for _ in asked.rows]

    # --------------------------------------------------------------------------------------------------- stream

    def first(self) -> dict[str, Any]:
        """The chunk that opens a stream of a chat: every choice's role."""
        choices: list[dict[str, Any]] = [
            {
                "index": i,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
                "fusionroute": {"tokens": []},
            }
            for i in range(len(self.choices))
        ]
        return self._chunk(choices)

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """A choice's part of a step."""
        choice = self.choices[index]
        had = len(choice.text)
        text = choice.add(event)
        entry: dict[str, Any] = {"index": index, "finish_reason": choice.reason}
        if self.chat:
            entry["delta"] = {"content": text} if text or not event.finish else {}
            if event.finish is not None and choice.calls and choice.calls.calls:
                entry["delta"]["tool_calls"] = [{"index": i, **call} for i, call in enumerate(choice.calls.calls)]
        else:
            entry["text"] = text
        entry["logprobs"] = self._logprobs(index, event.tokens, event.logprobs, had)
        entry["fusionroute"] = self._trace(event.tokens, event.candidates)
        if event.finish is not None:
            entry["fusionroute"] |= self._rates(choice)
        return self._chunk([entry])

    def last(self) -> dict[str, Any]:
        """The chunk with the usage, which has no choice."""
        return {**self._chunk([]), "usage": self.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    # ---------------------------------------------------------------------------------------------------- whole

    def whole(self, echoes: Sequence["Echo"] = ()) -> dict[str, Any]:
        """The reply once every choice has ended; `echoes` are the prompts to stand before the answers, by prompt."""
        choices = []
        for index, choice in enumerate(self.choices):
            entry: dict[str, Any] = {"index": index, "finish_reason": choice.reason or "length"}
            echo = echoes[index // self.asked.n] if echoes else None
            if self.chat:
                calls = choice.calls.calls if choice.calls else []
                entry["message"] = {"role": "assistant", "content": choice.text if choice.text or not calls else None}
                if calls:
                    entry["message"]["tool_calls"] = calls
                entry["logprobs"] = self._logprobs(index, choice.tokens, choice.logprobs, 0)
            else:
                entry["text"] = (echo.text if echo else "") + choice.text
                entry["logprobs"] = self._logprobs(index, choice.tokens, choice.logprobs, 0, echo)
            entry["fusionroute"] = self._trace(choice.tokens, choice.candidates) | self._rates(choice)
            choices.append(entry)
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, int]:
        written = sum(len(choice.tokens) for choice in self.choices)
        prompt = self.asked.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    # ---------------------------------------------------------------------------------------------------- parts

    def _logprobs(
        self,
        index: int,
        tokens: Sequence[TokenTrace],
        found: Sequence[Logprobs],
        offset: int,
        echo: "Echo | None" = None,
    ) -> dict[str, Any] | None:
        if self.asked.rows[index].logprobs is None:
            return None
        if self.chat:
            content = [
                {
                    **self._word(token.id, each.logprob),
                    "top_logprobs": [self._word(i, logprob) for i, logprob in each.top],
                }
                for token, each in zip(tokens, found, strict=True)
            ]
            return {"content": content, "refusal": None}
        ids = (echo.ids if echo else []) + [token.id for token in tokens]
        every = [*(echo.logprobs if echo else []), *found]
        # In this shape, as in vLLM, the end id has a place of its own: lm-eval counts on one new token to be there.
        if (end := self.choices[index].end) is not None:
            ids, every = [*ids, end[0]], [*every, end[1]]
        words = [self.words.text(i) for i in ids]
        offsets = []
        for word in words:
            offsets.append(offset)
            offset += len(word)
        return {
            "tokens": words,
            "token_logprobs": [None if each is None else each.logprob for each in every],
            "top_logprobs": [
                None if each is None else {self.words.text(i): logprob for i, logprob in reversed(each.top)}
                for each in every
            ],
            "text_offset": offsets,
        }

    def _word(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.words.text(token), "logprob": logprob, "bytes": list(self.words.bytes(token))}

    def _trace(self, tokens: Sequence[TokenTrace], candidates: Sequence[Candidates]) -> dict[str, Any]:
        entries = []
        for number, token in enumerate(tokens):
            entry = token.to_dict()
            entry["weights"] = {name: round(weight, 4) for name, weight in token.weights.items()}
            entry["gap"] = round(token.gap, 4)
            if candidates:
                each = candidates[number]
                entry["candidates"] = {
                    side: [{"id": i, "text": self.words.text(i), "logprob": round(p, 4)} for i, p in pairs]
                    for side, pairs in (("fused", each.fused), ("expert", each.expert), ("router", each.router))
                }
            entries.append(entry)
        return {"tokens": entries}

    def _rates(self, choice: Choice) -> dict[str, Any]:
        return {
            "shares": shares(choice.tokens, self.names),
            "switch_rate": switch_rate(choice.tokens),
            "overruled_rate": overruled_rate(choice.tokens),
        }


@dataclass(frozen=True)
class Echo:
    """A prompt that stands before its answers: its text, ids, and their log-probabilities where asked for."""

    text: str
    ids: list[int]
    logprobs: list[Logprobs | None]
