"""Runs one program and its tests behind walls: the script of the interpreter that `execution.py` starts.

Three processes. The *guard* (this script) builds the walls, starts the *runner* inside them, counts its output, watches
the clock, ends everything and reports. With namespaces there is an *init*, which only holds the pid namespace open.

Guard and runner talk over two pipes. The runner says READY (the walls stand), executes the program, says LOADED, gets
the compiled tests and executes them. Their last statement, which the guard added, sets one half of a random token; the
other half has lain in the pipe behind the tests since they came, and is read only now. The runner answers with both.
The program passed if the runner said exactly all this, nothing more, and ended with code 0. So while the program is
loaded there is nothing in the interpreter to forge a verdict with, not even the tests; what skips the tests never sees
the first half, reading the pipe early takes the second half away from the runner, and writing to the other pipe spoils
the transcript.

Standard library only: the package that this file belongs to is not visible here.
"""

import os
import sys

if __name__ == "__main__":
    # The folder of this script holds modules with names that the standard library has too.
    _here = sys.path.pop(0)
import builtins
import contextlib
import marshal
import select
import signal
import time
import types

if __name__ == "__main__":
    sys.path.append(_here)
    import _walls

    sys.path.remove(_here)
    sys.dont_write_bytecode = True

READY, LOADED = b"ready\n", b"loaded\n"
KINDS = ("assertion", "memory", "exit", "error")
# Of each half.
TOKEN_BYTES = 16
ENDED = "__tests_ended__"
# Seconds until the walls stand; much more than they take on a busy machine.
SETUP_SECONDS = 20
DETAIL_BYTES = 2000


def take(source: int, count: int) -> bytes:
    """Read exactly `count` bytes."""
    parts = b""
    while len(parts) < count:
        part = os.read(source, count - len(parts))
        if not part:
            raise EOFError(f"{count} bytes were announced, {len(parts)} came")
        parts += part
    return parts


def run(program: str, orders: int, answers: int) -> None:
    """The runner's part; does not return.

    Whatever is used after the program has run was looked up before: the program may have replaced `os.write` or `exec`.
    """
    read, write, leave, execute, load, join = os.read, os.write, os._exit, exec, marshal.loads, b"".join
    untrace, unprofile, number, size = sys.settrace, sys.setprofile, int.from_bytes, len
    base, exited, failed, exhausted, is_a = BaseException, SystemExit, AssertionError, MemoryError, issubclass
    kind_of, show, flush = type, sys.__excepthook__, sys.stderr.flush
    clean = dict(vars(builtins))
    module = types.ModuleType("program")
    # Dataclasses and pickle look a class's module up; and the guard's own must not be found.
    sys.modules["program"] = sys.modules["__main__"] = module
    names = vars(module)
    names["__builtins__"] = builtins
    ready, loaded, count, ended = READY, LOADED, TOKEN_BYTES, ENDED
    try:
        write(answers, ready)
        execute(compile(program.replace("\r\n", "\n"), "<program>", "exec"), names)
        untrace(None)
        unprofile(None)
        write(answers, loaded)
        remaining = number(read(orders, 8), "little")
        parts = []
        while remaining:
            parts.append(read(orders, remaining) or leave(1))
            remaining -= size(parts[-1])
        # The tests see the built-in functions as they were; what the program defined under such a name still counts.
        names["__builtins__"] = clean
        execute(load(join(parts)), names)
        half = b""
        while size(half) < count:
            half += read(orders, count - size(half)) or leave(1)
        write(answers, names[ended] + half)
        leave(0)
    except base as error:
        kind = b"error"
        for exception, name in (failed, b"assertion"), (exhausted, b"memory"), (exited, b"exit"):
            if is_a(kind_of(error), exception):
                kind = name
        write(answers, kind)
        trace = error.__traceback__
        error.__traceback__ = trace and trace.tb_next  # without this function
        show(kind_of(error), error, error.__traceback__)
        flush()
    finally:
        leave(1)


class Watch:
    """What the guard sees of the runner."""

    def __init__(self, pid: int, pipes: dict[str, int], limits: dict[str, float], scratch: str | None) -> None:
        self.pid, self.pipes, self.limits, self.scratch = pid, pipes, limits, scratch
        self.transcript, self.errors, self.output = b"", b"", 0
        self.status: int | None = None
        self.deadline = time.monotonic() + SETUP_SECONDS
        self.pending = memoryview(b"")
        self.poll = select.poll()
        self.open = {pipes["out"], pipes["err"], pipes["answers"]}
        for pipe in self.open:
            os.set_blocking(pipe, False)
            self.poll.register(pipe, select.POLLIN)
        os.set_blocking(pipes["orders"], False)

    def follow(self, tests: bytes, half: bytes) -> str | None:
        """Serve the runner until it ends or breaks a limit; gives the reason if it is the guard who ends it."""
        ready = sent = False
        while True:
            for pipe, _ in self.poll.poll(20 if self.open else 1):
                self._serve(pipe)
            if not ready and self.transcript.startswith(READY):
                ready, self.deadline = True, time.monotonic() + self.limits["seconds"]
            if not sent and self.transcript == READY + LOADED:
                sent, self.pending = True, memoryview(len(tests).to_bytes(8, "little") + tests + half)
                self.poll.register(self.pipes["orders"], select.POLLOUT)
            if broken := self._beyond():
                return broken
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                for pipe in list(self.open):
                    self._serve(pipe)
                return None
            if time.monotonic() > self.deadline:
                return "timeout" if ready else "sandbox"

    def _serve(self, pipe: int) -> None:
        if pipe == self.pipes["orders"]:
            try:
                self.pending = self.pending[os.write(pipe, self.pending) :]
            except BlockingIOError:
                return
            except BrokenPipeError:
                self.pending = memoryview(b"")
            if not self.pending:
                self.poll.unregister(pipe)
            return
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.poll.unregister(pipe)
            self.open.discard(pipe)
        elif pipe == self.pipes["answers"]:
            self.transcript += data
        else:
            self.output += len(data)
            if pipe == self.pipes["err"]:
                self.errors = (self.errors + data)[-DETAIL_BYTES:]

    def _beyond(self) -> str | None:
        if self.output > self.limits["output_bytes"] or len(self.transcript) > 100:
            return "output"
        if self.scratch is None:
            return None
        total = 0
        try:
            for folder, _, files in os.walk(self.scratch):
                total += 1024
                for name in files:
                    with contextlib.suppress(OSError):  # it has been removed
                        total += 1024 + os.lstat(os.path.join(folder, name)).st_blocks * 512
        except RecursionError:  # folders in folders in folders
            return "output"
        if total > self.limits["file_bytes"] + (1 << 20):
            return "output"
        with contextlib.suppress(OSError):  # there is no /proc but on Linux
            if len(os.listdir(f"/proc/{self.pid}/task")) > self.limits["threads"]:
                return "killed"
        return None

    def verdict(self, stopped: str | None, answer: bytes) -> str:
        """The reason, in the words of `execution.Outcome`."""
        if stopped is not None:
            return stopped
        if not self.transcript.startswith(READY):
            return "sandbox"
        if self.status == -signal.SIGXCPU:
            return "timeout"
        if self.status is None or self.status < 0:
            return "killed"
        if self.status == 0 and self.transcript == READY + LOADED + answer:
            return "passed"
        said = self.transcript[len(READY) :].removeprefix(LOADED).decode("ascii", "replace")
        return said if said in KINDS else "exit"


def guard() -> tuple[str, int, int] | None:
    """The guard's part; what the runner needs is returned in the runner, so no frame of the guard is above it."""
    job = marshal.loads(take(0, int.from_bytes(take(0, 8), "little")))
    mechanism, limits, scratch = job["mechanism"], job["limits"], job["scratch"]
    lifeline = None
    if mechanism == "namespaces":
        lifeline = _walls.enter_namespaces(limits["file_bytes"])
    _walls.die_with(job["parent"])
    own = os.getpid()
    (out, out_in), (err, err_in), (orders_out, orders), (answers, answers_in) = (os.pipe() for _ in range(4))
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out_in, 1)
        os.dup2(err_in, 2)
        for number in range(3, 64):
            if number not in (orders_out, answers_in):
                os.closerange(number, number + 1)
        os.setsid()
        if mechanism != "namespaces":
            _walls.die_with(own)
        os.environ.clear()
        os.environ.update(PATH="/usr/bin:/bin", LANG="C.UTF-8", HOME=scratch, TMPDIR=scratch)
        _walls.confine(
            mechanism,
            cpu=limits["cpu_seconds"],
            memory=limits["memory_bytes"],
            threads=limits["threads"],
            file_bytes=limits["file_bytes"],
            scratch=scratch,
        )
        return job["program"], orders_out, answers_in
    for number in out_in, err_in, orders_out, answers_in:
        os.close(number)
    # The runner exists already, so the tests are in no memory of its.
    tests = take(0, int.from_bytes(take(0, 8), "little")).decode("utf-8", "surrogatepass")
    first, second = os.urandom(TOKEN_BYTES), os.urandom(TOKEN_BYTES)
    watch = Watch(
        pid,
        {"out": out, "err": err, "orders": orders, "answers": answers},
        limits,
        None if mechanism == "namespaces" else scratch,
    )
    try:
        whole = tests.replace("\r\n", "\n") + f"\n{ENDED} = {first!r}\n"
        stopped = watch.follow(marshal.dumps(compile(whole, "<tests>", "exec")), second)
    finally:
        if mechanism is None:
            with contextlib.suppress(OSError):  # nobody is left in it
                os.killpg(pid, signal.SIGKILL)
        if watch.status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if lifeline is not None:
            os.close(lifeline)
            os.wait()
    reason = watch.verdict(stopped, first + second)
    detail = b"" if reason == "passed" else watch.errors
    with open(1, "wb") as channel:
        channel.write(reason.encode() + b"\n" + detail)
    return None


if __name__ == "__main__":
    try:
        _job = guard()
    except Exception as error:
        # In the runner this is the pipe that the guard reads: the walls do not stand.
        os.write(2, f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
        os._exit(1)
    if _job is not None:
        run(*_job)
