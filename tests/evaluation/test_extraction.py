"""What is taken from an answer: numbers in all their spellings, boxes, programs among fences and sentences."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.evaluation import extraction

# Numbers

NUMBERS = [
    ("It costs $1,234.00 in all", Fraction(1234)),
    ("The answer is 18.", Fraction(18)),
    ("-5", Fraction(-5)),
    ("\u22125 degrees", Fraction(-5)),
    ("x = $-5", Fraction(-5)),
    ("-$5", Fraction(-5)),
    ("16-3", Fraction(3)),
    ("(2)-3", Fraction(3)),
    ("1/2", Fraction(1, 2)),
    ("It is 1/2.", Fraction(1, 2)),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"$\dfrac12$", Fraction(1, 2)),
    (r"1{,}000 and 2\,000", Fraction(2000)),
    (r"\boxed{72}", Fraction(72)),
    ("**72** apples", Fraction(72)),
    ("50%", Fraction(50)),
    ("18.50 dollars", Fraction(37, 2)),
    (".5", Fraction(1, 2)),
    ("Rs.18", Fraction(18)),
    ("1, 2, 3", Fraction(3)),
    ("about 5 litres of H2O", Fraction(5)),
    ("10/0", Fraction(10)),
    ("eighteen", None),
    ("", None),
    ("9" * 5000, None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_last_number(text: str, number: Fraction | None) -> None:
    assert extraction.last_number(text) == number


@given(st.integers(-(10**12), 10**12))
def test_every_way_to_write_an_integer_is_read(number: int) -> None:
    for written in (f"{number}", f"{number:,}", f"{number:,}.00", f"${number}", f"{number}."):
        assert extraction.last_number(f"So it is {written}") == number


@given(st.text())
def test_no_text_breaks_the_numbers(text: str) -> None:
    extraction.last_number(text)
    extraction.marked_number(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("####18", 18),
        ("so 3 #### $1,800.", 1800),
        ("#### 18\n\nQuestion: 5", 18),
        ("#### 18\n#### 19", 18),
        ("#### the answer is 18", None),
        ("18", None),
    ],
)
def test_marked_number(text: str, number: int | None) -> None:
    assert extraction.marked_number(text) == number


# Boxes


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ 1}", r"\left\{ 1"),
        (r"\fbox{3}", "3"),
        (r"\boxed{4} then \boxed{5", "4"),
        (r"\boxed 5", None),
        ("12", None),
    ],
)
def test_last_boxed(text: str, inside: str | None) -> None:
    assert extraction.last_boxed(text) == inside


# Programs

CODE = "def f(x):\n    return x + 1"
PROSE = st.text(st.characters(exclude_characters="`", exclude_categories=["Cs"]))


@given(before=PROSE, after=PROSE)
def test_text_around_a_block_changes_nothing(before: str, after: str) -> None:
    answer = f"{before}\n```python\n{CODE}\n```\n{after}"
    assert extraction.written_program(answer) == extraction.meant_program(answer, ["f"]) == CODE


@given(st.text())
def test_no_text_breaks_the_extraction_of_programs(text: str) -> None:
    extraction.written_program(text)
    extraction.meant_program(text, ["f"])
    extraction.completed("def f(x):\n    '''?'''\n", "f", text, mend=True)


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        (CODE, CODE, CODE),
        (f"```\n{CODE}\n```", CODE, CODE),
        (f"```py\r\n{CODE}\r\n```".replace("\n", "\r\n").replace("\r\r", "\r"), CODE, CODE),
        (f"1. So:\n   ```python\n   {CODE.replace(chr(10), chr(10) + '   ')}\n   ```", CODE, CODE),
        (f"```python\n{CODE}```", CODE, CODE),
        (f"Answer: ```python\n{CODE}\n```", CODE, CODE),
        (f"```bash\npip install f\n```\n```python\n{CODE}\n```", CODE, CODE),
        (f"```python\n{CODE}\n```\n```python\nprint(f(input()))\n```", CODE, CODE),
        (f"```python\nprint(f(2))\n```\n```python\n{CODE}\n```", "print(f(2))", CODE),
        (f"```\nf(1) == 2\n```python\n{CODE}\n```", CODE, CODE),
        (f"```python\n{CODE}", f"```python\n{CODE}", CODE),
        (f"```python\n{CODE}\n\ndef g(x", f"```python\n{CODE}\n\ndef g(x", CODE + "\n"),
        (f"Sure:\n\n{CODE}\n\nNote: this\nadds one.", f"Sure:\n\n{CODE}\n\nNote: this\nadds one.", CODE),
        (f"import os\n{CODE}\n\nDone", f"import os\n{CODE}\n\nDone", f"import os\n{CODE}\n"),
        (f"{CODE}\n```\n\nThis function adds one.", CODE, CODE),
        (f"Sure:\n{CODE}\n```", CODE, CODE),
        (f"import it.\n```\n{CODE}\n```", CODE, CODE),
        ("I do not know.", "I do not know.", "I do not know."),
    ],
)
def test_programs_in_answers(answer: str, strict: str, flexible: str) -> None:
    assert extraction.written_program(answer) == strict
    assert extraction.meant_program(answer, ["f"]).rstrip() == flexible.rstrip()


def test_parts_of_a_program_in_several_blocks_come_together() -> None:
    answer = "```python\nclass Pair: ...\n```\nand\n```python\ndef f(p): return 1\n```"
    assert extraction.defined(extraction.meant_program(answer, ["f", "Pair"])) == {"f", "Pair"}


def test_names_in_tests_are_those_python_does_not_know() -> None:
    tests = ["assert sorted(f([Pair(1, 2)])) == 3", "assert f(x) == (", "import re"]
    assert extraction.names_in(tests) == ["f", "Pair"]
