"""One raw row of a published data set -> a chat or preference row, by a function per format.

What the two kinds of row look like is said in `rows`. Knows nothing of files, slices or what the rows are for.
"""

import ast
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Row = dict[str, Any]
Messages = list[dict[str, str]]
T = TypeVar("T")


class FieldError(Exception):
    """A raw row lacks a field its format needs; whoever knows the file and line completes the message."""


def _field(raw: Row, name: str, kind: type[T], default: T | None = None) -> T:
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        what = "is missing" if value is None else f"is not a {kind.__name__} but {value!r:.40}"
        raise FieldError(f"field {name!r} {what}")
    return value


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _tidy(text: str) -> str:
    # Blank lines around a text would be learnt as part of the turn; indentation of its first line may be code.
    return text.replace("\r\n", "\n").lstrip("\n").rstrip()


def _well_formed(messages: Messages) -> bool:
    """A system message or none, then user and assistant in turns, the assistant last, nothing empty.

    Chat templates of several families refuse anything else.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [turn["role"] for turn in turns]
    in_turns = ["user", "assistant"] * max(1, len(roles) // 2)
    return roles == in_turns and all(message["content"].strip() for message in messages)


def _chat(messages: Messages | None) -> Row | None:
    return {"messages": messages} if messages is not None and _well_formed(messages) else None


def _pair(prompt: Messages, chosen: Messages, rejected: Messages) -> Row | None:
    if chosen == rejected or not (_well_formed(prompt + chosen) and _well_formed(prompt + rejected)):
        return None
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _instruction(instruction: str, extra: str, answer: str) -> Row | None:
    extra = _tidy(extra)
    user = _tidy(instruction) + (f"\n\n{extra}" if extra else "")
    return _chat([_message("user", user), _message("assistant", _tidy(answer))])


def strip_calculator_marks(text: str) -> str:
    """Remove gsm8k's `<<48/2=24>>`, which instruct a calculator and are not meant to be read."""
    return re.sub(r"<<[^<>\n]*>>", "", text)


def _gsm8k(raw: Row) -> Row | None:
    return _instruction(_field(raw, "question", str), "", strip_calculator_marks(_field(raw, "answer", str)))


def _mbpp(raw: Row) -> Row | None:
    text, code = _tidy(_field(raw, "text", str)), _tidy(_field(raw, "code", str))
    tests = [_tidy(str(test)) for test in _field(raw, "test_list", list)]
    if not text or not code:
        return None
    user = "\n".join([text, "Your code should pass these tests:", *tests])
    return _chat([_message("user", user), _message("assistant", f"```python\n{code}\n```")])


def _instruct(raw: Row, answer: str = "output") -> Row | None:
    return _instruction(_field(raw, "instruction", str), _field(raw, "input", str, ""), _field(raw, answer, str))


def _gpteacher(raw: Row) -> Row | None:
    return _instruct(raw, "response")


def gpteacher_python(raw: Row) -> Row | None:
    instruction, response = _field(raw, "instruction", str), _tidy(_field(raw, "response", str))
    if asks_for_another_language(instruction) or not is_python(response):
        return None
    return _gpteacher(raw | {"response": response if "```" in response else f"```python\n{response}\n```"})


def _self_instruct(raw: Row) -> Row | None:
    instances = _field(raw, "instances", list)
    if not instances or not isinstance(instances[0], dict):
        raise FieldError("field 'instances' holds no instance")
    return _instruct(instances[0] | {"instruction": raw.get("instruction")})


def _messages_of(items: list[Any]) -> Messages | None:
    """The messages with role and content alone; None if one of them is not made of these."""
    if not all(isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str} for m in items):
        return None
    return [_message(m["role"], m["content"]) for m in items]


def _messages(raw: Row) -> Row | None:
    return _chat(_messages_of(_field(raw, "messages", list)))


def _perfectblend(raw: Row) -> Row | None:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    turns = [turn if isinstance(turn, dict) else {} for turn in _field(raw, "conversations", list)]
    # Some of the blended sets write an empty system turn where others write none.
    turns = [turn for turn in turns if turn.get("from") != "system" or turn.get("value")]
    return _chat(_messages_of([{"role": roles.get(str(t.get("from"))), "content": t.get("value")} for t in turns]))


def _preference(raw: Row) -> Row | None:
    """A pair whose answers are strings, assistant messages, or whole conversations that include the prompt."""
    sides: list[tuple[Messages, Messages]] = []
    for field in ("chosen", "rejected"):
        if isinstance(raw.get(field), str):
            sides.append(([], [_message("assistant", raw[field])]))
            continue
        messages = _messages_of(_field(raw, field, list))
        if not messages:
            return None
        split = 0 if messages[0]["role"] == "assistant" else len(messages) - 1
        sides.append((messages[:split], messages[split:]))
    (prompt, chosen), (other_prompt, rejected) = sides
    if prompt != other_prompt:
        return None
    if not prompt and isinstance(raw.get("prompt"), list):
        prompt = _messages_of(raw["prompt"]) or []
    elif not prompt:
        prompt = [_message("user", _field(raw, "prompt", str))]
    return _pair(prompt, chosen, rejected)


def _hh_rlhf(raw: Row) -> Row | None:
    roles = {"Human": "user", "Assistant": "assistant"}
    sides = []
    for field in ("chosen", "rejected"):
        before, *parts = re.split(r"\n\n(Human|Assistant):", _field(raw, field, str))
        if before.strip() or not parts:
            return None
        sides.append([_message(roles[r], text.strip()) for r, text in zip(parts[::2], parts[1::2], strict=True)])
    chosen, rejected = sides
    return _pair(chosen[:-1], chosen[-1:], rejected[-1:]) if chosen[:-1] == rejected[:-1] else None


ADAPTERS: dict[str, Callable[[Row], Row | None]] = {
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "gpteacher": _gpteacher,
    "instruct": _instruct,
    "self_instruct": _self_instruct,
    "perfectblend": _perfectblend,
    "messages": _messages,
    "ultrafeedback": _preference,
    "hh_rlhf": _hh_rlhf,
    "openhermes_preferences": _preference,
    "preference": _preference,
}

# The formats whose rows are pairs; rows of the others are chats.
PAIRED = ("ultrafeedback", "hh_rlhf", "openhermes_preferences", "preference")

_PROGRAMMING = (
    r"(?:(?i:java|javascript|js|node\.js|typescript|c\+\+|cpp|c#|ruby|php|golang|rust|swift|kotlin|perl|scala|haskell"
    r"|lua|matlab|bash|shell)|C|R|Go)"
)
_LANGUAGE = re.compile(rf"(?<![\w+#])(?:{_PROGRAMMING}|(?i:(?:my)?sql|mongodb|html|css))(?![\w+#])")
# Markup and SQL are left out here: a Python program may well be asked to write "to a MySQL database".
_TARGET = re.compile(
    rf"\b(?i:to|into|in|using)\s+(?:(?i:an?|the|its|equivalent|corresponding)\s+)*{_PROGRAMMING}(?![\w+#])"
)
_FENCED = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def asks_for_another_language(instruction: str) -> bool:
    """Whether the code asked for is not Python: "... to Java", or another language and no word of Python."""
    if re.search(r"\bpython", instruction, re.IGNORECASE):
        return _TARGET.search(instruction) is not None
    return _LANGUAGE.search(instruction) is not None


def is_python(text: str) -> bool:
    """Whether `text`, or its first fenced block, is a Python program that does something.

    A lone name, number, list or annotation does not count: `42`, `Output: 'NaN'` and `ls -lS` parse too. What parses
    is up to the running Python, so a row in a thousand may differ between versions.
    """
    fenced = _FENCED.search(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            statements = ast.parse(fenced[1] if fenced else text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(_does_something(statement) for statement in statements)


def _does_something(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    return not (isinstance(statement, ast.AnnAssign) and statement.value is None)
