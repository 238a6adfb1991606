"""The server against its own description, request by generated request (schemathesis)."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from tests.serving.conftest import Live

# That what fits the description is accepted cannot be asked: it knows neither the context's length nor the models.
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection, unsupported_method,
]  # fmt: skip
OPERATIONS = [
    "GET /v1/models", "GET /v1/models/{model}", "POST /v1/chat/completions", "POST /v1/completions",
    "POST /v1/embeddings", "GET /health", "GET /health/live", "GET /health/ready", "GET /metrics",
    "GET /web/collection.json",
]  # fmt: skip

WITH_BODY = ["POST /v1/chat/completions", "POST /v1/completions"]


@pytest.fixture(scope="module")
def operations(live: Live) -> dict[str, Any]:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{each.method.upper()} {each.path}": each for each in found}


def test_everything_is_described(operations: dict[str, Any]) -> None:
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, GenerationMode.POSITIVE) for name in OPERATIONS),
        *((name, GenerationMode.NEGATIVE) for name in WITH_BODY),
    ],
)
def test_replies_are_as_described(operations: dict[str, Any], name: str, mode: GenerationMode) -> None:
    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operations[name].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        # Long answers would only take time.
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            case.body["max_tokens"] = 2
            case.body.pop("max_completion_tokens", None)
        case.call_and_validate(checks=CHECKS, timeout=60)

    check()
