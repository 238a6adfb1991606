"""What a row of each benchmark must hold: the fields that prompts and scores use. Knows no file, model or score."""

import json
from typing import Annotated, Any, ClassVar

import pydantic

from fusionroute.evaluation import extraction

Text = Annotated[str, pydantic.StringConstraints(pattern=r"\S")]


class _Row(pydantic.BaseModel, strict=True):
    """The fields of a row that prompts and scores use; others are left out.

    `shown` are the columns lm-eval sees, with what stands there in a row that lacks a field.
    """

    shown: ClassVar[dict[str, Any]]
    named_by: ClassVar[str | None] = None


class _Gsm8k(_Row):
    shown = {"question": "-", "answer": ""}
    question: Text
    answer: Text

    @pydantic.model_validator(mode="after")
    def _has_a_number(self) -> "_Gsm8k":
        if extraction.marked_number(self.answer) is None:
            raise ValueError("'answer' has no number after ####")
        return self


class _Math500(_Row):
    shown = {"problem": "-", "answer": ""}
    named_by = "unique_id"
    problem: Text
    answer: Text
    solution: str | None = None
    unique_id: str | None = None


class _Mbpp(_Row):
    shown = {"text": "-", "test_list": ["-"], "code": ""}
    named_by = "task_id"
    text: Text
    test_list: Annotated[list[Text], pydantic.Field(min_length=1)]
    test_setup_code: str | None = None
    code: str | None = None
    task_id: int | str | None = None

    @pydantic.model_validator(mode="after")
    def _tidy(self) -> "_Mbpp":
        # As in the training rows: the file ends its lines in two ways.
        self.text = extraction.unix_lines(self.text).lstrip("\n").rstrip()
        self.test_list = [extraction.unix_lines(test).lstrip("\n").rstrip() for test in self.test_list]
        return self


class _HumanEval(_Row):
    shown = {"prompt": "-", "canonical_solution": ""}
    named_by = "task_id"
    prompt: Text
    entry_point: Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z_]\w*$")]
    test: Text
    canonical_solution: str | None = None
    task_id: int | str | None = None


class _IfEval(_Row):
    shown = {"prompt": "-"}
    named_by = "key"
    prompt: Text
    instruction_id_list: Annotated[list[Text], pydantic.Field(min_length=1)]
    kwargs: list[dict[str, Any]]
    key: int | str | None = None

    @pydantic.model_validator(mode="after")
    def _belong_together(self) -> "_IfEval":
        if len(self.kwargs) != len(self.instruction_id_list):
            raise ValueError(f"{len(self.instruction_id_list)} instructions, but {len(self.kwargs)} in 'kwargs'")
        # The Hub's table has a column for every argument of any instruction.
        self.kwargs = [{k: v for k, v in given.items() if v is not None} for given in self.kwargs]
        return self


class _General(_Row):
    shown = {"instruction": "-", "input": "", "output": ""}
    named_by = "id"
    instruction: Text
    input: str = ""
    output: str = ""
    id: int | str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _first_instance(cls, raw: Any) -> Any:
        instances = raw.get("instances")
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            raise ValueError("'instances' holds no instance")
        return {key: raw[key] for key in ("instruction", "id") if key in raw} | instances[0]


FIELDS: dict[str, type[_Row]] = {
    "gsm8k": _Gsm8k,
    "math500": _Math500,
    "mbpp": _Mbpp,
    "humaneval": _HumanEval,
    "ifeval": _IfEval,
    "general": _General,
}


def checked(task: str, raw: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The fields of a raw row as the scores use them, and no defect; or the row as it came, and what it lacks."""
    try:
        row = FIELDS[task].model_validate(raw).model_dump()
        json.dumps(row, ensure_ascii=False).encode()
    except pydantic.ValidationError as error:
        return raw, "; ".join(_problem(problem) for problem in error.errors())
    except UnicodeEncodeError:
        return raw, "half a character (a lone surrogate)"
    except (TypeError, ValueError):
        return raw, "holds what JSON does not know"
    return row, ""


def _problem(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"field {where!r}: {reason}" if where else reason
