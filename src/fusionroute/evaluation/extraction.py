"""From the text of an answer to what is scored: a number, the inside of a box, a Python program. Pure functions.

Knows nothing of tasks, references or results: of several readings one is chosen by form alone, before anything runs.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

# A digit right after a letter or digit starts no number (H2O, x2); a minus after one of these or a bracket joins two.
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]}])[-\u2212])?(?:\\?[$€£¥])?(?P<inner_minus>(?<=[$€£¥])[-\u2212])?"
    r"(?P<value>(?<![A-Za-z0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|(?<![A-Za-z0-9])[0-9]+(?:\.[0-9]+)?"
    r"|(?<![A-Za-z0-9.])\.[0-9]+)"
    r"(?:/(?P<denominator>[0-9]+)(?![0-9]|[,.][0-9]|/))?"
)
# \{ and \} are brackets of the formula, taken whole so that they open and close nothing.
_BRACKETS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_MARKED = re.compile(r"####[ \t]*(?=\S)")
_PYTHON = ("", "python", "python3", "py")
# Text may stand before the marks; after them only the language, so that ```inline``` opens nothing.
_OPENING = re.compile(r"^(?P<indent>[ \t]*)[^`]*?(?P<marks>`{3,})[ \t]*(?P<language>[\w+#.-]*)[ \t]*$")
_STARTS_CODE = re.compile(r"^\s*(?:def|class|import|from|async\s+def)\b|^\s*@\w")
# What is found by trying must end, whatever a model writes.
_MOST_DIGITS = 100
_MOST_LINES = 400
_MOST_TRIES = 30


def _plain(text: str) -> str:
    """`text` without the LaTeX that numbers hide in: `\\frac{1}{2}` is `1/2`, `1{,}000` and `1\\,000` are `1,000`."""
    text = re.sub(r"\\[dt]?frac\s*\{(-?[0-9]+)\}\s*\{([0-9]+)\}", r" \1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*([0-9])\s*([0-9])", r" \1/\2", text)
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\,|,?\\!)(?=[0-9]{3})", ",", text)
    return re.sub(r"\\[A-Za-z]+", " ", text)


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _MOST_DIGITS:
        return None
    value = Fraction(match["value"].replace(",", "")) / (int(match["denominator"] or 1) or 1)
    return -value if match["minus"] or match["inner_minus"] else value


def last_number(text: str) -> Fraction | None:
    """The last number in `text`: `$1,234.00` and `18.` are 1234 and 18, `1/2` is a half, `eighteen` is none."""
    last = None
    for match in _NUMBER.finditer(_plain(text)):
        last = match
    return None if last is None else _value(last)


def marked_number(text: str) -> Fraction | None:
    """The number right after the first `####` that one follows, GSM8K's own form."""
    plain = _plain(text)
    for mark in _MARKED.finditer(plain):
        if number := _NUMBER.match(plain, mark.end()):
            return _value(number)
    return None


def marked_text(text: str) -> str | None:
    """What stands after the last `####` on its line; None if nothing is."""
    marks = list(_MARKED.finditer(text))
    return text[marks[-1].end() :].partition("\n")[0].strip() if marks else None


def show(number: Fraction | None) -> str | None:
    """A number as people write it, for reports."""
    return None if number is None else str(number)


def last_boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{…}` (or `\\fbox{…}`) that is closed."""
    found: tuple[int, str] | None = None
    brackets: list[tuple[int, bool]] = []
    for token in _BRACKETS.finditer(text):
        if token[0] == "{" or token[0].startswith(("\\boxed", "\\fbox")):
            brackets.append((token.end(), token[0] != "{"))
        elif token[0] == "}" and brackets:
            start, boxed = brackets.pop()
            if boxed and (found is None or start > found[0]):
                found = start, text[start : token.start()]
    return None if found is None else found[1]


@dataclass(frozen=True)
class Block:
    """A fenced block: its lines, the language after the marks in lower case, and whether the fence is closed."""

    code: str
    language: str
    closed: bool


def unix_lines(text: str) -> str:
    """`text` with every line ending a newline."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of `text`, in order, without their fence's indentation; the last may be unclosed."""
    blocks: list[Block] = []
    opening: re.Match[str] | None = None
    inside: list[str] = []
    for line in _opened(unix_lines(text)).split("\n"):
        if opening is None:
            opening, inside = (_OPENING.match(line) if "```" in line else None), []
            continue
        marks, stripped = opening["marks"], line.strip()
        again = _OPENING.match(line) if stripped.startswith(marks) else None
        if again and again["language"]:  # a fence was forgotten
            blocks.append(_block(inside, opening, closed=False))
            opening, inside = again, []
        elif stripped.endswith(marks):
            # Some models write the closing marks at the end of the last line of code.
            inside += [line.rstrip().rstrip("`")] if stripped.strip("`") else []
            blocks.append(_block(inside, opening, closed=True))
            opening = None
        else:
            inside.append(line)
    if opening is not None:
        blocks.append(_block(inside, opening, closed=False))
    return blocks


def _opened(text: str) -> str:
    """`text` with the opening fence that was left out: code, then a first fence of no language, closes that code."""
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if _OPENING.match(line)), None)
    if first is None or not re.fullmatch(r"\s*`{3,}\s*", lines[first]):
        return text
    start = next((number for number, line in enumerate(lines[:first]) if _STARTS_CODE.match(line)), None)
    if start is None or not _is_python("\n".join(lines[start:first])):
        return text
    return "\n".join([*lines[:start], lines[first].strip(), *lines[start:]])


def _is_python(code: str) -> bool:
    return _error_line(textwrap.dedent(code), ast.PyCF_ONLY_AST) is None


def _block(lines: Sequence[str], opening: re.Match[str], *, closed: bool) -> Block:
    indent = opening["indent"]
    return Block("\n".join(line.removeprefix(indent) for line in lines), opening["language"].lower(), closed)


def written_program(text: str) -> str:
    """The program as it stands (strict): the first closed block of Python or of no language, else the whole answer."""
    closed = [block for block in fenced_blocks(text) if block.closed]
    ours = [block for block in closed if block.language in _PYTHON] or closed
    return ours[0].code if ours else unix_lines(text)


def meant_program(text: str, names: Sequence[str]) -> str:
    """The program that is probably meant (flexible): also unclosed, cut off, or between sentences.

    Args:
        names: what it should define. Of several blocks the first that defines as many of them as all together is
            taken, or all together if there is none such, or if none defines any.
    """
    blocks = fenced_blocks(text)
    ours = [block.code for block in blocks if block.language in _PYTHON] or [block.code for block in blocks]
    if not ours:
        return _among_sentences(unix_lines(text), names)
    codes = [_whole_lines(textwrap.dedent(code)) for code in ours]
    together = set().union(*map(defined, codes)).intersection(names)
    if together:
        for code in codes:
            if together <= defined(code):
                return code
    return codes[0] if len(codes) == 1 else _whole_lines("\n".join(codes))


def _among_sentences(text: str, names: Sequence[str]) -> str:
    lines = text.split("\n")[:_MOST_LINES]
    starts = [number for number, line in enumerate(lines) if _STARTS_CODE.match(line)][:_MOST_TRIES]
    codes = [_without_prose(_whole_lines(textwrap.dedent("\n".join(lines[start:])))) for start in starts]
    # Of equals the longest, which begins with the imports.
    whole = [code for code in codes if _tree(code) is not None]
    return max(whole, key=lambda code: (len(defined(code).intersection(names)), len(code)), default=text)


def _whole_lines(code: str) -> str:
    """The longest beginning of `code` that is Python, in whole lines; all of it if none is."""
    lines = code.split("\n")[:_MOST_LINES]
    end = len(lines)
    for _ in range(_MOST_TRIES):
        beginning = "\n".join(lines[:end])
        error = _error_line(beginning, ast.PyCF_ONLY_AST)
        if error is None:
            return beginning if beginning.strip() else code
        end = min(end, error) - 1
        if end <= 0:
            break
    return code


def _tree(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _error_line(code: str, flags: int = 0) -> int | None:
    """The line at which `code` stops being Python, from 1; None if it is Python throughout.

    Parsed alone (`ast.PyCF_ONLY_AST`), a function's body is Python too; compiled, its `return` is an error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "<answer>", "exec", flags, dont_inherit=True)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None


def _without_prose(code: str) -> str:
    """`code` without top-level lines that are words and merely happen to be Python, such as `Note: this`."""
    tree = _tree(code)
    lines = code.split("\n")
    for statement in reversed(tree.body if tree else []):
        word = isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Call | ast.Await)
        if word or (isinstance(statement, ast.AnnAssign) and statement.value is None):
            del lines[statement.lineno - 1 : statement.end_lineno]
    return "\n".join(lines)


def defined(code: str) -> set[str]:
    """The names `code` binds at its top level; of code that is no Python, those after `def` and `class`."""
    tree = _tree(code)
    if tree is None:
        return set(re.findall(r"^(?:async\s+def|def|class)\s+(\w+)", code, re.MULTILINE))
    names: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return names


def names_in(tests: Sequence[str]) -> list[str]:
    """The names that tests read and Python itself does not know: what a program must define to pass them."""
    import builtins

    names: dict[str, None] = {}
    for test in tests:
        tree = _tree(test)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.Name) and not hasattr(builtins, node.id):
                names[node.id] = None
    return list(names)


def completed(prompt: str, entry_point: str, code: str, *, mend: bool) -> str:
    """The program of a HumanEval answer, which may be the whole function or its body alone.

    Args:
        prompt: imports, helpers, signature and docstring.
        code: the answer's program; a whole function is put after what stands before the prompt's own, so imports
            and helpers are kept; a body is put after the prompt.
        mend: try to put a body's indentation and end right.
    """
    if entry_point in defined(code):
        before = re.split(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
        return f"{before.rstrip()}\n\n{code}" if before.strip() else code
    start = prompt if prompt.endswith("\n") else prompt + "\n"
    indented = code.strip("\n")[:1].isspace()
    if not mend or (indented and _error_line(start + code) is None):
        return start + code
    code = code.strip("\n")
    if indented:
        bodies = [code, textwrap.indent(textwrap.dedent(code), "    ")]
    else:
        # The second for answers that were stripped, which took the first line's indentation alone.
        bodies = [textwrap.indent(code, "    "), "    " + code]
    for body in bodies:
        if _error_line(start + body) is None:
            return start + body
    longest = [_whole_lines(start + body) for body in bodies]
    return max(longest, key=len)
