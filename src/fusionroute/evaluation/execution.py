"""Running Python that a language model wrote: one fresh interpreter a program, behind walls, for a bounded time.

How the walls are built is in `_walls.py`, how the verdict is reached in `_guard.py`; this module starts that script and
knows nothing of tasks, prompts or models. Where the kernel gives neither namespaces nor Landlock (macOS, Windows, some
containers), nothing runs unless the user says `--unsafe-code-execution`.

What holds: the program has no network, no environment, no files but the standard library's and its own scratch folder;
it is one process that cannot start another or signal one; time, memory, threads, files and output are bounded; nothing
of it is left behind. A program does not pass by ending early with any exit code, by printing anything anywhere, by
writing to or reading from the guard's pipes, by replacing built-in functions or functions of `os` and `sys`, by trace
functions, exit handlers or threads it set up while it was loaded.

What does not hold: program and tests share an interpreter, because the tests call the program. A program can return
objects that compare equal to anything, can change a module that the tests import, can read the tests from the frame
that calls it, and one written against this very protocol can speak the runner's part of it. Such a program gets a mark
it does not deserve; it still gets nothing out of the walls. The kernel itself is trusted: this is no virtual machine.
"""

import contextlib
import functools
import marshal
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fusionroute.errors import UsageError

MECHANISMS = ("namespaces", "landlock")
# Of the guard itself: to build the walls, to end everything.
_GRACE_SECONDS = 40


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: wall-clock time of program and tests together.
        cpu_seconds: processor time of all threads; whole seconds, as the kernel counts it.
        memory_bytes: address space, with the interpreter's own 30 MB.
        threads: at once, with the first. There is only ever one process.
        file_bytes: the largest file, and all files together, in the scratch folder.
        output_bytes: printed to stdout and stderr together.
    """

    seconds: float = 10.0
    cpu_seconds: int = 8
    memory_bytes: int = 1 << 30
    threads: int = 32
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program fared.

    Attributes:
        passed: the tests ran to their end and none failed.
        reason: `passed`; `assertion` (an assertion failed), `error` (any other exception, a syntax error too), `exit`
            (it ended before its tests did), `timeout` (wall clock or processor), `memory` (uncaught `MemoryError`),
            `output` (it printed, or wrote to its folder, more than allowed), `killed` (a signal ended it: a crash of
            the interpreter, the kernel out of memory); `sandbox`: the walls did not stand or the tests do not compile.
            That is no fault of the program's: leave it unscored.
        detail: the last lines of its stderr, or what happened if there are none.
    """

    passed: bool
    reason: str
    detail: str


def run_program(source: str, tests: str, *, limits: Limits | None = None, unsafe: bool = False) -> Outcome:
    """Run `source` as a module, then `tests` in its namespace.

    The module is called `program`, so what stands under `if __name__ == "__main__":` does not run. May be called from
    several threads at once.

    Args:
        source: what a language model wrote.
        tests: Python of ours that calls it; passes if it raises nothing.
        limits: by default `Limits()`.
        unsafe: run without walls where this machine has none, bounded by `limits` as far as the system can. Where
            it has walls they stand all the same.

    Raises:
        UsageError: this machine cannot isolate and `unsafe` is false, or it cannot run programs at all (Windows).
    """
    require_isolation(unsafe)
    if not hasattr(os, "fork"):
        raise UsageError(f"model-written code cannot run on {sys.platform}, isolated or not: use Linux or WSL")
    return _run(source, tests, limits or Limits(), isolation())


def isolation() -> str | None:
    """What isolates programs on this machine: `namespaces`, `landlock`, or `None`. Found by trying, once a process."""
    return _probe()[0]


def require_isolation(unsafe: bool) -> None:
    """Refuse early what `run_program` would refuse.

    Raises:
        UsageError: this machine cannot isolate and `unsafe` is false.
    """
    mechanism, missing = _probe()
    if mechanism is None and not unsafe:
        raise UsageError(
            f"this machine cannot isolate model-written code ({missing}): run on a Linux that can, or accept the risk "
            "with --unsafe-code-execution"
        )


@functools.cache
def _probe() -> tuple[str | None, str]:
    if sys.platform != "linux":
        return None, f"namespaces and Landlock are Linux's, this is {sys.platform}"
    missing = []
    for mechanism in MECHANISMS:
        outcome = _run("answer = 42", "assert answer == 42", Limits(), mechanism)
        if outcome.passed:
            return mechanism, ""
        missing.append(f"{mechanism}: {' '.join(outcome.detail.split())}")
    return None, "; ".join(missing)


def _run(source: str, tests: str, limits: Limits, mechanism: str | None) -> Outcome:
    with _scratch(mechanism) as folder:
        job = {
            "mechanism": mechanism,
            "parent": os.getpid(),
            "limits": asdict(limits),
            "scratch": folder,
            "program": source,
        }
        parts = marshal.dumps(job), tests.encode("utf-8", "surrogatepass")
        # -S: no site-packages. The hash seed makes a program's sets, and so its verdict, the same every time.
        command = [sys.executable, "-s", "-S", "-X", "utf8", str(Path(__file__).with_name("_guard.py"))]
        # Else glibc reserves 64 MB of address space for each thread.
        environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters find their own library by it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        try:
            ended = subprocess.run(
                command,
                input=b"".join(len(part).to_bytes(8, "little") + part for part in parts),
                capture_output=True,
                env=environment,
                cwd="/",
                start_new_session=True,
                timeout=limits.seconds + _GRACE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, "sandbox", "the guard did not end")
    if ended.returncode:
        return Outcome(False, "sandbox", _readable(ended.stderr) or f"the guard ended with code {ended.returncode}")
    reason, _, errors = ended.stdout.partition(b"\n")
    kind = reason.decode("ascii")
    return Outcome(kind == "passed", kind, "" if kind == "passed" else _readable(errors) or _explain(kind, limits))


@contextlib.contextmanager
def _scratch(mechanism: str | None) -> Iterator[str]:
    """The folder to write in; with namespaces it is inside them and ends with them.

    Elsewhere a caller that is killed outright leaves it among the temporary files.
    """
    if mechanism == "namespaces":
        yield "/tmp"
        return
    folder = tempfile.mkdtemp(prefix="fusionroute-run-")
    try:
        yield os.path.realpath(folder)
    finally:
        with contextlib.suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
        if os.path.exists(folder):
            # Folders without permissions, or deeper than a path can be long: these two programs cope.
            subprocess.run(["chmod", "-R", "u+rwx", folder], capture_output=True, check=False)
            subprocess.run(["rm", "-rf", folder], capture_output=True, check=False)


def _readable(errors: bytes) -> str:
    """Text that is safe to print: no control characters of a terminal."""
    text = errors.decode("utf-8", "replace").strip()
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _explain(reason: str, limits: Limits) -> str:
    return {
        "timeout": f"not finished within {limits.seconds:g} s ({limits.cpu_seconds} s of processor time)",
        "output": f"more than {limits.output_bytes} bytes printed or {limits.file_bytes} bytes written",
        "exit": "ended before its tests did",
        "killed": f"ended by a signal, or for more than {limits.threads} threads",
    }.get(reason, "")
