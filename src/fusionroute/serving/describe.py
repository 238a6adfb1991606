"""What the server's own description (OpenAPI) says of replies and refusals."""

from typing import Any

from fastapi import FastAPI

STATUSES = {
    400: "the request cannot be done",
    401: "the key is missing or wrong",
    403: "the server is addressed by another name",
    404: "there is no such model",
    408: "the body did not arrive in time",
    413: "the body is too long",
    429: "too many answers wait",
    500: "the server failed",
    503: "the server is stopping",
    504: "no answer in time",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


REPLIES = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["id", "object", "created", "model", "choices", "usage"],
            "properties": {
                "id": {"type": "string"},
                "object": {"enum": ["chat.completion", "text_completion"]},
                "created": {"type": "integer"},
                "model": {"type": "string"},
                "choices": {"type": "array", "minItems": 1, "items": {"type": "object"}},
                "usage": {"type": "object"},
            },
        }
    },
    # Of no type: to some readers of descriptions a stream is a string, to others each event is an object.
    "text/event-stream": {"schema": {"description": "one piece of the answer an event, as JSON; at the end [DONE]"}},
}


def describe(app: FastAPI) -> None:
    """Leave out of the description what FastAPI answers to bad bodies: here that is a 400 as any other."""
    openapi = app.openapi

    def described() -> dict[str, Any]:
        found = openapi()
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return found

    app.openapi = described  # type: ignore[method-assign]
