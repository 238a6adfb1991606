"""`fusionroute pairs`: preference pairs from training problems whose answers can be checked (beyond the paper).

The collection answers each problem several times, the benchmark's own scorer tells right from wrong, and (right, wrong)
pairs are written with all they came from; phase 2 trains on them as format `preference`. Answers and verdicts are kept
beside the pairs, so a killed run goes on. Stands here and not in `training`, because it needs the engine and the
scorers; knows nothing of losses.
"""

import json
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fusionroute import collection as collections
from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.benchmarks import PACKAGES, TASK_FILES
from fusionroute.evaluation.edits import edited
from fusionroute.evaluation.execution import Limits
from fusionroute.evaluation.names import OURS
from fusionroute.evaluation.pair_settings import PairSettings
from fusionroute.evaluation.pairing import RIGHT, WRONG, Candidate, distinct, pair_up, unfit, verdict
from fusionroute.evaluation.problems import BRIEF, HINTED, ROWS, Problem, find_problems
from fusionroute.evaluation.scoring import SCORERS, known_instructions, require_nltk_data
from fusionroute.evaluation.store import Store, key_of
from fusionroute.evaluation.systems import Sources, find
from fusionroute.files import staged_file
from fusionroute.training.overlap import BenchmarkIndex, benchmark_files, words
from fusionroute.training.rows import parse_spec

T = TypeVar("T")


def make_pairs(wanted: PairSettings) -> dict[str, Any]:
    """Sample, check, and write the pairs.

    Returns:
        `{"pairs", "tasks": {TASK: {"ill_formed", "overlapping", "held_out", "problems", "unusable", "both",
        "only_right", "only_wrong", "neither", "pairs", "with_reference", "solutions", "answers": {VERDICT: count}}}}`:
        rows that are no problems, share 13 words with a test item or are held out by the recipes; of the problems, how
        many have a reference that the checker finds wrong or cannot check, how many had right and wrong answers, only
        the ones, only the others, or neither; pairs, and those with the reference for the right answer; right answers
        for `solutions`.

    Raises:
        UsageError: an unknown task or an impossible setting; nothing isolates model-written code.
        FusionRouteError: data that cannot be read, a disk that fills, or not one pair.
    """
    wanted.check()
    maker = _Maker(wanted)
    counts: dict[str, Counter[str]] = {task: Counter() for task in wanted.tasks}
    verdicts: dict[str, Counter[str]] = {task: Counter() for task in wanted.tasks}
    problems = [problem for task in wanted.tasks for problem in maker.problems(task, counts[task])]
    usable: list[tuple[Problem, Candidate | None]] = []
    for problem in _with_progress("checking references", problems):
        reference = maker.reference(problem)
        if problem.task == "ifeval" and reference is not None and reference.verdict != RIGHT:
            reference = None  # the edit failed, not the checker
        # A checker that finds the reference wrong says nothing about other answers.
        if problem.fields and (reference is None or reference.verdict == RIGHT):
            usable.append((problem, reference))
        else:
            counts[problem.task]["unusable"] += 1
    maker.sample([problem for problem, _ in usable])
    rows, solutions = [], []
    for problem, reference in _with_progress("checking answers", usable):
        answers = maker.answers(problem)
        verdicts[problem.task].update(answer.verdict for answer in answers)
        rights = [answer for answer in answers if answer.verdict == RIGHT]
        wrongs = [answer for answer in answers if answer.verdict == WRONG]
        count = counts[problem.task]
        count[_KINDS[bool(rights), bool(wrongs)]] += 1
        if not rights and wanted.reference and reference is not None:
            rights = [reference]
        solved = distinct(rights)[: wanted.most]
        count["solutions"] += len(solved)
        solutions += [maker.solution(problem, answer) for answer in solved]
        for chosen, rejected in pair_up(rights, wrongs, wanted.most):
            count["pairs"] += 1
            count["with_reference"] += chosen is reference
            rows.append(maker.row(problem, chosen, rejected, answers))
    summary = {
        "pairs": len(rows),
        "tasks": {
            task: {**{name: counts[task][name] for name in _COUNTS}, "answers": dict(verdicts[task])}
            for task in wanted.tasks
        },
    }
    if not rows and not (solutions and wanted.solutions):
        hint = "draw more --samples"
        if not wanted.reference:
            hint += ", or take the --reference"
        if not problems and any(count["held_out"] for count in counts.values()):
            hint = "the recipes hold these rows out: choose others, or --all-rows"
        raise FusionRouteError(f"no pair for {wanted.out}: {'; '.join(describe(summary))}: {hint}")
    _write(wanted.out, rows)
    if wanted.solutions is not None:
        _write(wanted.solutions, solutions)
    return summary


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows, or no file where there are none: one of an earlier run would be taken for this one's."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with staged_file(path) as scratch:
        scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


_KINDS = {(True, True): "both", (True, False): "only_right", (False, True): "only_wrong", (False, False): "neither"}
_COUNTS = (
    *("ill_formed", "overlapping", "held_out", "problems", "unusable"),
    *("both", "only_right", "only_wrong", "neither", "pairs", "with_reference", "solutions"),
)


def describe(summary: Mapping[str, Any]) -> list[str]:
    """A line for each task of a summary."""
    lines = []
    for task, found in summary["tasks"].items():
        answers = ", ".join(f"{count} {verdict}" for verdict, count in found["answers"].items())
        text = (
            f"{task}: {found['pairs']} pairs of {found['problems']} problems ({found['both']} answered right and "
            f"wrong, {found['only_right']} only right, {found['only_wrong']} only wrong, {found['neither']} neither; "
            f"answers: {answers or 'none'})"
        )
        notes = {
            "with the reference as the right answer": found["with_reference"],
            "problems that cannot be checked": found["unusable"],
            "rows that share 13 words in a row with a test item": found["overlapping"],
            "rows that the recipes hold out": found["held_out"],
            "ill-formed rows": found["ill_formed"],
        }
        lines.append(", ".join([text, *(f"{count} {what}" for what, count in notes.items() if count)]))
    return lines


class _Maker:
    """What is known while pairs are made: the weights that answer, the test items, and the store."""

    def __init__(self, wanted: PairSettings) -> None:
        self.wanted = wanted
        config = collections.read_config(wanted.collection)
        name = OURS if wanted.expert is None else f"expert:{wanted.expert}"
        self.system = find(name, Sources(wanted.collection, work=wanted.out.parent))
        self.identity = self.system.identity(config, wanted.base)
        self.store = Store(wanted.samples_file)
        files = benchmark_files(wanted.data)
        if not files:
            print(f"no benchmark test files under {wanted.data}: nothing to compare problems with", file=sys.stderr)
        if "ifeval" in wanted.tasks:
            known_instructions()  # says which package is missing, if one is
            require_nltk_data(wanted.data / "nltk_data")
        self.index = BenchmarkIndex.from_files(files)

    def problems(self, task: str, count: Counter[str]) -> list[Problem]:
        """The problems asked for, and what was left out added to `count`."""
        wanted = self.wanted
        spec = parse_spec({**ROWS[task].model_dump(), **wanted.rows})
        if wanted.limit is not None:
            last = spec.start + wanted.limit
            spec = spec.model_copy(update={"stop": last if spec.stop is None else min(last, spec.stop)})
        problems: list[Problem] = []
        for draw in range(wanted.draws if task == "ifeval" else 1):
            seed = wanted.seed + draw
            found, left_out = find_problems(task, spec, wanted.data, self.index, seed=seed, all_rows=wanted.all_rows)
            if draw == 0:
                count.update(left_out)
            problems += [problem for problem in found if problem not in problems]
        count["problems"] = len(problems)
        return problems

    def sample(self, problems: Sequence[Problem]) -> None:
        """Write the answers that are missing; one that fails is tried again by the next run."""
        from fusionroute.decoding.rows import Request
        from fusionroute.decoding.sampling import Sampling
        from fusionroute.evaluation.answering import answer, load_engine
        from fusionroute.progress import Meter

        wanted = self.wanted
        todo = {
            key: (problem, seed)
            for problem in problems
            for key, seed in map(self._draw, [problem] * wanted.samples, range(wanted.samples))
            if self.store.get(key) is None
        }
        if not todo:
            return
        engine, tokenizer = load_engine(wanted.collection, wanted.dtype, wanted.base)
        requests = (
            (
                key,
                Request(
                    collections.encode_chat(tokenizer, self._asked(problem)),
                    wanted.max_new_tokens,
                    Sampling(wanted.temperature, top_p=wanted.top_p, seed=seed),
                    **self.system.policy,
                ),
            )
            for key, (problem, seed) in todo.items()
        )
        with Meter("sampling", len(todo), "answers") as meter:
            for key, found in answer(engine, requests, wanted.batch):
                problem, seed = todo[key]
                if found.error is None:
                    row = {"finish": found.finish, "tokens": found.tokens, "text": found.text}
                    self.store.put(key, {"problem": problem.name, "seed": seed, **row})
                else:
                    print(f"{problem.name}: {found.error}", file=sys.stderr)
                meter.advance(1)

    def _draw(self, problem: Problem, number: int) -> tuple[str, int]:
        """Key and seed of an answer."""
        # What is edited afterwards is one answer, whatever instructions were drawn.
        about = problem.brief() if self.wanted.edit else problem.prompt
        seed = int(key_of("seed", self.wanted.seed, about, number)[:8], 16)
        return key_of("answer", self.identity, self._asked(problem), self.wanted.sampling(), seed), seed

    def _asked(self, problem: Problem) -> list[dict[str, str]]:
        if self.wanted.edit:
            return problem.brief()
        return problem.hinted() if self.wanted.hint else problem.prompt

    def reference(self, problem: Problem) -> Candidate | None:
        """The reference solution, if there is one, with what the checker says of it."""
        if problem.reference is None:
            return None
        if not problem.fields:
            return Candidate(problem.reference, "unscored", {})
        return self._candidate(problem, problem.reference, "stop")

    def answers(self, problem: Problem) -> list[Candidate]:
        """The problem's answers with their verdicts, in the order drawn."""
        found = []
        for number in range(self.wanted.samples):
            key, seed = self._draw(problem, number)
            row = self.store.get(key)
            if row is None:
                found.append(Candidate("", "failed", {}, number, seed))
            else:
                found.append(self._sampled(problem, row["text"], row["finish"], sample=number, seed=seed))
        return found

    def _sampled(self, problem: Problem, text: str, finish: str, **drawn: int) -> Candidate:
        if self.wanted.edit:
            # As it was written: edited, a refusal looks like an answer.
            reason = unfit(problem.task, text, finish, self.index)
            new = edited(text, problem.fields)
            if reason is not None or new is None:
                return Candidate(text, reason or "not edited", {}, **drawn)
            text = new
        answer = self._candidate(problem, text, finish, **drawn)
        copied = self.wanted.hint and words(answer.text) == words(problem.reference or "")
        return replace(answer, verdict="copied") if copied else answer

    def _candidate(self, problem: Problem, text: str, finish: str, **drawn: int) -> Candidate:
        reason = unfit(problem.task, text, finish, self.index)
        if reason is not None:
            return Candidate(text, reason, {}, **drawn)
        score = self._score(problem, text)
        return Candidate(text, verdict(problem.task, score["scores"], score["unscored"]), score["scores"], **drawn)

    def _score(self, problem: Problem, text: str) -> dict[str, Any]:
        """The stored score of an answer, else a new one; one that could not be scored is tried again."""
        conditions = {
            "python": platform.python_version_tuple()[:2],
            "limits": asdict(Limits()),
            "task": (TASK_FILES / f"{problem.task}.yaml").read_text(encoding="utf-8"),  # its version and rules
            **{package: version(package) for package in PACKAGES.get(problem.task, {}).values()},
        }
        key = key_of("score", problem.task, problem.fields, text, conditions)
        known = self.store.get(key)
        if known is None or known["unscored"] is not None:
            found = SCORERS[problem.task](problem.fields, text, unsafe=self.wanted.unsafe)
            known = {"problem": problem.name, "scores": found.scores, "unscored": found.unscored}
            self.store.put(key, known)
        return known

    def row(
        self, problem: Problem, chosen: Candidate, rejected: Candidate, answers: Sequence[Candidate]
    ) -> dict[str, Any]:
        """A pair as it is written."""
        sides = {"chosen": chosen.provenance(), "rejected": rejected.provenance()}
        return {
            "prompt": problem.prompt,
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "domain": problem.domain,
            "provenance": {**self._origin(problem), **sides, "verdicts": [answer.verdict for answer in answers]},
        }

    def solution(self, problem: Problem, answer: Candidate) -> dict[str, Any]:
        """A right answer as a chat row."""
        return {
            "messages": [*problem.prompt, {"role": "assistant", "content": answer.text}],
            "domain": problem.domain,
            "provenance": {**self._origin(problem), "answer": answer.provenance()},
        }

    def _origin(self, problem: Problem) -> dict[str, Any]:
        wanted = self.wanted
        return {
            "source": problem.source,
            "line": problem.line,
            "checker": problem.task,
            "sampling": {**wanted.sampling(), "seed": wanted.seed, "samples": wanted.samples},
            "identity": self.identity,
            **({"hint": HINTED} if wanted.hint else {}),
            **({"edited": BRIEF} if wanted.edit else {}),
            **({"instructions": problem.fields} if problem.task == "ifeval" else {}),
        }


def _with_progress(title: str, items: Sequence[T]) -> Iterator[T]:
    from fusionroute.progress import Meter

    with Meter(title, len(items), "problems") as meter:
        for item in items:
            yield item
            meter.advance(1)
