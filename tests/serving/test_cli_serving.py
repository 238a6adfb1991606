"""`fusionroute serve` as a process, and its refusals."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.serving.conftest import free_port, spawn

PROMPT = "How many secret cows has he now?"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "log"


@contextmanager
def running(folder: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server with a key from the environment: the process and its address."""
    port = free_port()
    server = spawn(folder, port, log, FUSIONROUTE_API_KEY="sesame")
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 90
    while True:
        try:
            httpx.get(f"{url}/health/ready").raise_for_status()
            break
        except httpx.HTTPError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.1)
    try:
        yield server, url
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def process(folder: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with running(folder, log) as found:
        yield found


def test_the_text_is_that_of_generate(process: tuple, folder: Path, run: Callable) -> None:
    asked = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 20}
    assert httpx.post(f"{process[1]}/v1/chat/completions", json=asked).status_code == 401
    reply = httpx.post(
        f"{process[1]}/v1/chat/completions", json=asked, headers={"Authorization": "Bearer sesame"}, timeout=60
    )
    code, out, _ = run("generate", PROMPT, "-c", folder, "--max-new-tokens", 20, "--dtype", "float32", "--json")
    assert code == 0
    assert reply.json()["choices"][0]["message"]["content"] == json.loads(out)["text"]


def test_told_to_stop_it_stops_and_has_told_nothing(process: tuple, log: Path) -> None:
    server, url = process
    broken = {"messages": [{"role": "user", "content": PROMPT}], "temperature": "hot"}
    httpx.post(f"{url}/v1/chat/completions", json=broken, headers={"Authorization": "Bearer sesame"})
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
    text = log.read_text()
    assert "/v1/chat/completions" in text
    assert "secret" not in text
    assert "sesame" not in text
    assert "Traceback" not in text


def test_told_to_stop_it_finishes_what_it_writes(folder: Path, tmp_path: Path) -> None:
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 300, "ignore_eos": True, "stream": True}
    headers = {"Authorization": "Bearer sesame"}
    with running(folder, tmp_path / "log") as (server, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, headers=headers, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert server.wait(30) == 0
    assert sum(len(c["fusionroute"]["tokens"]) for frame in frames for c in frame["choices"]) == 300
    assert frames[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--rows", 0), 2, "rows must be at least 1, not 0"),
        (("--timeout", 0), 2, "seconds must be above 0"),
        (("--kv-gigabytes", -1), 2, "--kv-gigabytes must be above 0"),
        (("-c", "/nowhere"), 2, "/nowhere"),
    ],
)
def test_refusals(run: Callable, words: tuple, code: int, message: str) -> None:
    found, _, err = run("serve", *words)
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_without_the_extra(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fusionroute.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, _, err = run("serve")
    assert code == 1
    assert "pip install 'fusionroute[serve]'" in err
