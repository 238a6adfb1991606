"""Functions that a model may call, in the form that its chat template has them and its own answers take.

Known: Hermes' form, Qwen2.5's among others, `<tool_call>{"name": …, "arguments": …}</tool_call>`.
"""

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

BEGIN, END = "<tool_call>\n", "\n</tool_call>"
_MARK, _CLOSE = BEGIN.strip(), END.strip()


def known(template: str | None) -> bool:
    """Whether a chat template tells the model of functions, and in a form that is known here."""
    return template is not None and "tools" in template and _MARK in template


@dataclass
class Calls:
    """Takes the text of an answer as it comes and gives back what is no call; the calls are there at the end."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    held: str = ""
    within: bool = False
    after: bool = False  # a call, and nothing but white space since

    def push(self, text: str, *, last: bool = False) -> str:
        """Text that is surely no part of a call; white space after a call is none."""
        self.held, out = self.held + text, ""
        while True:
            if not self.within:
                at = self.held.find(_MARK)
                self.within = at >= 0
                end = at if self.within else len(self.held) - (0 if last else _overlap(self.held))
                out += self._plain(self.held[:end])
                self.held = self.held[end + len(_MARK) :] if self.within else self.held[end:]
                if not self.within:
                    return out
            at = self.held.find(_CLOSE)
            if at < 0 and not last:
                return out
            body, close = (self.held, "") if at < 0 else (self.held[:at], _CLOSE)
            self.held, self.within = self.held[len(body) + len(close) :], False
            call = _parse(body)
            if call is None:
                out += self._plain(_MARK + body + close)
            else:
                self.calls.append(call)
                self.after = True

    def _plain(self, text: str) -> str:
        if self.after:
            text = text.lstrip()
            self.after = not text
        return text


def _parse(body: str) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
        name, arguments = found["name"], found.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": text}}


def _overlap(text: str) -> int:
    return next((n for n in range(min(len(text), len(_MARK) - 1), 0, -1) if text.endswith(_MARK[:n])), 0)
