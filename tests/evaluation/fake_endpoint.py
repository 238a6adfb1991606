"""A chat endpoint on this machine that does as a test tells it."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A reply, or status, headers and body, or None for silence.
Act = str | tuple[int, dict[str, str], str] | None


def verdict(better: str) -> str:
    return json.dumps({"score_a": 7.25, "score_b": 3, "better": better})


class FakeEndpoint:
    """Answers the n-th request (from 0) with `act(n, body)`; keeps requests and their headers."""

    def __init__(self, act: Callable[[int, dict[str, Any]], Act]) -> None:
        self.act, self.bodies, self.headers = act, list[dict[str, Any]](), list[dict[str, str]]()
        self._lock, self._over = threading.Lock(), threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint._answer(self)

            def do_GET(self) -> None:
                endpoint._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length", 0))) or b"{}")
        with self._lock:
            number = len(self.bodies)
            self.bodies.append({"path": handler.path, **body})
            self.headers.append(dict(handler.headers))
        act = self.act(number, body)
        if act is None:
            self._over.wait(30)
            return
        if isinstance(act, str):
            act = (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": act}}]}))
        status, headers, text = act
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())
