"""Training problems whose answers can be checked. Knows no model and nothing of pairs."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fusionroute.evaluation.edits import edited
from fusionroute.evaluation.fields import checked
from fusionroute.evaluation.instructions import instructed
from fusionroute.evaluation.scoring import known_instructions
from fusionroute.training.formats import Row
from fusionroute.training.overlap import BenchmarkIndex, drop_overlapping
from fusionroute.training.rows import DataSpec, find_rows

# The recipes hold the first 500 of the shuffled GSM8K rows out, and the first 150 of the roleplay rows.
ROWS: Mapping[str, DataSpec] = {
    "gsm8k": DataSpec(format="gsm8k", path="gsm8k/train.jsonl", domain="math", shuffle_seed=0, start=500),
    "mbpp": DataSpec(format="mbpp", path="mbpp/train.jsonl", domain="code"),
    # Requests that instructions are added to.
    "ifeval": DataSpec(
        format="gpteacher", path="gpteacher/roleplay.jsonl", domain="general", shuffle_seed=0, start=150
    ),
}

HINTED = """{problem}

This is known to be right:
{solution}

Solve the problem yourself, as if you had not seen that, and come to the same result. Write short steps: what each \
finds, in a few words, and its calculation. No headings and no code unless the problem asks for it. End with \
the result."""

BRIEF = "{request}\n\nAnswer in at most six sentences."


@dataclass(frozen=True)
class Problem:
    """A training problem.

    Attributes:
        source, line: where its row stands.
        prompt: the messages, as in the training rows of its format; with instructions after the last for `ifeval`.
        reference: the training row's answer; for `ifeval`, whose instructions it was not written to, edited to follow
            them, or None where no rule does that.
        fields: what the scorer compares with; empty if it can compare with nothing.
        request: what `ifeval` asks without its instructions; None of other tasks.
    """

    task: str
    source: str
    line: int
    domain: str
    prompt: list[dict[str, str]]
    reference: str | None
    fields: dict[str, Any]
    request: str | None = None

    @property
    def name(self) -> str:
        return f"{self.source}:{self.line}"

    def hinted(self) -> list[dict[str, str]]:
        """The messages with the reference solution shown."""
        *before, last = self.prompt
        return [*before, {**last, "content": HINTED.format(problem=last["content"], solution=self.reference)}]

    def brief(self) -> list[dict[str, str]]:
        """The messages without instructions, for a short answer that can be edited to follow them."""
        *before, last = self.prompt
        return [*before, {**last, "content": BRIEF.format(request=self.request)}]


def find_problems(
    task: str, spec: DataSpec, data: Path, index: BenchmarkIndex, *, seed: int, all_rows: bool = False
) -> tuple[list[Problem], dict[str, int]]:
    """The problems of the rows of `spec`, without those that share 13 words in a row with a test item.

    Args:
        index: of the test items.
        seed: with the row's place it decides which instructions a request of `ifeval` gets.
        all_rows: also those that the recipes hold out; they are left out whatever `spec` says otherwise.

    Returns:
        The problems, and how many rows were left out as `ill_formed`, `overlapping` or `held_out`.

    Raises:
        FusionRouteError: as `find_rows`.
    """
    if task == "ifeval":
        found, ill_formed = with_instructions(spec, data, seed=seed)
    else:
        rows, ill_formed = find_rows(spec, data)
        found = [Asked(number, row, raw) for number, raw, row in rows]
    overlapping = {place for place, _ in drop_overlapping([asked.row for asked in found], index)[1]}
    held = set() if all_rows else _held_out(ROWS[task], data)
    problems = []
    for place, (line, row, raw, request) in enumerate(found):
        if place in overlapping or line in held:
            continue
        *prompt, answer = row["messages"]
        reference = answer["content"] if request is None else edited(answer["content"], raw)
        fields, defect = checked(task, raw)
        fields = {} if defect else fields
        problems.append(Problem(task, spec.path, line, spec.domain, prompt, reference, fields, request))
    left_out = {"ill_formed": ill_formed, "overlapping": len(overlapping)}
    return problems, left_out | {"held_out": len(held & {asked.line for asked in found})}


class Asked(NamedTuple):
    """A row as a problem: its line, the chat row, the row as its checker wants it; the request without the
    instructions that were added."""

    line: int
    row: Row
    raw: Row
    request: str | None = None


def with_instructions(spec: DataSpec, data: Path | None, *, seed: int = 0) -> tuple[list[Asked], int]:
    """The requests of the rows of `spec` with instructions after each, drawn by `seed` and the row's place.

    Returns:
        The requests, whose chat rows end in an answer that knew no instruction; and how many rows were left out.

    Raises:
        FusionRouteError: as `find_rows`.
    """
    found, left_out = find_rows(spec, data)
    made = []
    for line, _, row in found:
        *before, request, answer = row["messages"]
        chance = random.Random(f"{seed} {spec.path}:{line}")
        raw = instructed(request["content"], answer["content"], chance, known_instructions())
        if raw is not None:
            asked = [*before, {**request, "content": raw["prompt"]}, answer]
            made.append(Asked(line, {**row, "messages": asked}, raw, request["content"]))
    return made, left_out + len(found) - len(made)


def _held_out(spec: DataSpec, data: Path) -> set[int]:
    """The lines before the first that the recipes train on."""
    if spec.start == 0:
        return set()
    found, _ = find_rows(spec.model_copy(update={"start": 0, "stop": spec.start}), data)
    return {each.number for each in found}
