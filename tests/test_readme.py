"""Every command and the Python of the README run as they stand; hours-long ones with --tiny."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of every bash block, without `make test`, which is what runs this, and the server, which runs on."""
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and line not in ("make test", "make demo-serve")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout: the commands make and use files in it, in the README's order."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def run(command: list[str], where: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, input="", timeout=1500)


def test_readme_opens_with_the_two_commands() -> None:
    assert blocks("bash")[0].split("\n")[:2] == ["make demo", "make test"]


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_command(line: str, place: Path) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        done = run(words, ROOT)
    elif "DIR" in words and words[1] == "run":
        done = run([*words[: words.index("--data")], "--tiny"], place)
    elif words[1] == "evaluate":
        tiny = ["--limit", "1", "--data", str(ROOT / "tests/evaluation/fixtures"), "--collection", "demo/collection"]
        done = run([*words[: words.index("--limit")], *tiny, "--out", "results"], place)
    elif "DIR" in words:  # the tiny run's recipe, rows and collection stand in for the hours-long one's
        tiny = ["--recipe", "demo/recipe.yaml", "--data", "demo/tiny-data", "--collection", "demo/collection"]
        done = run([*words[: words.index("--recipe")], *tiny], place)
    elif words[1:3] == ["bench", "decode"]:
        done = run([*words, "--quick", "--collection", "demo/collection"], place)
    else:
        done = run(words, place)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_python(place: Path) -> None:
    done = run([sys.executable, "-c", blocks("python")[0]], place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(re.findall(r"'(\w+)'", done.stdout.splitlines()[-1])) <= {"general", "math", "code"}


@pytest.mark.slow
def test_server_and_python_of_its_client(place: Path) -> None:
    server = subprocess.Popen(["make", "demo-serve"], cwd=ROOT, start_new_session=True)
    try:
        until = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen("http://127.0.0.1:8000/health/ready"):
                break
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.5)
        done = run([sys.executable, "-c", blocks("python")[1]], place)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.slow
def test_python_of_the_engine(place: Path) -> None:
    done = run([sys.executable, "-c", blocks("python")[2]], place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"^(?:stop|length) .+", done.stdout, flags=re.MULTILINE)) == 2
