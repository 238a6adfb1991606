"""Scores of one answer to one row: numbers, expressions, programs, instructions followed.

The same answer gives the same score each time, and any answer gives one in bounded time and memory. Knows nothing of
models, files or tables; a row is a dict with the fields that `benchmarks` has checked.
"""

import atexit
import contextlib
import functools
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusionroute.errors import FusionRouteError
from fusionroute.evaluation import extraction
from fusionroute.evaluation.execution import run_program

Row = Mapping[str, Any]

# Reading and comparing an ordinary answer takes math-verify some ten milliseconds; 9^{9^{9^9}} it would never finish.
MATH_SECONDS = 5
_MATH_BYTES = 4 << 30
# For a process that does not use the processor either: stopped, or swapped out.
_STUCK_SECONDS = 120


@dataclass(frozen=True)
class Score:
    """What one answer is worth.

    Attributes:
        scores: by metric, from 0 to 1; all 0 if there is no score.
        unscored: why there is no score, where that is not the answer's fault.
        extracted: what was taken from the answer by the most lenient reading.
        weights: by metric, how many things the score is the mean of, where it is not 1.
    """

    scores: dict[str, float]
    unscored: str | None = None
    extracted: str | None = None
    weights: dict[str, float] = field(default_factory=dict)


def unscored(task: str, reason: str) -> Score:
    """The score of what cannot be scored."""
    return Score(dict.fromkeys(METRICS[task], 0.0), unscored=reason)


def weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """The mean of (score, weight) pairs, 0 without any weight."""
    total = sum(weight for _, weight in pairs)
    return sum(score * weight for score, weight in pairs) / total if total else 0.0


def gsm8k(row: Row, answer: str, *, unsafe: bool = False) -> Score:
    """Numbers compared as numbers: `1,234.00` is 1234."""
    wanted = extraction.marked_number(row["answer"])
    marked, last = extraction.marked_number(answer), extraction.last_number(answer)
    scores = {"strict": float(marked == wanted), "flexible": float(last == wanted)}
    return Score(scores, extracted=None if last is None else str(last))


def math500(row: Row, answer: str, *, unsafe: bool = False) -> Score:
    """Expressions compared by math-verify, whose tolerance (0.5 for 1/2, `x=2` for 2, units) is its own.

    Raises:
        FusionRouteError: math-verify cannot be started.
    """
    wanted, boxed = row["answer"], extraction.last_boxed(answer)
    if not answer.strip():
        return Score({"strict": 0.0, "flexible": 0.0})
    if boxed is not None and (_squeezed(boxed) == _squeezed(wanted) or _math.equal(wanted, f"\\boxed{{{boxed}}}")[0]):
        return Score({"strict": 1.0, "flexible": 1.0}, extracted=boxed)
    equal, found = _math.equal(wanted, answer)
    # The form of GSM8K's solutions, which math-verify does not know.
    marked = extraction.marked_text(answer)
    if not equal and boxed is None and marked is not None:
        equal, found = _math.equal(wanted, f"\\boxed{{{marked.strip('$')}}}")
    return Score({"strict": 0.0, "flexible": float(equal)}, extracted=found)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+|\\[,;:! ]", "", text)


def mbpp(row: Row, answer: str, *, unsafe: bool = False) -> Score:
    """Programs run in the sandbox, on the row's setup code and assertions."""
    tests = [extraction.unix_lines(test) for test in (row["test_setup_code"] or "", *row["test_list"])]
    programs = {
        "strict": extraction.written_program(answer),
        "flexible": extraction.meant_program(answer, extraction.names_in(tests)),
    }
    return _run("mbpp", programs, "\n".join(tests) + "\n", unsafe=unsafe)


def humaneval(row: Row, answer: str, *, unsafe: bool = False) -> Score:
    """Programs run in the sandbox, on the row's `check`."""
    prompt, name = row["prompt"], row["entry_point"]
    codes = {
        "strict": extraction.written_program(answer),
        "flexible": extraction.meant_program(answer, [name]),
    }
    programs = {
        # A prompt with a blank body is a function too, which a lax test might pass.
        metric: extraction.completed(prompt, name, code, mend=metric == "flexible") if code.strip() else ""
        for metric, code in codes.items()
    }
    return _run("humaneval", programs, f"{row['test']}\n\ncheck({name})\n", unsafe=unsafe)


def _run(task: str, programs: dict[str, str], tests: str, *, unsafe: bool) -> Score:
    passed: dict[str, bool] = {}
    for program in programs.values():
        if program in passed:
            continue
        passed[program] = False
        if program.strip():
            outcome = run_program(program, tests, unsafe=unsafe)
            if outcome.reason == "sandbox":
                return unscored(task, outcome.detail or "the program could not be isolated")
            passed[program] = outcome.passed
    scores = {metric: float(passed[program]) for metric, program in programs.items()}
    return Score(scores, extracted=programs["flexible"] or None)


def ifeval(row: Row, answer: str, *, unsafe: bool = False) -> Score:
    """Instructions checked by lm-eval's own checkers.

    What the row lacks (a threshold, nltk's data) leaves the item unscored: the checkers would draw one at random.

    Raises:
        FusionRouteError: a package the checkers need is not installed.
    """
    with _ifeval_lock, _same_chances():
        checkers = _checkers()
        if problem := _ifeval_problem(row, checkers.instructions_registry.INSTRUCTION_DICT):
            return unscored("ifeval", problem)
        try:
            found = checkers.process_results(row, [answer])
        except Exception as error:
            # nltk raises LookupError itself; KeyError and IndexError are other things.
            if type(error) is LookupError:
                reason = "nltk's punkt_tab is missing: python -m nltk.downloader punkt_tab, or put it in DIR/nltk_data"
            else:
                reason = f"lm-eval's checker failed: {type(error).__name__}: {error}"
            return unscored("ifeval", reason)
    count = len(row["instruction_id_list"])
    scores = {
        "strict": float(found["prompt_level_strict_acc"]),
        "loose": float(found["prompt_level_loose_acc"]),
        "instruction_strict": sum(found["inst_level_strict_acc"]) / count,
        "instruction_loose": sum(found["inst_level_loose_acc"]) / count,
    }
    weights = {"instruction_strict": float(count), "instruction_loose": float(count)}
    return Score(scores, extracted=answer, weights=weights)


def known_instructions() -> Mapping[str, Any]:
    """By lm-eval's name of a kind of IFEval's instructions: the kinds that cannot stand beside it.

    Raises:
        FusionRouteError: a package the checkers need is not installed.
    """
    found: Mapping[str, Any] = _checkers().instructions_registry.INSTRUCTION_CONFLICTS
    return found


def _ifeval_problem(row: Row, known: Mapping[str, Any]) -> str | None:
    for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        if name not in known:
            return f"lm-eval knows no instruction {name!r}"
        if missing := [key for key in known[name](name).get_instruction_args_keys() if not given.get(key)]:
            return f"instruction {name!r} lacks {', '.join(missing)}"
    return None


def general(row: Row, answer: str, *, unsafe: bool = False) -> Score:
    """Whether there is an answer; a judge says how good it is."""
    return Score({"answered": float(bool(answer.strip()))}, extracted=answer)


SCORERS: dict[str, Callable[..., Score]] = {
    "gsm8k": gsm8k,
    "math500": math500,
    "mbpp": mbpp,
    "humaneval": humaneval,
    "ifeval": ifeval,
    "general": general,
}
METRICS = dict.fromkeys(SCORERS, ("strict", "flexible")) | {
    "ifeval": ("strict", "loose", "instruction_strict", "instruction_loose"),
    "general": ("answered",),
}

_ifeval_lock = threading.Lock()


@functools.cache
def _checkers() -> Any:
    """lm-eval's module of IFEval, imported without the download that its import tries where punkt_tab is not found."""
    try:
        import langdetect
        import nltk

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizers" / "punkt_tab").mkdir(parents=True)
            nltk.data.path.append(folder)
            try:
                from lm_eval.tasks.ifeval import utils
            finally:
                nltk.data.path.remove(folder)
    except ImportError as error:
        raise FusionRouteError(f"IFEval needs more packages ({error}): pip install 'fusionroute[eval]'") from None
    # Without a seed the language of a short text is another one from time to time.
    langdetect.DetectorFactory.seed = 0
    return utils


@contextlib.contextmanager
def _same_chances() -> Iterator[None]:
    """Python's random numbers from a fixed start, and afterwards as if none had been drawn."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def find_nltk_data(folder: Path) -> None:
    """Let nltk look in `folder` too, if it exists."""
    import nltk

    if folder.is_dir() and str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))


def require_nltk_data(folder: Path) -> None:
    """As `find_nltk_data`, where sentences have to be counted.

    Raises:
        FusionRouteError: punkt_tab is nowhere.
    """
    import nltk

    find_nltk_data(folder)
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        raise FusionRouteError(
            f"ifeval needs nltk's punkt_tab: have it in {folder}, or run python -m nltk.downloader punkt_tab"
        ) from None


class _MathProcess:
    """math-verify in a process of its own.

    Its timeouts are alarms, which work in a main thread alone and cannot end a long computation in C, and they run on a
    busy machine's clock. Here the kernel ends the process after so many seconds of processor time, and the next
    question starts another.
    """

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def equal(self, wanted: str, text: str) -> tuple[bool, str | None]:
        """Whether `text` holds an expression equal to the LaTeX `wanted`, and the first expression found in it.

        Raises:
            FusionRouteError: math-verify cannot be started.
        """
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            stuck = threading.Timer(_STUCK_SECONDS, process.kill)
            stuck.start()
            try:
                process.stdin.write(json.dumps([wanted, text]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            finally:
                stuck.cancel()
            if not line:
                self.close()
                return False, None
            equal, found = json.loads(line)
            return equal, found

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fusionroute.evaluation.scoring", str(self._seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the parent, which then closes it
            )
            assert self._process.stdout is not None
            if self._process.stdout.readline() != "ready\n":
                self.close()
                raise FusionRouteError("math-verify cannot be started: pip install 'fusionroute[eval]'")
        return self._process

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_math = _MathProcess(MATH_SECONDS)
atexit.register(_math.close)


def _serve(seconds: int) -> None:
    """What the process does: read `[wanted, text]` a line, write `[equal, found]` a line."""
    import resource

    from math_verify import parse, verify

    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints may pass for an answer
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)

    def limit(what: int, soft: int) -> None:
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))

    limit(resource.RLIMIT_AS, _MATH_BYTES)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        wanted, text = json.loads(line)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + 1 + seconds)
        equal, found = False, []
        with contextlib.suppress(Exception):  # what cannot be read is not equal
            found = parse(text, parsing_timeout=None)
            equal = verify(parse(f"${wanted}$", parsing_timeout=None), found, timeout_seconds=None)
        first = next((part for part in found if isinstance(part, str)), None)
        print(json.dumps([bool(equal), first]), file=answers, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
