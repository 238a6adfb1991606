"""A tiny random collection behind a real socket, and stock clients for it."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from fusionroute.serving.api import Service, create_app
from fusionroute.serving.guard import PatientProtocol
from fusionroute.serving.server import make_service
from fusionroute.serving.settings import Limits

NAME = "tiny"


@dataclass
class Live:
    """A server that listens, in a thread of this process."""

    service: Service
    server: uvicorn.Server
    url: str
    key: str | None

    @property
    def engine(self) -> Any:
        return self.service.scheduler.engine

    def client(self, **settings: Any) -> openai.OpenAI:
        settings = {"max_retries": 0, "timeout": 60, "api_key": self.key or "none", **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def http(self, **settings: Any) -> httpx.Client:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, timeout=60, headers=headers, **settings)

    def idle(self, seconds: float = 10) -> bool:
        """Whether every row ends within so long, and nothing is held for rows that run."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            # A row has left before its memory is given back.
            held = self.engine.active or self.engine.waiting or self.service.scheduler._open
            if not held and self.engine.members.allocated == 0:
                return True
            time.sleep(0.01)
        return False

    def slowed(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        """Let every step take so long."""
        step = self.engine.step

        def later() -> Any:
            time.sleep(seconds)
            return step()

        monkeypatch.setattr(self.engine, "step", later)

    def stop(self) -> None:
        self.server.should_exit = True


Start = Callable[..., Live]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(folder: Path, port: int, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """`fusionroute serve` as a process of its own, which writes to the end of `log`."""
    command = [
        sys.executable,
        "-m",
        "fusionroute",
        "serve",
        "-c",
        str(folder),
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})


def listen(service: Service, *, key: str | None = None, origins: tuple[str, ...] = ()) -> tuple[Live, threading.Thread]:
    port = free_port()
    app = create_app(service, key=key, origins=origins)
    config = uvicorn.Config(
        app, port=port, http=PatientProtocol, ws="none", log_level="warning", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until, "the server does not start"
        time.sleep(0.01)
    return Live(service, server, f"http://127.0.0.1:{port}", key), thread


@pytest.fixture(scope="session")
def folder(make_collection: Callable[[str], Path]) -> Path:
    """The collection that is served."""
    return make_collection("adapters")


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Start]:
    """A function that starts a server with such limits; it is stopped at the module's end."""
    running: list[tuple[Live, threading.Thread]] = []

    def begin(key: str | None = None, origins: tuple[str, ...] = (), **limits: Any) -> Live:
        limits = {"drain_seconds": 2.0, **limits}
        service = make_service(str(folder), Limits(**limits), name=NAME, dtype="float32")
        service.scheduler.traces = True
        live, thread = listen(service, key=key, origins=origins)
        running.append((live, thread))
        return live

    yield begin
    for live, thread in running:
        live.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def live(start: Start) -> Live:
    """A server with the usual limits."""
    return start()
