"""Which answers to a problem are right or wrong, and which of them make a pair. Knows no model and no file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusionroute.training.overlap import BenchmarkIndex, words

# The metrics of an answer as a whole; the first is the one its task file calls primary.
WHOLE = {"gsm8k": ("flexible", "strict"), "mbpp": ("flexible", "strict"), "ifeval": ("strict", "loose")}
RIGHT, WRONG = "right", "wrong"
FEWEST_WORDS = 15  # of an answer to a request with instructions
_REFUSAL = re.compile(
    r"\bas an ai\b|\bi(?:'| a)m (?:just )?an ai\b|\bi(?:'| a)m sorry, but\b"
    r"|^\W*i(?: cannot|'m unable| am (?:unable|not able|not capable))\b"
)
_REFUSED_WITHIN = 80  # characters


@dataclass(frozen=True)
class Candidate:
    """An answer, what became of it and, if it was sampled, its number and seed."""

    text: str
    verdict: str
    scores: dict[str, float]
    sample: int | None = None
    seed: int | None = None

    def provenance(self) -> dict[str, Any]:
        if self.sample is None:
            return {"from": "reference", "scores": self.scores}
        return {"from": "sample", "sample": self.sample, "seed": self.seed, "scores": self.scores}


def distinct(answers: Sequence[Candidate]) -> list[Candidate]:
    """The answers with a text of their own; of those that are alike the first drawn."""
    first: dict[str, Candidate] = {}
    for answer in answers:
        first.setdefault(answer.text, answer)
    return list(first.values())


def pair_up(rights: Sequence[Candidate], wrongs: Sequence[Candidate], most: int) -> list[tuple[Candidate, Candidate]]:
    """At most `most` pairs of a right and a wrong answer, closest in length first, then in the order drawn.

    No text is taken twice. Of two lengths far apart the bias of Eq. 3, a sum over tokens, says more than of right and
    wrong.
    """
    rights, wrongs = distinct(rights), distinct(wrongs)
    order = sorted(
        (abs(len(right.text) - len(wrong.text)), r, w)
        for r, right in enumerate(rights)
        for w, wrong in enumerate(wrongs)
    )
    taken: list[tuple[int, int]] = []
    for _, r, w in order:
        if len(taken) < most and all(r != other_r and w != other_w for other_r, other_w in taken):
            taken.append((r, w))
    return [(rights[r], wrongs[w]) for r, w in taken]


def unfit(task: str, text: str, finish: str, index: BenchmarkIndex) -> str | None:
    """Why an answer is neither right nor wrong, whatever it says; None if the scorer decides.

    One that ran into the limit of tokens would have, as a training text, an end that nobody wrote; one of a few words,
    or one that refuses, follows most of IFEval's instructions and answers no request.
    """
    if finish != "stop":
        return "cut off"
    if not text.strip():
        return "empty"
    if task == "ifeval" and len(words(text)) < FEWEST_WORDS:
        return "too short"
    if task == "ifeval" and _REFUSAL.search(text[:_REFUSED_WITHIN].lower()):
        return "refusal"
    return None if index.overlaps({"text": text}) is None else "overlapping"


def verdict(task: str, scores: Mapping[str, float], unscored: str | None) -> str:
    """`right` is what the primary metric says, `wrong` what every metric says; what is neither is not used."""
    if unscored is not None:
        return "unscored"
    primary, other = (scores[metric] for metric in WHOLE[task])
    if primary == 1:
        return RIGHT
    return "unclear" if primary or other else WRONG
