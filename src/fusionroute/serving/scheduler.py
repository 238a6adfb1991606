"""The thread that the engine runs in: rows join between steps, events go back to whoever waits for them.

Everything that touches the engine runs in that thread, in the order it was asked for; what comes out of a step crosses
over to the event loop in one call. Knows no protocol.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, TypeVar

from fusionroute.decoding.engine import Engine
from fusionroute.decoding.rows import Event, Request
from fusionroute.errors import UsageError
from fusionroute.serving.errors import ApiError
from fusionroute.serving.metrics import Metrics
from fusionroute.serving.settings import Limits

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
        limits: how many rows may wait.
        metrics: told of every step.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self.engine, self.limits, self.metrics = engine, limits, metrics
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
        self._refuse(len(requests))
        ticket = Ticket(len(requests))
        self._open += ticket.rows
        self._command(lambda: self._submit(ticket, requests))
        left, until = ticket.rows, time.monotonic() + self.limits.seconds
        try:
            while left:
                try:
                    found = await asyncio.wait_for(ticket.events.get(), until - time.monotonic())
                except asyncio.TimeoutError:
                    raise ApiError(504, f"no answer within {self.limits.seconds:g} seconds", code="timeout") from None
                if isinstance(found, Exception):
                    raise found
                left -= found[1].finish is not None
                yield found
        finally:
            self._open -= ticket.rows
            if left:
                self._command(lambda: self._cancel(ticket))

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function between steps, in the engine's thread, and return what it returns."""
        self._refuse(1)
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def call() -> None:
            try:
                result, error = function(), None
            except Exception as raised:
                result, error = None, raised
            loop.call_soon_threadsafe(_settle, future, result, error)

        self._command(call)
        result: T = await asyncio.wait_for(future, self.limits.seconds)
        return result

    def _refuse(self, rows: int) -> None:
        if self.draining:
            raise ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
        most = self.limits.rows + self.limits.waiting
        if rows > most:
            raise ApiError(400, f"{rows} answers are asked for at once and {most} may be", code="too_many_rows")
        if self._open + rows > most:
            raise ApiError(
                429,
                f"{self._open} answers run or wait and {most} may: try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    @property
    def open(self) -> int:
        """Rows that run or wait."""
        return self._open

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def drain(self) -> None:
        """Refuse what comes and wait for what runs, as long as the limits allow; then end."""
        self.draining = True
        until = time.monotonic() + self.limits.drain_seconds
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.05)
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
        while True:
            with self._wake:
                while not (self._commands or self._ended or self.engine.active or self.engine.waiting):
                    self._wake.wait()
                if self._ended:
                    return
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                command()
            if self.engine.active or self.engine.waiting:
                self._step()

    def _submit(self, ticket: Ticket, requests: Sequence[Request]) -> None:
        try:
            for index, request in enumerate(requests):
                number = self.engine.submit(request)
                ticket.numbers.append(number)
                self._tickets[number] = ticket, index
                self.metrics.prompt_tokens.inc(len(request.prompt))
        except UsageError as error:
            self._cancel(ticket)
            self._send({ticket: [ApiError(400, str(error), code="invalid_request")]})

    def _cancel(self, ticket: Ticket) -> None:
        for number in ticket.numbers:
            if self._tickets.pop(number, None) is not None:
                self.engine.cancel(number)
                self.metrics.finished("cancelled")
        self.metrics.settled(self.engine)

    def _step(self) -> None:
        started = time.monotonic()
        try:
            events = self.engine.step()
        except Exception:
            # Whatever it was, what ran is in no known state; what waits can still run.
            log.exception("a step failed; the rows that ran are given up")
            self._give_up()
            return
        ended = time.monotonic()
        found: dict[Ticket, list[Any]] = {}
        for event in events:
            entry = self._tickets.get(event.row)
            if entry is None:
                continue
            ticket, index = entry
            if event.tokens or event.finish is not None:
                found.setdefault(ticket, []).append((index, event))
            if event.finish is not None:
                del self._tickets[event.row]
            self.metrics.stepped(event, ticket.asked, ended)
        self.metrics.measured(self.engine, ended - started)
        self._send(found)

    def _give_up(self) -> None:
        # If nothing ran, it was the first of those that wait.
        rows = list(self.engine.active) or list(self.engine.waiting)[:1]
        lost = {self._tickets[row.number][0] for row in rows if row.number in self._tickets}
        for row in rows:
            self.engine.cancel(row.number)
        for ticket in lost:
            self._cancel(ticket)
        self._send({ticket: [ApiError(500, "the engine failed; the server's log says why")] for ticket in lost})

    def _send(self, found: dict[Ticket, list[Any]]) -> None:
        loops = {ticket.loop for ticket in found}
        for loop in loops:
            mine = [(ticket, item) for ticket, items in found.items() if ticket.loop is loop for item in items]
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:  # the loop has closed: nobody waits
                log.debug("%d events came too late", len(mine))


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
