"""Response formats as masks of the engine: which ids may come next, by a grammar library (llguidance)."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from fusionroute.decoding.prefixes import shared
from fusionroute.errors import UsageError
from fusionroute.serving.errors import ApiError

_ANY_OBJECT = {"type": "object"}


class Grammars:
    """Grammars over one tokenizer.

    Args:
        vocab_size: ids that the members share.
        ends: end ids; where the grammar is complete one of them is allowed.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Sequence[int]) -> None:
        self.vocab_size, self.ends = vocab_size, sorted(ends)
        self.tokenizer: LLTokenizer = from_tokenizer(
            tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=self.ends or None
        )

    def of_schema(self, schema: dict[str, Any] | None) -> str:
        """The grammar of JSON text that fits the schema; None is any object.

        Raises:
            ApiError: the schema is none, or has what the library does not know.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema if schema is not None else _ANY_OBJECT))
        except ValueError as error:
            raise ApiError(
                400, f"the JSON schema cannot be used: {error}", "response_format", "invalid_schema"
            ) from None
        return self.check(grammar, "response_format")

    def of_calls(self, functions: Sequence[tuple[str, dict[str, Any] | None]], begin: str, end: str) -> str:
        """The grammar of one call of one of the functions (name, parameters), between `begin` and `end`.

        Raises:
            ApiError: as `of_schema`.
        """
        rules: list[str] = []
        for name, parameters in functions:
            arguments = dict(parameters or _ANY_OBJECT)
            call = {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            # References are from the root, which the parameters are not any more.
            call |= {key: arguments.pop(key) for key in ("$defs", "definitions") if key in arguments}
            rules.append(f"call{len(rules)}: %json {json.dumps(call)}")
        start = " | ".join(f"call{i}" for i in range(len(rules)))
        lark = "\n".join([f"start: {json.dumps(begin)} ({start}) {json.dumps(end)}", *rules, ""])
        return self.check(LLMatcher.grammar_from_lark(lark), "tools")

    def check(self, grammar: str, param: str) -> str:
        """The grammar, if it is one."""
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self.tokenizer)
        if failed:
            message = messages[0].splitlines()[0] if messages else "it is no grammar"
            raise ApiError(400, f"the JSON schema cannot be used: {message}", param, "invalid_schema")
        return grammar

    def mask(self, grammar: str, prompt: int) -> "GrammarMask":
        """A mask for one row whose prompt has so many tokens."""
        return GrammarMask(self, grammar, prompt)


class GrammarMask:
    """Ids so far to ids allowed next. What it remembers only saves work: any ids may be asked about in any order."""

    def __init__(self, grammars: Grammars, grammar: str, prompt: int) -> None:
        self.grammars, self.prompt = grammars, prompt
        self.matcher = LLMatcher(grammars.tokenizer, grammar, log_level=0)
        self.read: list[int] = []

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Allowed ids `[N]`.

        Raises:
            UsageError: the ids so far do not fit the grammar.
        """
        new = list(ids[self.prompt :])
        common = shared(self.read, new)
        if common < len(self.read):
            self.matcher.rollback(len(self.read) - common)
        if new[common:]:
            self.matcher.consume_tokens(new[common:])
        self.read = new
        if self.matcher.is_error():
            raise UsageError(f"the text does not fit the response format: {self.matcher.get_error().splitlines()[0]}")
        if self.matcher.is_stopped():
            return torch.tensor(self.grammars.ends)
        words = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (words.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: self.grammars.vocab_size].nonzero().squeeze(-1)
