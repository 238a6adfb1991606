"""Which of two answers is better: judges, their rubric, and how verdicts become a win.

A judge is an OpenAI-compatible chat endpoint, asked in both orders, or a reward model, which needs no network. Verdicts
are kept by judge, rubric, prompt and both answers, so systems that answer alike share them. Knows neither systems nor
benchmarks; loads nothing heavy until a reward model is wanted.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation.endpoint import Endpoint
from fusionroute.evaluation.store import Store, key_of

if TYPE_CHECKING:
    from fusionroute.evaluation.reward import RewardModel

TASK = "general"  # the benchmark whose answers are compared
_CHUNK = 16  # contests between two writes of an offline judge


@dataclass(frozen=True)
class Contest:
    """Two answers to one prompt. What comes of it is said of `mine`: 1 it won, 0 it lost, ½ neither."""

    prompt: str
    mine: str
    theirs: str

    def key(self, judge: Mapping[str, Any]) -> str:
        """The verdict's key under the judge of that identity."""
        return key_of("verdict", judge, self.prompt, self.mine, self.theirs)

    def settled(self) -> float | None:
        """What needs no judge: a blank answer loses to one that is not blank, and the same answer twice is ½."""
        mine, theirs = self.mine.strip(), self.theirs.strip()
        if mine and theirs and mine != theirs:
            return None
        return 0.5 if mine == theirs else float(bool(mine))


class Judge(Protocol):
    """Who decides.

    Attributes:
        name: for people.
        identity: everything that a verdict depends on beside the contest, as JSON knows it.
        accuracy: on held-out pairs, as in `RewardModel`.
    """

    name: str
    identity: dict[str, Any]
    accuracy: dict[str, Any] | None

    def verdicts(
        self, contests: Mapping[str, Contest], known: Mapping[str, dict[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Judge contests by key, in any order: rows with `won`, or None there and a reason in `unscored`.

        Args:
            known: rows of earlier runs by key; an unscored one may hold half of what is asked.
        """


class ChatJudge:
    """A chat endpoint: both orders are asked, and each names the better answer; a split counts ½."""

    accuracy: dict[str, Any] | None = None

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name, self.identity = endpoint.model, endpoint.identity

    def verdicts(
        self, contests: Mapping[str, Contest], known: Mapping[str, dict[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        def judge(key: str) -> dict[str, Any]:
            contest, replies = contests[key], list(known.get(key, {}).get("replies", []))
            replies = [reply for reply in replies if reply["better"] is not None]
            for mine_is in "AB"[len(replies) :]:
                pair = (contest.mine, contest.theirs) if mine_is == "A" else (contest.theirs, contest.mine)
                replies.append({"mine_is": mine_is, **self.endpoint.compare(contest.prompt, *pair)})
                if replies[-1]["better"] is None:
                    return {"won": None, "unscored": replies[-1]["unscored"], "replies": replies}
            wins = [reply["better"] == reply["mine_is"] for reply in replies]
            return {"won": sum(wins) / len(wins), "unscored": None, "replies": replies}

        return self.endpoint.several(judge, list(contests))


class RewardJudge:
    """A reward model: the higher score wins, equal scores are ½."""

    def __init__(self, model: "RewardModel") -> None:
        self.model = model
        self.name, self.accuracy = model.source, model.accuracy
        self.identity: dict[str, Any] = {"reward": model.digest, "max_length": model.max_length}

    def verdicts(
        self, contests: Mapping[str, Contest], known: Mapping[str, dict[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        keys, scores = list(contests), dict[tuple[str, str], float]()
        for first in range(0, len(keys), _CHUNK):
            now = {key: contests[key] for key in keys[first : first + _CHUNK]}
            # The reference's answer is in as many contests as there are systems.
            pairs = dict.fromkeys((c.prompt, text) for c in now.values() for text in (c.mine, c.theirs))
            new = [pair for pair in pairs if pair not in scores]
            scores.update(zip(new, self.model.score(new), strict=True))
            for key, contest in now.items():
                mine, theirs = (scores[contest.prompt, text] for text in (contest.mine, contest.theirs))
                usable = math.isfinite(mine) and math.isfinite(theirs)
                yield (
                    key,
                    {
                        "won": (1 + (mine > theirs) - (mine < theirs)) / 2 if usable else None,
                        "unscored": None if usable else f"the reward model's scores are {mine} and {theirs}",
                        "scores": [mine, theirs],
                    },
                )


def load(given: str, selection: "RewardModel | None" = None) -> Judge:
    """The judge that `--judge` names.

    Args:
        given: `URL#MODEL` of an endpoint, or a reward model as in `RewardModel`.
        selection: the reward model that systems under judgement use.

    Raises:
        UsageError: `given` is neither, or the judge would be what the systems were selected by.
        FusionRouteError: it is no reward model.
    """
    if "://" in given:
        return ChatJudge(Endpoint.of(given))
    from fusionroute.evaluation.reward import RewardModel

    model = RewardModel(given)
    if selection is not None and model.digest == selection.digest:
        raise UsageError(
            f"the judge {given} has the weights of the reward model {selection.source}, by which answers are selected: "
            "name another with --judge, trained on other pairs"
        )
    return RewardJudge(model)


def describe(judge: Judge, against: str) -> dict[str, Any]:
    """The judge as the plan keeps it; `against` is the system that the others are compared with."""
    from fusionroute.evaluation import reward

    return {
        "name": judge.name,
        "against": against,
        "accuracy": judge.accuracy,
        "held_out": None if judge.accuracy is None else reward.describe(judge.accuracy),
        "identity": judge.identity,
    }


def judge_all(judge: Judge, contests: Sequence[Contest], verdicts: Store) -> None:
    """Have every contest judged that has no verdict yet; what could not be judged is tried again."""
    wanted: dict[str, Contest] = {}
    for contest in contests:
        key = contest.key(judge.identity)
        known = verdicts.get(key)
        if contest.settled() is None and (known is None or known["unscored"] is not None):
            wanted[key] = contest
    if not wanted:
        return
    from fusionroute.progress import Meter

    with Meter("judging", len(wanted), "verdicts") as meter:
        for key, row in judge.verdicts(wanted, verdicts.rows):
            try:
                verdicts.put(key, {"judge": judge.name, **asdict(wanted[key]), **row})
            except FusionRouteError as error:
                print(f"verdict {key}: {error}", file=sys.stderr)
            meter.advance(1)


def contest_of(mine: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> Contest | None:
    """The contest of two stored answers; None where one of them is missing."""
    if mine is None or theirs is None or mine["error"] or theirs["error"]:
        return None
    return Contest(mine["prompt"], mine["text"], theirs["text"])


def outcome(contest: Contest | None, judge: Mapping[str, Any], verdicts: Store) -> tuple[float | None, str | None]:
    """What a contest came to under the judge of that identity, or None and why."""
    if contest is None:
        return None, "an answer is missing"
    if (settled := contest.settled()) is not None:
        return settled, None
    row = verdicts.get(contest.key(judge))
    return (None, "not judged yet") if row is None else (row["won"], row["unscored"])
