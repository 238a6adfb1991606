"""Programs that try to get out of the sandbox, to forge the verdict, or just to be right.

Every escape runs behind each kind of walls. Where it makes sense the same program first runs without walls (`free`), so
that it fails for the walls and not for a mistake of its own. On Linux nothing here is skipped for want of isolation.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from fusionroute.errors import UsageError
from fusionroute.evaluation import execution
from fusionroute.evaluation.execution import MECHANISMS, Limits, Outcome, isolation, require_isolation, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux isolates; elsewhere nothing runs")

Runner = Callable[..., Outcome]


KNOWN: set[int] = set()


@pytest.fixture(autouse=True)
def _children_of_others() -> None:
    """Other tests of the same process may have left workers of theirs running."""
    KNOWN.clear()
    KNOWN.update(child.pid for child in psutil.Process().children(recursive=True))


def leftovers() -> list[psutil.Process]:
    """Processes that this test has started and that still run."""
    return [child for child in psutil.Process().children(recursive=True) if child.pid not in KNOWN]


def _runner(mechanism: str | None) -> Runner:
    def run(source: str, tests: str = "", **limits: Any) -> Outcome:
        return execution._run(textwrap.dedent(source), textwrap.dedent(tests), Limits(**limits), mechanism)

    return run


@functools.cache
def _stands(mechanism: str) -> bool:
    return _runner(mechanism)("").passed


@pytest.fixture(params=MECHANISMS)
def mechanism(request: pytest.FixtureRequest) -> str:
    """Each kind of walls; fails if this machine has none."""
    assert isolation() is not None, "this machine cannot isolate"
    if not _stands(request.param):
        pytest.skip(f"{isolation()} stands in for {request.param}")
    return request.param


@pytest.fixture
def caged(mechanism: str) -> Runner:
    """Runs a program behind walls of each kind."""
    return _runner(mechanism)


@pytest.fixture
def free() -> Runner:
    """Runs a program without walls: for programs that do no harm."""
    return _runner(None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that scratch folders are made in."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# Right and wrong programs.


def test_this_machine_isolates() -> None:
    assert isolation() in MECHANISMS


def test_public_call() -> None:
    assert run_program("def double(x): return 2 * x", "assert double(4) == 8") == Outcome(True, "passed", "")


def test_wrong_answer(caged: Runner) -> None:
    outcome = caged("def double(x): return x", "assert double(0) == 0\nassert double(4) == 8, 'four'")
    assert (outcome.passed, outcome.reason) == (False, "assertion")
    assert '"<tests>", line 2' in outcome.detail
    assert outcome.detail.endswith("AssertionError: four")


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("def double(x) return x", "SyntaxError: "),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("double = lambda x: y", "NameError: "),
        ("input()", "EOFError: "),
        ("'\\ud800'.encode()\ud800", ""),
        ("double\0", ""),
        ("def double(x): return double(x)", "RecursionError: "),
    ],
)
def test_error_of_the_program(caged: Runner, source: str, last: str) -> None:
    outcome = caged(source, "double(4)")
    assert outcome.reason == "error"
    assert outcome.detail.splitlines()[-1].startswith(last)
    assert "_guard.py" not in outcome.detail


def test_crash_of_the_interpreter(caged: Runner) -> None:
    assert caged("import ctypes; ctypes.string_at(0)").reason == "killed"


def test_tests_that_do_not_compile_are_no_fault_of_the_program(caged: Runner) -> None:
    outcome = caged("x = 1", "assert x ==")
    assert (outcome.reason, "SyntaxError" in outcome.detail) == ("sandbox", True)


def test_standard_library(caged: Runner) -> None:
    modules = (
        "math re collections itertools typing heapq functools datetime json random string bisect decimal fractions "
        "statistics hashlib operator copy sys os enum dataclasses zlib sqlite3 unittest"
    )
    source = f"""
        import {", ".join(modules.split())}
        from concurrent.futures import ThreadPoolExecutor
        import asyncio, shutil, tempfile

        async def later():
            await asyncio.sleep(0)
            return 5

        def use():
            with ThreadPoolExecutor(4) as pool, tempfile.TemporaryDirectory() as place:
                open(place + "/a", "w").write("text")
                shutil.copy2(place + "/a", place + "/b")
                assert open(place + "/b").read() == "text"
                assert list(pool.map(abs, [-1, 2])) == [1, 2]
            assert asyncio.run(later()) == 5
            return json.dumps([math.gcd(4, 6), heapq.nsmallest(1, [3, 2])])
    """
    outcome = caged(source, "assert use() == '[2, [2]]'")
    assert outcome.passed, outcome.detail


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        ("def f(x):\r\n    return x\r\n", "assert f(1) == 1\r\nassert f('''a\r\nb''') == 'a\\nb'\r\n"),
        ("grüße = 'naïve 日本 🐄'", "assert len(grüße) == 10 and grüße.encode().decode() == grüße"),
        ("open('a', 'w').write('日本')", "assert open('a').read() == '日本'"),
        (
            "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 3",
            "assert A() == A(3)",
        ),
        ("import pickle\nclass A: x = 1", "assert pickle.loads(pickle.dumps(A())).x == 1"),
        ("if __name__ == '__main__': 1 / 0", ""),
        ("def f(): return CONSTANT", "CONSTANT = 7\nassert f() == 7"),
        ("def sum(a, b): return a * b", "assert sum(2, 4) == 8"),
        ("print('x' * 1000)", "pass  # no line end, and a comment"),
    ],
)
def test_passes(caged: Runner, source: str, tests: str) -> None:
    outcome = caged(source, tests)
    assert outcome.passed, outcome.detail


def test_tests_longer_than_a_pipe(caged: Runner) -> None:
    assert caged("def f(x): return x", "assert f(1) == 1\n" * 20_000).passed


def test_hashes_are_the_same_every_time(caged: Runner) -> None:
    numbers = {caged("raise ValueError(hash('text'))").detail.splitlines()[-1] for _ in range(2)}
    assert len(numbers) == 1


def test_two_at_once(caged: Runner) -> None:
    source = """
        import os, time
        open("mine", "x").write("{0}")
        time.sleep(0.3)
        answer = open("mine").read(), os.listdir()
    """
    with ThreadPoolExecutor(2) as pool:
        outcomes = [
            pool.submit(caged, source.format(number), f"assert answer == ('{number}', ['mine']), answer")
            for number in range(4)
        ]
    assert [outcome.result().detail for outcome in outcomes] == [""] * 4


# Escapes.


def test_fork_bomb(caged: Runner, free: Runner) -> None:
    one = "import os\nchild = os.fork()\nif child: os.waitpid(child, 0)\nelse: os._exit(0)"
    assert free(one).passed
    outcome = caged("import os\nwhile True: os.fork()")
    assert (outcome.reason, "PermissionError" in outcome.detail) == ("error", True)


@pytest.mark.parametrize("call", ["fork", "vfork"])
def test_fork_bomb_of_the_c_library(caged: Runner, call: str) -> None:
    source = f"import ctypes\nlibc = ctypes.CDLL(None)\nassert [libc.{call}() for _ in range(1000)] == [-1] * 1000"
    assert caged(source).passed


def test_fork_bomb_that_will_not_give_up(caged: Runner) -> None:
    source = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert caged(source, seconds=0.5).reason == "timeout"
    assert leftovers() == []


def test_starting_programs(caged: Runner, free: Runner) -> None:
    assert free("import subprocess\nsubprocess.run(['true'], check=True)").passed
    outcome = caged("import subprocess\nsubprocess.run(['true'], check=True)")
    assert (outcome.reason, "PermissionError" in outcome.detail) == ("error", True)
    assert caged("import os\nos.execv('/bin/true', ['true'])").reason == "error"


def test_thread_bomb(caged: Runner) -> None:
    source = """
        import threading, time
        threading.stack_size(32768)
        for _ in range({0}):
            threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
    """
    assert caged(source.format(16)).passed
    assert caged(source.format(100_000)).reason in ("error", "killed")


def test_ten_gigabytes(caged: Runner) -> None:
    assert caged("b'x' * (10 << 20)").passed
    assert caged("b'x' * (10 << 30)").reason == "memory"
    assert caged("import mmap\nmmap.mmap(-1, 10 << 30)").reason in ("memory", "error")
    assert caged("grow = []\nwhile True: grow.append(bytearray(1 << 20))", memory_bytes=200 << 20).reason == "memory"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(caged: Runner, stream: str) -> None:
    started = time.monotonic()
    outcome = caged(f"import sys\nwhile True: print('x' * 999, file=sys.{stream})")
    assert (outcome.reason, len(outcome.detail) <= 2000) == ("output", True)
    assert time.monotonic() - started < 5


def test_terminal_codes_do_not_reach_the_terminal(caged: Runner) -> None:
    assert "\x1b" not in caged("raise ValueError('\\x1b[2J')").detail


@pytest.fixture
def treasure() -> Iterator[Path]:
    """A file in the home folder."""
    with tempfile.NamedTemporaryFile("w", dir=Path.home(), prefix=".fusionroute-test-") as file:
        file.write("treasure")
        file.flush()
        yield Path(file.name)


def test_reading_the_home_folder(caged: Runner, free: Runner, treasure: Path) -> None:
    source = f"text = open({str(treasure)!r}).read()"
    assert free(source, "assert text == 'treasure'").passed
    assert caged(source, "assert text == 'treasure'").reason == "error"
    names = caged(f"import os\nraise ValueError(os.listdir({str(Path.home())!r}))")
    assert treasure.name not in names.detail


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/proc/self/mem", "/proc/1/status", "/sys"])
def test_reading_the_system(caged: Runner, path: str) -> None:
    source = f"import os\nos.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}, 'rb').read(1)"
    outcome = caged(source)
    assert outcome.reason == "error"
    assert outcome.detail.splitlines()[-1].startswith(("FileNotFoundError", "PermissionError"))


def test_opening_a_socket(caged: Runner, free: Runner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"import socket\nsocket.create_connection({server.getsockname()}, 1).close()"
        assert free(source).passed
        server.accept()[0].close()
        outcome = caged(source)
        assert (outcome.reason, "PermissionError" in outcome.detail) == ("error", True)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("kind", ["AF_UNIX, socket.SOCK_DGRAM", "AF_INET6, socket.SOCK_DGRAM", "AF_NETLINK, 3"])
def test_opening_other_sockets(caged: Runner, free: Runner, kind: str) -> None:
    source = f"import socket\nsocket.socket(socket.{kind}).close()"
    assert free(source).passed
    assert "PermissionError" in caged(source).detail
    assert not caged(f"import socket\nsocket.socketpair(socket.{kind})").passed


def test_writing_outside(caged: Runner, free: Runner, tmp_path: Path) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    attempts = [f"open({str(new)!r}, 'w')", *(f"os.{call}" for call in _damages(str(kept), str(new)))]
    source = "import os\nfailures = []\n" + "".join(
        f"try:\n    {attempt}\nexcept OSError as error: failures.append(error)\n" for attempt in attempts
    )
    # Any one of them succeeds without walls.
    for attempt in attempts:
        kept.write_text("whole")
        assert free(f"import os\n{attempt}").passed, attempt
        new.unlink(missing_ok=True)
    kept.write_text("whole")
    kept.chmod(0o644)
    os.utime(kept, (1, 1))
    assert caged(source).passed
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    status = kept.stat()
    assert (kept.read_text(), status.st_mode & 0o777, status.st_mtime) == ("whole", 0o644, 1)


def _damages(kept: str, new: str) -> list[str]:
    return [
        f"truncate({kept!r}, 0)",
        f"open({kept!r}, os.O_RDONLY | os.O_TRUNC)",
        f"rename({kept!r}, {new!r})",
        f"link({kept!r}, {new!r})",
        f"symlink({kept!r}, {new!r})",
        f"unlink({kept!r})",
        f"chmod({kept!r}, 0o600)",
        f"utime({kept!r}, (5, 5))",
    ]


@pytest.mark.parametrize("path", [os.__file__, "/dev/urandom", "/dev", "/usr/lib", "/", sys.prefix])
def test_writing_to_the_system(caged: Runner, path: str) -> None:
    # A folder is opened as a temporary file without a name: if the walls have a hole, nothing stays.
    flags = "os.O_TMPFILE | os.O_WRONLY" if os.path.isdir(path) else "os.O_WRONLY"
    outcome = caged(f"import os\nos.open({path!r}, {flags})")
    assert outcome.reason == "error"
    assert outcome.detail.splitlines()[-1].startswith(("PermissionError", "FileNotFoundError", "OSError: [Errno 30]"))


def test_what_can_be_read_is_mounted_read_only(mechanism: str) -> None:
    if mechanism == "landlock":
        pytest.skip("Landlock mounts nothing; it refuses to write, which is tested above")
    places = ["/", "/usr/lib", os.path.dirname(os.__file__)]
    outcome = _runner(mechanism)(
        f"import os\nopen(os.devnull, 'w').write('x')\nread_only = [os.statvfs(path).f_flag & 1 for path in {places}]",
        "assert read_only == [1, 1, 1], read_only",
    )
    assert outcome.passed, outcome.detail


def test_killing_the_parent(caged: Runner, free: Runner) -> None:
    assert free("import os\nos.kill(os.getppid(), 0)").passed
    # Signal 0 only asks whether another would be sent: it would be rude to init if the walls had a hole.
    for victim, number in ("os.getppid()", 9), (os.getpid(), 9), (1, 0), (-1, 0), (0, 0):
        outcome = caged(f"import os\nos.kill({victim}, {number})")
        assert (outcome.reason, "PermissionError" in outcome.detail) == ("error", True), victim


@pytest.mark.parametrize(
    "attack",
    [
        "resource.prlimit(PARENT, resource.RLIMIT_CPU)",
        "os.sched_setaffinity(PARENT, os.sched_getaffinity(0))",
        "os.setpriority(os.PRIO_PROCESS, PARENT, 0)",
        "check(libc.syscall(434, PARENT, 0))",  # pidfd_open
        "check(libc.ptrace(0x4206, PARENT, 0, 0))",  # PTRACE_SEIZE
        # A pipe sends its owner the signal of one's choice when there is something to read.
        "fcntl.fcntl(0, fcntl.F_SETOWN, PARENT)",
        "fcntl.fcntl(0, 10, 9)",  # F_SETSIG
        "check(libc.unshare(0x10000000))",  # CLONE_NEWUSER
        "check(libc.umount2(b'/nowhere', 0))",
        "check(libc.prctl(1, 0, 0, 0, 0))",  # PR_SET_PDEATHSIG
        "check(libc.memfd_create(b'', 0))",
        "check(libc.shmget(0, 4096, 0o1600))",
    ],
)
def test_other_ways_out(caged: Runner, attack: str) -> None:
    source = f"""
        import ctypes, fcntl, os, resource
        PARENT = {os.getpid()}
        libc = ctypes.CDLL(None, use_errno=True)
        def check(result):
            if result < 0: raise OSError(ctypes.get_errno(), "refused")
        {attack}
    """
    outcome = caged(source)
    # pidfd_open is of the newer calls, which claim not to exist.
    assert outcome.reason == "error"
    assert "[Errno 1]" in outcome.detail or "[Errno 38]" in outcome.detail, outcome


def test_leaving_a_daemon_behind(caged: Runner, free: Runner, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    source = f"""
        import os, time
        def detach():
            child = os.fork()
            if child == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(0.5)
                    open({str(sign)!r}, "w").close()
                os._exit(0)
            os.waitpid(child, 0)  # else what follows the program's end may come before the new session
        detach()
    """
    assert free(source).passed
    deadline = time.monotonic() + 10
    while not sign.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sign.exists()
    sign.unlink()
    assert caged(source).reason == "error"
    time.sleep(1)
    assert not sign.exists()
    assert leftovers() == []


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except Exception: pass\n"
        "while True:\n    try: signal.pause()\n    except BaseException: pass",
        "import os\nos.closerange(0, 64)\nwhile True: pass",
        "class A(Exception):\n    def __str__(self):\n        while True: pass\nraise A",
    ],
)
def test_endless_programs(caged: Runner, source: str) -> None:
    started = time.monotonic()
    outcome = caged(source, seconds=0.5)
    assert (outcome.reason, outcome.passed) == ("timeout", False)
    assert time.monotonic() - started < 2.5
    assert leftovers() == []


def test_endless_loop_in_the_tests_call(caged: Runner) -> None:
    assert caged("def f():\n    while True: pass", "f()", seconds=1).detail.startswith("not finished within 1 s")


def test_processor_time(caged: Runner) -> None:
    started = time.monotonic()
    assert caged("while True: pass", cpu_seconds=1, seconds=30).reason == "timeout"
    assert time.monotonic() - started < 15


def test_scratch_folder(caged: Runner, folder: Path) -> None:
    source = """
        import os
        open("a", "w").write("text")
        os.makedirs("b/c")
        os.chmod("b/c", 0)
        os.mkdir("d", 0)
        os.mkdir("e")
        os.mkdir("e/f", 0o500)
        text = open(os.path.expanduser("~/a")).read()
    """
    assert caged(source, "assert text == 'text'").passed
    assert list(folder.iterdir()) == []


def test_folders_deeper_than_a_path_is_long(caged: Runner, folder: Path) -> None:
    outcome = caged("import os\nfor _ in range(3000):\n    os.mkdir('deeper')\n    os.chdir('deeper')")
    assert outcome.reason != "sandbox"
    assert list(folder.iterdir()) == []


def test_large_files(caged: Runner, folder: Path) -> None:
    assert caged("open('a', 'wb').write(b'x' * (1 << 20))").passed
    assert caged("open('a', 'wb').write(b'x' * (17 << 20))").reason == "error"
    many = "for number in range(10_000):\n    open(str(number), 'wb').write(b'x' * (1 << 20))"
    assert caged(many).reason in ("error", "output")
    assert list(folder.iterdir()) == []


def test_environment(caged: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONROUTE_SECRET", "1")
    outcome = caged("import os", "assert set(os.environ) == {'PATH', 'LANG', 'HOME', 'TMPDIR'}, os.environ")
    assert outcome.passed, outcome.detail


def test_descriptors(caged: Runner) -> None:
    source = """
        import os
        found = 0
        for number in range(64):
            try:
                os.fstat(number)
                found += 1
            except OSError:
                pass
    """
    # Three streams and the two pipes of the runner.
    outcome = caged(source, "assert found == 5, found")
    assert outcome.passed, outcome.detail


def test_ends_with_its_caller(mechanism: str, tmp_path: Path) -> None:
    code = (
        "from fusionroute.evaluation.execution import Limits, _run\n"
        f"_run('while True: pass', '', Limits(seconds=60, cpu_seconds=60), {mechanism!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}) as caller:
        watched = psutil.Process(caller.pid)
        deadline = time.monotonic() + 10
        while sum(child.cpu_times().user > 0.2 for child in watched.children(recursive=True)) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started = watched.children(recursive=True)
        caller.send_signal(signal.SIGKILL)
    assert len(started) >= 2
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == []


# Forgeries: `f` is wrong, and the program tries to pass all the same.

WRONG = "def f(x): return 0\n"
# Each line fails by itself as soon as all the functions in it are the real ones.
TESTS = """
assert all([abs(f(2) - 2) < 1e-6, abs(f(3) - 3) < 1e-6])
assert len([x for x in range(9) if f(x) == x]) == 9
"""
FORGERIES = {
    "exit": "import sys\nsys.exit(0)",
    "exit when called": "import sys\ndef f(x): sys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "hard exit when called": "import os\ndef f(x): os._exit(0)",
    "exit handler": "import atexit, os\natexit.register(os._exit, 0)",
    "exit from a thread": """
        import os, threading
        threading.Timer(0.05, os._exit, [0]).start()
        def f(x):
            while True: pass
    """,
    "message": "print('passed\\nready\\nloaded\\nOK')\nimport sys\nprint('passed', file=sys.stderr)\nsys.exit(0)",
    "exception": "class E(BaseException): pass\ndef f(x): raise E",
    "generator exit": "def f(x): raise GeneratorExit",
    "built-ins": """
        import builtins
        for name in "exec compile isinstance issubclass type BaseException AssertionError bytes".split():
            setattr(builtins, name, lambda *a, **k: True)
        builtins.abs, builtins.all, builtins.len = lambda x: 0, lambda x: True, lambda x: 9
    """,
    "assertions that are no errors": "import builtins\nbuiltins.AssertionError = SystemExit",
    "import": "import builtins\nbuiltins.__import__ = lambda *a, **k: exit",
    "own built-ins": "__builtins__ = {'AssertionError': StopIteration}",
    "os": """
        import os, sys, marshal, json
        os.write = os.read = os._exit = lambda *a: b"ready\\nloaded\\n"
        marshal.loads = lambda data: compile("", "", "exec")
        json.loads = json.dumps = sys.exit = lambda *a: None
    """,
    "modules": "import sys\nfor name in list(sys.modules): sys.modules[name] = None",
    "guard": """
        import sys
        for module in list(sys.modules.values()):
            for name in ("take", "run", "guard", "_walls", "Watch", "READY", "LOADED", "KINDS", "ENDED", "TOKEN_BYTES"):
                if hasattr(module, name): setattr(module, name, lambda *a: 0)
    """,
    "hooks": "import sys\nsys.excepthook = sys.unraisablehook = sys.displayhook = lambda *a: None",
    "streams": "import sys\nsys.stdout = sys.stderr = sys.stdin = None",
    "trace": """
        import sys
        def trace(frame, event, argument):
            lines = [line for _, _, line in frame.f_code.co_lines() if line]
            if event == "line" and frame.f_code.co_filename == "<tests>" and frame.f_lineno < max(lines):
                frame.f_lineno = max(lines)
            return trace
        sys.settrace(trace)
    """,
    "alarm": """
        import os, signal
        signal.signal(signal.SIGALRM, lambda *a: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        def f(x):
            while True: pass
    """,
    "locals of the frames above": """
        import ctypes, sys
        frame = sys._getframe()
        while frame:
            values = frame.f_locals
            for name in list(values):
                if callable(values[name]) and name not in ("f", "frame"): values[name] = lambda *a: b""
            try: ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
            except AttributeError: pass
            frame = frame.f_back
    """,
    "only the execution of the tests": """
        import ctypes, sys
        frame = sys._getframe(1)
        frame.f_locals["execute"] = lambda *a: None
        try: ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
        except AttributeError: pass
    """,
    "writing to every pipe": """
        import os
        for number in range(3, 64):
            for text in (b"loaded\\n", b"passed\\n", bytes(32)):
                try: os.write(number, text)
                except OSError: pass
    """,
    "reading every pipe and answering the same": """
        import os
        def f(x):
            for number in range(3, 64):
                try:
                    os.set_blocking(number, False)
                    text = os.read(number, 9999)
                    for other in range(3, 64):
                        try: os.write(other, text)
                        except OSError: pass
                except OSError: pass
            os._exit(0)
    """,
    "closing every pipe": "import os\nos.closerange(0, 64)",
    "claiming to be done": "def f(x):\n    globals()['__tests_ended__'] = bytes(16)\n    raise SystemExit(0)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery(caged: Runner, name: str) -> None:
    outcome = caged(WRONG + textwrap.dedent(FORGERIES[name]), TESTS, seconds=1)
    assert not outcome.passed
    # It is the program's fault, and says so.
    assert outcome.reason != "sandbox", outcome.detail


def test_tests_are_not_in_memory_while_the_program_is_loaded(caged: Runner) -> None:
    source = """
        import gc, sys
        seen = []
        def look(thing, depth=0):
            if isinstance(thing, (str, bytes)):
                seen.append(str(thing))
            elif depth < 4:
                for part in gc.get_referents(thing): look(part, depth + 1)
        frame = sys._getframe()
        while frame:
            look(list(frame.f_locals.values()), 1)
            look(frame.f_code, 1)
            frame = frame.f_back
        for thing in gc.get_objects(): look(thing, 3)
        found = [text[:40] for text in seen if "-".join(["needle", "in", "the", "hay"]) in text]
    """
    outcome = caged(source, "assert found == [] and len(seen) > 1000, found\n'needle-in-the-hay'")
    assert outcome.passed, outcome.detail


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
        "import math\nmath.pi = 0\ndef f(x): return x + math.pi",
    ],
)
def test_what_is_not_defended(caged: Runner, source: str) -> None:
    assert caged(source, "import math\nassert f(1) == 1 + math.pi").passed


# Where nothing isolates.


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A platform that cannot isolate."""
    execution._probe.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    yield
    execution._probe.cache_clear()


@pytest.mark.usefixtures("elsewhere")
def test_refuses_without_isolation(refuses: Callable[..., Any], tmp_path: Path) -> None:
    assert isolation() is None
    sign = tmp_path / "sign"
    with refuses(UsageError, "darwin", "--unsafe-code-execution"):
        run_program(f"open({str(sign)!r}, 'w')", "")
    assert not sign.exists()
    with refuses(UsageError, "--unsafe-code-execution"):
        require_isolation(False)


def test_refuses_on_a_linux_that_cannot() -> None:
    # Takes unshare and Landlock away from itself, as a container may; then asks.
    code = """
        import ctypes, os, struct
        from fusionroute.errors import UsageError
        from fusionroute.evaluation.execution import isolation, run_program

        unshare = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
        steps = [(0x20, 0, 0, 0), (0x15, 1, 0, unshare), (0x15, 0, 1, 444), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        libc = ctypes.CDLL(None)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))) == 0
        assert isolation() is None
        try:
            run_program("", "")
        except UsageError as error:
            print(error)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
    )
    assert [ended.stdout.count(word) for word in ("unshare: ", "landlock: ", "--unsafe-code-execution", "\n")] == [
        1
    ] * 4


@pytest.mark.usefixtures("elsewhere")
def test_runs_without_isolation_if_told_to(folder: Path) -> None:
    require_isolation(True)
    assert run_program("def f(x): return x", "assert f(1) == 1", unsafe=True).passed
    assert run_program("while True: pass", "", limits=Limits(seconds=1), unsafe=True).reason == "timeout"
    assert list(folder.iterdir()) == []


def test_isolates_where_it_can_though_told_not_to(treasure: Path) -> None:
    assert run_program(f"open({str(treasure)!r})", "", unsafe=True).reason == "error"
