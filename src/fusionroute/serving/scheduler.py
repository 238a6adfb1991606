"""The thread that the engine runs in: rows join between steps, events go back to whoever waits for them.

Everything that touches the engine runs in that thread, in the order it was asked for; what comes out of a step crosses
over to the event loop in one call. Knows no protocol.
"""

import asyncio
import contextlib
import ctypes
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fusionroute.decoding.engine import Engine
from fusionroute.decoding.rows import Event, Request
from fusionroute.errors import UsageError
from fusionroute.serving.errors import ApiError
from fusionroute.serving.metrics import Metrics
from fusionroute.serving.settings import Limits

REST_SECONDS = 5.0  # without work, before what rows took goes back to the system

log = logging.getLogger("fusionroute.serve")
T = TypeVar("T")


class Ticket:
    """Rows that one request asked for, and what comes of them."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self.numbers: list[int] = []  # of the engine; set and read in its thread
        self.asked = time.monotonic()


class Scheduler:
    """Runs an engine.

    Args:
        engine: nothing else may touch it while this runs.
        limits: how many rows may wait, and how long.
        metrics: told of every step.
        traces: log whole stack traces; else what kind of error it was, and where.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics, *, traces: bool = False) -> None:
        self.engine, self.limits, self.metrics, self.traces = engine, limits, metrics, traces
        engine.max_rows = limits.rows
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._tickets: dict[int, tuple[Ticket, int]] = {}  # by the engine's number of a row: whose it is, and which
        self._open = 0  # rows that have been taken and have not ended
        self._ended = False
        self.draining = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------------------------- from the event loop

    def start(self) -> None:
        self._thread.start()

    async def answer(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Event]]:
        """Run the requests; yields (index of the request, what a step gave it), to the end of all.

        Leaving the iterator takes out what still runs.

        Raises:
            ApiError: 429 while too many rows wait, 503 while the server stops, 504 when time is up, 400 for a request
                that can never run, 500 when the engine fails.
        """
        self.refuse(len(requests))
        ticket = Ticket(len(requests))
        self._count(ticket.rows)
        self._command(lambda: self._submit(ticket, requests))
        left = ticket.rows
        late = ApiError(504, f"no answer within {self.limits.seconds:g} seconds", code="timeout")
        timer = ticket.loop.call_later(self.limits.seconds, ticket.events.put_nowait, late)
        try:
            while left:
                found = await ticket.events.get()
                if isinstance(found, Exception):
                    raise found
                left -= found[1].finish is not None
                yield found
        finally:
            timer.cancel()
            self._count(-ticket.rows)
            if left:
                self._command(lambda: self._cancel(ticket))

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function between steps, in the engine's thread, and return what it returns; it counts as a row.

        Raises:
            ApiError: as `answer`.
        """
        self.refuse(1)
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        late = ApiError(504, f"no answer within {self.limits.seconds:g} seconds", code="timeout")
        timer = loop.call_later(self.limits.seconds, _settle, future, None, late)

        def call() -> None:
            if future.done():  # nobody waits any more
                return
            try:
                result, error = function(), None
            except Exception as raised:
                self._tell("a prompt could not be read", raised)
                result, error = None, _failed()
            loop.call_soon_threadsafe(_settle, future, result, error)

        self._count(1)
        try:
            self._command(call)
            result: T = await future
            return result
        finally:
            timer.cancel()
            self._count(-1)

    def refuse(self, rows: int) -> None:
        """Take in no so many rows more.

        Raises:
            ApiError: 429 where too many are open, 503 where the server stops.
        """
        if not self.alive:
            raise ApiError(503, "the engine has ended", code="unavailable")
        if self.draining:
            raise ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
        most = self.limits.rows + self.limits.waiting
        if self._open + rows > most:
            self.metrics.refused.inc()
            raise ApiError(
                429,
                f"{self._open} answers run or wait and {most} may: try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def _count(self, rows: int) -> None:
        self._open += rows
        self.metrics.open.set(self._open)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Refuse what comes, and end in good order what still runs when time for it is up. From any thread."""
        if self.draining:
            return
        self.draining = True
        timer = threading.Timer(self.limits.drain_seconds, self._command, [self._expire])
        timer.daemon = True
        timer.start()

    async def drain(self) -> None:
        """`stop`, wait for what runs, and end the thread."""
        self.stop()
        until = time.monotonic() + self.limits.drain_seconds + 1
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        with self._wake:
            self._ended = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, 10)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # --------------------------------------------------------------------------------------- in the engine's thread

    def _run(self) -> None:
        rested = False
        while True:
            with self._wake:
                while not (self._commands or self._ended or self.engine.active or self.engine.waiting):
                    if not self._wake.wait(None if rested else REST_SECONDS):
                        break
                rested = not (self._commands or self._ended or self.engine.active or self.engine.waiting)
                if self._ended:
                    return
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                try:
                    command()
                except Exception as error:
                    self._tell("a command failed", error)
            if self.engine.active or self.engine.waiting:
                self._step()
            if rested:
                return_freed_memory()

    def _submit(self, ticket: Ticket, requests: Sequence[Request]) -> None:
        try:
            for index, request in enumerate(requests):
                number = self.engine.submit(request)
                ticket.numbers.append(number)
                self._tickets[number] = ticket, index
                self.metrics.prompt_tokens.inc(len(request.prompt))
        except UsageError as error:
            self._fail({ticket}, ApiError(400, str(error), code="invalid_request"))
        except Exception as error:
            self._tell("a request could not be queued", error)
            self._fail({ticket}, _failed())

    def _cancel(self, ticket: Ticket) -> None:
        for number in ticket.numbers:
            if self._tickets.pop(number, None) is not None:
                self.engine.cancel(number)
                self.metrics.finished("cancelled")
        with self._figures():
            self.metrics.settled(self.engine)

    def _step(self) -> None:
        try:
            self._advance()
        except BaseException as error:  # a panic of an extension is none of Exception's; nothing else ends this thread
            self._tell("a step failed, and what ran is given up", error)
            self._give_up()

    def _advance(self) -> None:
        started = time.monotonic()
        events = self.engine.step()
        ended = time.monotonic()
        found: dict[Ticket, list[Any]] = {}
        for event in events:
            entry = self._tickets.get(event.row)
            if entry is None:
                continue
            ticket, index = entry
            if event.error is not None:
                self._tell("a row failed", event.error)
            if event.tokens or event.finish is not None:
                found.setdefault(ticket, []).append((index, event))
            if event.finish is not None:
                del self._tickets[event.row]
            with self._figures():
                self.metrics.stepped(event, ticket.asked, ended)
        with self._figures():
            self.metrics.measured(self.engine, ended - started)
        self._send(found)

    def _give_up(self) -> None:
        """After a step that failed: what ran is in no known state; what waits can still run."""
        self.engine.abandon()
        waiting = [row.number for row in self.engine.waiting]
        # If nothing ran, it was the first of those that wait.
        numbers = [number for number in self._tickets if number not in waiting] or waiting[:1]
        self._fail({self._tickets[number][0] for number in numbers if number in self._tickets}, _failed())

    def _expire(self) -> None:
        error = ApiError(503, "the server is stopping", code="stopping")
        self._fail({ticket for ticket, _ in self._tickets.values()}, error)

    def _fail(self, tickets: set[Ticket], error: ApiError) -> None:
        for ticket in tickets:
            self._cancel(ticket)
        self._send({ticket: [error] for ticket in tickets})

    @contextlib.contextmanager
    def _figures(self) -> Iterator[None]:
        """Figures may be missing; answers are delivered all the same."""
        try:
            yield
        except Exception as error:
            self._tell("figures are missing", error)

    def _tell(self, what: str, error: BaseException) -> None:
        # A message may hold what was asked; where it was raised never does.
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
        log.error("%s: %s at %s", what, type(error).__name__, where, exc_info=error if self.traces else None)

    def _send(self, found: dict[Ticket, list[Any]]) -> None:
        loops = {ticket.loop for ticket in found}
        for loop in loops:
            mine = [(ticket, item) for ticket, items in found.items() if ticket.loop is loop for item in items]
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:  # the loop has closed: nobody waits
                log.debug("%d events came too late", len(mine))


def return_freed_memory() -> None:
    """Give back what the C library has been freed of and keeps for later, where it is glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _failed() -> ApiError:
    return ApiError(500, "the engine failed; the server's log says more")


def _deliver(items: Sequence[tuple[Ticket, Any]]) -> None:
    for ticket, item in items:
        ticket.events.put_nowait(item)


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
