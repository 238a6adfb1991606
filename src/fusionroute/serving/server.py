"""A collection behind the routes, listening: what `fusionroute serve` runs."""

import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from fusionroute import collection as collections
from fusionroute.errors import UsageError
from fusionroute.loading import load_engine
from fusionroute.serving.api import Service, create_app
from fusionroute.serving.asking import Asking
from fusionroute.serving.guard import PatientProtocol
from fusionroute.serving.metrics import Metrics
from fusionroute.serving.scheduler import Scheduler
from fusionroute.serving.settings import Limits
from fusionroute.serving.words import Words

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def make_service(
    collection: str | None,
    limits: Limits,
    *,
    name: str | None = None,
    kv_budget: int | None = None,
    log_prompts: bool = False,
    **how: Any,
) -> Service:
    """Load a collection and what answers for it.

    Args:
        name: as clients see the collection; None takes its folder's.
        how: it is loaded: arguments of `fusionroute.loading.load_engine`.

    Raises:
        FusionRouteError: it does not load.
    """
    folder = collections.locate(collection)
    # In a thread that ends: one that has run a parallel operation keeps its workers, and with more workers than cores
    # OpenMP's barriers sleep instead of spinning. Steps in the engine's own thread took 1.7 times as long.
    with ThreadPoolExecutor(1) as loading:
        engine = loading.submit(load_engine, folder, kv_budget=kv_budget, reuse=True, **how).result()
    model = engine.model
    # The engine's tokenizer is its thread's, this one the reader's.
    reading = collections.load_tokenizer(folder, base=how.get("base"))
    settings = model.generation_config
    defaults = {key: value for key in _DEFAULTS if settings.do_sample and (value := getattr(settings, key, None))}
    name = name or (collections.DEFAULT if collection is None else Path(collection).resolve().name)
    if "@" in name:
        raise UsageError(f"the name {name!r} has an @, after which names have a policy: give another with --name")
    metrics = Metrics()
    return Service(
        name,
        Scheduler(engine, limits, metrics, traces=log_prompts),
        Asking(name, model.config, reading, limits, defaults, sorted(engine.ends)),
        Words(collections.load_tokenizer(folder, base=how.get("base"))),
        metrics,
        limits,
        log_prompts,
    )


class Server(uvicorn.Server):
    """uvicorn's, which says where it listens and when it is told to stop."""

    def __init__(self, config: uvicorn.Config, stopping: Callable[[], None], name: str) -> None:
        super().__init__(config)
        self.stopping, self.name = stopping, name

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in (each for server in self.servers for each in server.sockets):
            host, port = listening.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"{self.name}: {url}/ (the page), {url}/v1 (for clients)", file=sys.stderr)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first time in good order, which is no failure; the second time at once."""
        self.stopping()
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(
    service: Service,
    host: str,
    port: int,
    *,
    key: str | None = None,
    origins: tuple[str, ...] = (),
    access_log: bool = True,
) -> None:
    """Listen until told to stop; then finish what runs."""
    hosts = LOOPBACK if host in LOOPBACK or host == "::1" else None
    app = create_app(service, key=key, origins=origins, hosts=hosts)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PatientProtocol,
        ws="none",
        access_log=access_log,
        log_config=_logging(),
        timeout_graceful_shutdown=int(service.limits.drain_seconds) + 3,
        server_header=False,
    )

    Server(config, service.scheduler.stop, service.name).run()


def _logging() -> dict[str, Any]:
    """uvicorn's logging, and ours beside it."""
    config: dict[str, Any] = uvicorn.config.LOGGING_CONFIG
    return {**config, "loggers": {**config["loggers"], "fusionroute": {"handlers": ["default"], "level": "INFO"}}}
