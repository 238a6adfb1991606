"""Training problems whose answers can be checked. Knows no model and nothing of pairs."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionroute.evaluation.benchmarks import checked
from fusionroute.evaluation.instructions import instructed
from fusionroute.evaluation.scoring import known_instructions
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

Solve the problem yourself, step by step and in your own words, as if you had not seen that, and come to the same \
result."""


@dataclass(frozen=True)
class Problem:
    """A training problem.

    Attributes:
        source, line: where its row stands.
        prompt: the messages, as in the training rows of its format; with instructions after the last for `ifeval`.
        reference: the training row's answer; None for `ifeval`, whose instructions it was not written to.
        fields: what the scorer compares with; empty if it can compare with nothing.
    """

    task: str
    source: str
    line: int
    domain: str
    prompt: list[dict[str, str]]
    reference: str | None
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.source}:{self.line}"

    def hinted(self) -> list[dict[str, str]]:
        """The messages with the reference solution shown."""
        *before, last = self.prompt
        return [*before, {**last, "content": HINTED.format(problem=last["content"], solution=self.reference)}]


def find_problems(
    task: str, spec: DataSpec, data: Path, index: BenchmarkIndex, *, seed: int
) -> tuple[list[Problem], dict[str, int]]:
    """The problems of the rows of `spec`, without those that share 13 words in a row with a test item.

    Args:
        index: of the test items.
        seed: with the row's place it decides which instructions a request of `ifeval` gets.

    Returns:
        The problems, and how many rows were left out as `ill_formed` or `overlapping`.

    Raises:
        FusionRouteError: as `find_rows`.
    """
    found, ill_formed = find_rows(spec, data)
    overlapping = {place for place, _ in drop_overlapping([each.row for each in found], index)[1]}
    problems = []
    for place, (line, raw, row) in enumerate(found):
        if place in overlapping:
            continue
        *prompt, answer = row["messages"]
        reference: str | None = answer["content"]
        if task == "ifeval":
            chance = random.Random(f"{seed} {spec.path}:{line}")
            made = instructed(prompt[-1]["content"], answer["content"], chance, known_instructions())
            if made is None:
                ill_formed += 1
                continue
            raw, reference = made, None
            prompt = [*prompt[:-1], {"role": "user", "content": made["prompt"]}]
        fields, defect = checked(task, raw)
        problems.append(Problem(task, spec.path, line, spec.domain, prompt, reference, {} if defect else fields))
    return problems, {"ill_formed": ill_formed, "overlapping": len(overlapping)}
