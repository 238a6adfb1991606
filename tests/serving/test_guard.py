"""Keys, sizes, slow senders, other sites."""

import asyncio
import socket
import time
from typing import Any

import pytest
from tests.serving.conftest import NAME, Live, Start
from tests.serving.test_api import is_error

from fusionroute.serving import guard
from fusionroute.serving.server import LOOPBACK
from fusionroute.serving.settings import Limits

ASK = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(start: Start) -> Live:
    return start(key="sesame", body_bytes=2000, body_seconds=0.5)


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1])), timeout=10)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer sesam", "Bearer sesamee", "Basic sesame", "sesame"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json"])
def test_without_the_key_nothing_is_told(guarded: Live, header: str | None, path: str) -> None:
    with guarded.http() as http:
        http.headers.pop("authorization")
        reply = http.get(path, headers={} if header is None else {"authorization": header})
    is_error(reply, 401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/", "/web/main.js"])
def test_health_and_the_page_need_no_key(guarded: Live, path: str) -> None:
    with guarded.http() as http:
        http.headers.pop("authorization")
        assert http.get(path).status_code == 200


def test_with_the_key_it_answers(guarded: Live) -> None:
    with guarded.http() as http:
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200


def test_a_body_that_is_too_long(guarded: Live) -> None:
    with guarded.http() as http:
        reply = http.post("/v1/chat/completions", json={**ASK, "user": "x" * 3000})
        is_error(reply, 413, "body_too_large")
        chunks = http.post(
            "/v1/chat/completions",
            content=(b"x" * 500 for _ in range(10)),
            headers={"content-type": "application/json"},
        )
        is_error(chunks, 413, "body_too_large")


def test_a_body_that_does_not_come(guarded: Live) -> None:
    with connect(guarded) as slow:
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Authorization: Bearer sesame", "Content-Length: 100"]
        slow.sendall("\r\n".join([*head, "", "{"]).encode())
        with guarded.http() as http:  # others are served meanwhile
            assert http.post("/v1/chat/completions", json=ASK).status_code == 200
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_head_that_never_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.3)
    patient = start()
    with connect(patient) as slow:
        started = time.monotonic()
        slow.sendall(b"GET /health HTTP/1.1\r\nHost")
        assert slow.recv(1000) == b""
        assert time.monotonic() - started < 5


def test_the_next_head_is_timed_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.5)
    patient = start()
    with connect(patient) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in slow.recv(1000)
        started = time.monotonic()
        slow.sendall(b"G")
        while slow.recv(1000):
            pass
        assert time.monotonic() - started < 4


def test_other_names_do_not_mean_this_machine(live: Live) -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(host: str) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", host.encode())]}
        asyncio.run(guard.Guard(answer, Limits(), None, LOOPBACK)(scope, None, send))
        return int(sent[0]["status"])

    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1"):
        assert status(host) == 200
    for host in ("evil.example", "localhost.evil.example:8000", "", "127.0.0.1.nip.io"):
        assert status(host) == 403


def test_other_sites_are_not_let_in(live: Live) -> None:
    with live.http() as http:
        asked = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in http.options("/v1/models", headers=asked).headers
        assert "access-control-allow-origin" not in http.get("/v1/models", headers={"origin": asked["origin"]}).headers


def test_but_those_that_are_named(start: Start) -> None:
    open_ = start(origins=("https://mine.example",), key="sesame")
    asked = {"origin": "https://mine.example", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization"}  # fmt: skip
    with open_.http() as http:
        http.headers.pop("authorization")
        reply = http.options("/v1/chat/completions", headers=asked)
        assert reply.headers["access-control-allow-origin"] == "https://mine.example"
        other = http.options("/v1/chat/completions", headers={**asked, "origin": "https://elsewhere.example"})
        assert "access-control-allow-origin" not in other.headers
