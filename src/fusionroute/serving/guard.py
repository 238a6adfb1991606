"""What stands before the routes: the key, the size of a body and the time it takes, heads that never end."""

import asyncio
import hmac
import json
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fusionroute.serving.errors import ApiError
from fusionroute.serving.settings import Limits

log = logging.getLogger("fusionroute.serve")
HEAD_SECONDS = 15.0
# What answers without a key: whether the server lives, and the page, which asks for the key.
_OPEN = ("/health", "/web/")


class Guard:
    """ASGI middleware.

    Args:
        key: that clients must send as a bearer token; None asks for none.
        hosts: names by which the server may be addressed, so that no other site's name can be made to mean this
            machine (DNS rebinding); None takes any.
        traces: log whole stack traces of what fails.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, key: str | None, hosts: tuple[str, ...] | None = None, traces: bool = False
    ) -> None:
        self.app, self.limits, self.key = app, limits, None if key is None else key.encode()
        self.hosts, self.traces = hosts, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._check_host(scope)
            self._check_key(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await self._with_body(scope, receive)
            await self.app(scope, receive, watched)
        except ApiError as error:
            await refuse(error, send)
        except Exception as error:
            # A trace may hold what was asked.
            what = f"{scope['method']} {scope['path']}: {type(error).__name__}"
            log.error(what, exc_info=error if self.traces else None)
            if not begun:
                await refuse(ApiError(500, "the server failed; its log says more"), send)

    def _check_host(self, scope: Scope) -> None:
        if self.hosts is None:
            return
        host = _header(scope, b"host").decode("latin-1").lower()
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        if name not in self.hosts:
            raise ApiError(403, f"this server answers to {', '.join(self.hosts)} only", code="wrong_host")

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        # A browser asks whether it may ask, without the key.
        if self.key is None or path == "/" or path.startswith(_OPEN) or scope["method"] == "OPTIONS":
            return
        kind, _, given = _header(scope, b"authorization").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, within its limits, and give back what replays it."""
        limit = self.limits.body_bytes
        too_long = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > limit:
            raise too_long

        async def read() -> bytes:
            parts: list[bytes] = []
            size = 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return b"".join(parts)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise too_long
                if not message.get("more_body", False):
                    return b"".join(parts)

        try:
            found = await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            seconds = self.limits.body_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", code="timeout") from None
        body: Message | None = {"type": "http.request", "body": found, "more_body": False}

        async def replay() -> Message:
            nonlocal body
            if body is not None:
                once, body = body, None
                return once
            return await receive()

        return replay


async def refuse(error: ApiError, send: Send) -> None:
    """Send a refusal, and end the connection: what is left of the body is not read."""
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that does not wait for ever for a request's head; uvicorn itself times only silence between two."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._hurry = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def on_response_complete(self) -> None:
        self._hurry.cancel()
        self._hurry = self.loop.call_later(HEAD_SECONDS, self._give_up)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._hurry.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
