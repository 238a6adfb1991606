"""The routes: the OpenAI protocol, health, metrics, the page. Each hands over and shapes what comes back."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from fusionroute import __version__
from fusionroute.configuration import ROUTER
from fusionroute.decoding.rows import Event
from fusionroute.members import quantised
from fusionroute.serving import policies
from fusionroute.serving.asking import Asked, Asking
from fusionroute.serving.describe import ERROR, REPLIES, STATUSES, describe
from fusionroute.serving.echo import echo
from fusionroute.serving.errors import ApiError
from fusionroute.serving.guard import Guard
from fusionroute.serving.metrics import Metrics
from fusionroute.serving.replies import Echo, Replies
from fusionroute.serving.scheduler import Scheduler
from fusionroute.serving.schema import ChatRequest, CompletionRequest
from fusionroute.serving.settings import Limits
from fusionroute.serving.streams import EventStream, unless_gone
from fusionroute.serving.words import Words

log = logging.getLogger("fusionroute.serve")
PAGE = {
    "page.css": "text/css", "icon.svg": "image/svg+xml", "main.js": "text/javascript", "stream.js": "text/javascript",
    "tokens.js": "text/javascript", "export.js": "text/javascript",
}  # fmt: skip
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'"
)


@dataclass
class Service:
    """One collection and all that answers for it.

    Attributes:
        name: of the collection, as clients see it.
        log_prompts: write conversations to the log.
    """

    name: str
    scheduler: Scheduler
    asking: Asking
    words: Words
    metrics: Metrics
    limits: Limits
    log_prompts: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    # Tokenizers are not made for several threads.
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))
    reading: int = 0  # requests that wait for it

    @property
    def experts(self) -> list[str]:
        return list(self.asking.config.expert_names)

    async def asked(self, understand: Callable[[Any], Asked], body: Any) -> Asked:
        """What the body comes to, read in the tokenizer's thread by a method of `asking`.

        Raises:
            ApiError: it cannot be done, or not now.
        """
        if self.log_prompts:
            log.info("asked: %s", body.model_dump_json(exclude_none=True))
        # Before the reading, which is work too: a request that will be refused should cost nothing.
        self.scheduler.refuse(self.reading + 1)
        self.reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.reader, understand, body)
        finally:
            self.reading -= 1


def create_app(
    service: Service, *, key: str | None = None, origins: tuple[str, ...] = (), hosts: tuple[str, ...] | None = None
) -> FastAPI:
    """The application.

    Args:
        key: that clients must send; None asks for none.
        origins: sites whose pages may use this server.
        hosts: names by which it may be addressed; None takes any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await service.scheduler.drain()
        service.reader.shutdown(wait=False)

    app = FastAPI(title="FusionRoute", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limits=service.limits, key=key, hosts=hosts, traces=service.log_prompts)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    _protocol(app, service)
    _operations(app, service)
    _page(app)
    describe(app)
    return app


def _protocol(app: FastAPI, service: Service) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": what, "content": {"application/json": {"schema": ERROR}}}
        for status, what in STATUSES.items()
    }
    replies = {200: {"description": "the answer, or with `stream` its pieces", "content": REPLIES}, **errors}

    rounded = quantised(service.scheduler.engine.model.members)

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "fusionroute",
            "max_model_len": service.asking.config.max_position_embeddings,
            **({"quantised": rounded} if rounded else {}),
        }

    @app.get("/v1/models", responses={401: errors[401]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in policies.names(service.name, service.experts)]}

    @app.get("/v1/models/{model:path}", responses={401: errors[401], 404: errors[404]})
    async def model(model: str) -> dict[str, Any]:
        policies.parse(model, service.name, service.experts)
        return card(model)

    @app.post("/v1/chat/completions", responses=replies)
    async def chat(body: ChatRequest, request: Request) -> Response:
        asked = await service.asked(service.asking.chat, body)
        replies = Replies("chat.completion", body.model or service.name, service.experts, service.words, asked)
        return await _answer(service, request, replies, stream=bool(body.stream), usage=body.ends_with_usage)

    @app.post("/v1/completions", responses=replies)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        asked = await service.asked(service.asking.completion, body)
        replies = Replies("text_completion", body.model or service.name, service.experts, service.words, asked)
        echoes: list[Echo] = []
        if body.echo:
            found = await unless_gone(request, _echoes(service, asked))
            if found is None:
                return Response(status_code=499)
            echoes = found
        if body.max_tokens == 0:
            return _json(replies.whole(echoes))
        stream, usage = bool(body.stream), body.ends_with_usage
        return await _answer(service, request, replies, stream=stream, usage=usage, echoes=echoes)

    @app.post("/v1/embeddings", status_code=404, responses={404: errors[404]})
    async def embeddings() -> Response:
        raise ApiError(404, "a collection writes text; it has no embeddings", code="not_supported")


def _operations(app: FastAPI, service: Service) -> None:
    ill: dict[int | str, dict[str, Any]] = {503: {"description": "not now"}}

    @app.get("/health", responses=ill)
    @app.get("/health/live", responses=ill)
    async def live() -> Response:
        return _health(service.scheduler.alive)

    @app.get("/health/ready", responses=ill)
    async def ready() -> Response:
        return _health(service.scheduler.alive and not service.scheduler.draining)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/web/collection.json")
    async def about() -> dict[str, Any]:
        """What the page needs to know."""
        config = service.asking.config
        return {
            "name": service.name,
            "experts": [{"name": spec.name, "description": spec.description} for spec in config.expert_specs],
            "router": ROUTER,
            "alpha": config.alpha,
            "version": __version__,
        }


def _page(app: FastAPI) -> None:
    files = resources.files("fusionroute.serving") / "web"
    headers = {
        "Content-Security-Policy": _CONTENT_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    def send(name: str, kind: str) -> Response:
        return Response((files / name).read_bytes(), media_type=kind, headers=headers)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return send("page.html", "text/html")

    @app.get("/web/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in PAGE:
            raise HTTPException(404)
        return send(name, PAGE[name])


# ------------------------------------------------------------------------------------------------------------ answers


async def _answer(
    service: Service, request: Request, replies: Replies, *, stream: bool, usage: bool, echoes: Sequence[Echo] = ()
) -> Response:
    events = service.scheduler.answer(replies.asked.rows)
    if not stream:
        found = await unless_gone(request, _all(events, replies))
        return Response(status_code=499) if found is None else _json(replies.whole(echoes))
    # What is refused before the first token is refused by its status.
    try:
        begun = await unless_gone(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    if begun is None or begun[1].finish == "error":
        await events.aclose()
        if begun is not None:
            replies.choices[begun[0]].add(begun[1])  # raises what the row ended with
        return Response(status_code=499)
    return EventStream(_frames(begun, events, replies, usage), 2 * service.limits.seconds)


async def _echoes(service: Service, asked: Asked) -> list[Echo]:
    """The prompts to stand before their answers."""
    firsts = asked.rows[:: asked.n]
    return [await service.scheduler.run(partial(echo, service.scheduler.engine, row)) for row in firsts]


async def _all(events: Any, replies: Replies) -> bool:
    async with aclosing(events):
        async for index, event in events:
            replies.choices[index].add(event)
    return True


async def _frames(begun: tuple[int, Event], events: Any, replies: Replies, usage: bool) -> AsyncGenerator[str]:
    async with aclosing(events):
        try:
            if replies.chat:
                yield _frame(replies.first())
            yield _frame(replies.chunk(*begun))
            async for index, event in events:
                yield _frame(replies.chunk(index, event))
            if usage:
                yield _frame(replies.last())
        except ApiError as error:
            yield _frame(error.body())
    yield "data: [DONE]\n\n"


def _frame(body: dict[str, Any]) -> str:
    return f"data: {_dump(body)}\n\n"


def _dump(body: dict[str, Any]) -> str:
    # In ASCII: clients that split a stream at every line end Unicode has would cut an event at U+0085 or U+2028.
    return json.dumps(body, separators=(",", ":"))


def _json(body: dict[str, Any]) -> Response:
    return Response(_dump(body), media_type="application/json")


# ----------------------------------------------------------------------------------------------------------- refusals


async def _refused(request: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "json_invalid":  # the place is a number of characters then, and no field
        message, place = f"the body is not JSON: {first['ctx']['error']} at character {place}", None
    else:
        message = f"{place or 'the body'}: {first['msg']}"
    return await _refused(request, ApiError(400, message, place, "invalid_request"))


async def _no_route(request: Request, error: Any) -> Response:
    known = {
        404: ("there is nothing here", "not_found"),
        405: (f"{request.method} is not for this address", "method_not_allowed"),
    }
    message, code = known.get(error.status_code, (str(error.detail), "invalid_request"))
    return await _refused(request, ApiError(error.status_code, message, code=code, headers=error.headers))


def _health(well: bool) -> Response:
    return JSONResponse({"status": "ok" if well else "unavailable"}, 200 if well else 503)
