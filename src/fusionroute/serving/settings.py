"""Limits of a server; `fusionroute serve` has options for those that depend on whom it serves."""

from dataclasses import dataclass

from fusionroute.errors import require


@dataclass(frozen=True)
class Limits:
    """What the server takes on, and what one request may take of it.

    Attributes:
        rows: that run at once.
        waiting: rows beyond these that may be open; more are refused with 429.
        prompt_tokens, new_tokens: of one row; None is what the context allows.
        default_tokens: new tokens where a request does not say; each row's room is set aside from the start.
        body_bytes: of a request.
        body_seconds: for a request's body to arrive.
        seconds: for an answer, queue included.
        drain_seconds: for what runs to end when the server is told to stop.
    """

    rows: int = 64
    waiting: int = 256
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    default_tokens: int = 1024
    body_bytes: int = 4_000_000
    body_seconds: float = 15.0
    seconds: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        require(
            self,
            {
                "rows must be at least 1": self.rows >= 1,
                "waiting must be at least 0": self.waiting >= 0,
                "prompt_tokens must be at least 1": self.prompt_tokens is None or self.prompt_tokens >= 1,
                "new_tokens must be at least 1": self.new_tokens is None or self.new_tokens >= 1,
                "default_tokens must be at least 1": self.default_tokens >= 1,
                "body_bytes must be at least 1": self.body_bytes >= 1,
                "body_seconds must be above 0": self.body_seconds > 0,
                "seconds must be above 0": self.seconds > 0,
                "drain_seconds must be at least 0": self.drain_seconds >= 0,
            },
        )
