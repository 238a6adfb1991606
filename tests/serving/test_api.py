"""What the stock client does not show: raw replies, disconnects, limits, health, figures, hostile bodies."""

import json
import re
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serving.conftest import NAME, Live, Start

from fusionroute.decoding.text import TextPieces
from fusionroute.serving import scheduler

ASK = {"model": NAME, "messages": [{"role": "user", "content": "How many cows?"}]}
LONG = {**ASK, "max_tokens": 400, "ignore_eos": True}


def is_error(reply: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in reply.text
    assert "/fusionroute/" not in reply.text
    if code is not None:
        assert error["code"] == code
    return dict(error)


def test_a_stream_ends_as_the_protocol_has_it(live: Live) -> None:
    with (
        live.http() as http,
        http.stream("POST", "/v1/chat/completions", json={**ASK, "max_tokens": 3, "stream": True}) as reply,
    ):
        assert reply.headers["content-type"].startswith("text/event-stream")
        text = reply.read().decode()
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(frame.removeprefix("data: "))["object"] == "chat.completion.chunk" for frame in frames[:-2])


def test_line_ends_of_unicode_do_not_cut_an_event(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    monkeypatch.setattr(TextPieces, "push", lambda *_, **__: ends)
    body = {**ASK, "max_tokens": 2, "stream": True}
    with live.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as reply:
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]) == ends * 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(live: Live, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    live.slowed(monkeypatch, 0.05)
    with socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1]))) as raw:
        body = json.dumps({**LONG, "stream": stream}).encode()
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "", ""]
        raw.sendall("\r\n".join(head).encode() + body)
        until = time.monotonic() + 20
        while not live.engine.active:
            assert time.monotonic() < until
            time.sleep(0.001)
        (row,) = live.engine.active
        at = row.new
    assert live.idle(5)
    # The step under way when the client left, the one in which that was seen, and what drafts may add.
    assert row.new - at <= 2 * (live.engine.draft_length + 1)


def test_too_many_are_told_to_come_later(start: Start) -> None:
    small = start(rows=1, waiting=1)
    replies: list[httpx.Response] = []

    def ask() -> None:
        with small.http() as http:
            replies.append(http.post("/v1/chat/completions", json=LONG))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted({reply.status_code for reply in replies}) == [200, 429]
    refused = [reply for reply in replies if reply.status_code == 429]
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    is_error(refused[0], 429, "queue_full")
    assert small.idle()


def test_more_than_may_ever_run_is_refused(start: Start) -> None:
    small = start(rows=1, waiting=1)
    with small.http() as http:
        is_error(http.post("/v1/chat/completions", json={**ASK, "n": 3}), 400)


def test_time_is_up(start: Start) -> None:
    slow = start(seconds=0.05)
    with slow.http() as http:
        is_error(http.post("/v1/chat/completions", json=LONG), 504, "timeout")
        text = http.post("/v1/chat/completions", json={**LONG, "stream": True}).text
        assert '"code":"timeout"' in text
    assert slow.idle()


def test_longer_prompts_and_answers_than_allowed(start: Start) -> None:
    short = start(prompt_tokens=60, new_tokens=5)
    with short.http() as http:
        long = {**ASK, "messages": [{"role": "user", "content": "word " * 100}]}
        is_error(http.post("/v1/chat/completions", json=long), 400, "context_length_exceeded")
        is_error(http.post("/v1/chat/completions", json={**ASK, "max_tokens": 6}), 400, "context_length_exceeded")
        free = http.post("/v1/chat/completions", json={**ASK, "ignore_eos": True}).json()
        assert free["usage"]["completion_tokens"] == 5


def test_health_and_figures(live: Live) -> None:
    with live.http() as http:
        assert http.get("/health").json() == http.get("/health/ready").json() == {"status": "ok"}
        http.post("/v1/chat/completions", json={**ASK, "max_tokens": 5, "ignore_eos": True})
        figures = http.get("/metrics").text
    written = [line for line in figures.splitlines() if line.startswith("fusionroute_tokens_total")]
    assert sum(float(line.split()[-1]) for line in written) >= 5
    for name in (
        "rows_running", "rows_waiting", "rows_ended_total", "time_to_first_token_seconds_count", "switches_total",
        "time_per_token_seconds_count", "tokens_drafted_total", "kv_bytes", "kv_kept_bytes",
    ):  # fmt: skip
        assert f"fusionroute_{name}" in figures


def test_memory_goes_back_once_after_work(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[bool] = []
    started: list[Live] = []  # empty while the engine's thread rests for the first time
    others = set(threading.enumerate())  # other tests' servers rest too

    def give() -> None:
        if threading.current_thread() not in others:
            returned.append(any(live.engine.active for live in started))

    monkeypatch.setattr(scheduler, "REST_SECONDS", 0.05)
    monkeypatch.setattr(scheduler, "return_freed_memory", give)
    live = start()
    started.append(live)

    def rest(before: int) -> None:
        deadline = time.monotonic() + 20
        while len(returned) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(returned) > before

    rest(0)  # what loading left
    with live.http() as http:
        for _ in range(2):
            before = len(returned)
            http.post("/v1/chat/completions", json=ASK)
            rest(before)
            after = len(returned)
            time.sleep(0.5)
            assert len(returned) == after
    assert not any(returned)


@pytest.mark.parametrize("figures", ["stepped", "measured", "settled"])
def test_answers_come_without_figures(start: Start, monkeypatch: pytest.MonkeyPatch, figures: str) -> None:
    live = start()

    def broken(*_: Any) -> None:
        raise RuntimeError("no figures")

    with live.http() as http:
        with monkeypatch.context() as patch:
            patch.setattr(live.service.scheduler.metrics, figures, broken)
            assert http.post("/v1/chat/completions", json={**ASK, "max_tokens": 1}).status_code == 200
            assert http.post("/v1/chat/completions", json={**ASK, "stop": ["e"]}).status_code == 200
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200
    assert live.idle()


def test_refusals_and_drafts_are_counted(start: Start) -> None:
    small = start(rows=1, waiting=0)

    def figure(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"fusionroute_{name} ")).split()[-1])

    with small.http() as http:
        is_error(http.post("/v1/chat/completions", json={**ASK, "n": 2}), 400)
        assert figure("requests_refused_total") == 0
        with http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}):
            is_error(http.post("/v1/chat/completions", json=ASK), 429, "queue_full")
        assert figure("requests_refused_total") == 1
        assert small.idle()
        # One token again and again: whatever is drafted is right.
        (token,) = small.engine.tokenizer("A", add_special_tokens=False)["input_ids"]
        body = {**ASK, "temperature": 0, "logit_bias": {str(token): 100}, "max_tokens": 200}
        http.post("/v1/chat/completions", json=body)
        assert figure("tokens_proposed_total") >= figure("tokens_drafted_total") > 0


def test_a_long_text_is_refused_before_it_is_read(start: Start) -> None:
    live = start(body_bytes=40_000_000)
    started = time.monotonic()
    with live.http() as http:
        for path, body in (
            ("chat/completions", {"messages": [{"role": "user", "content": "x y " * 8_000_000}]}),
            ("completions", {"prompt": "x y " * 8_000_000}),
        ):
            is_error(http.post(f"/v1/{path}", json=body), 400, "context_length_exceeded")
    assert time.monotonic() - started < 10


def test_a_method_that_an_address_does_not_have(live: Live) -> None:
    with live.http() as http:
        is_error(http.get("/v1/chat/completions"), 405, "method_not_allowed")


def test_a_call_is_asked_for_without_tools(live: Live) -> None:
    with live.http() as http:
        is_error(http.post("/v1/chat/completions", json={**ASK, "tool_choice": "required"}), 400)


def test_calls_in_a_conversation_need_a_template_that_knows_them(live: Live) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [*ASK["messages"], {"role": "assistant", "content": None, "tool_calls": [call]}]
    with live.http() as http:
        is_error(http.post("/v1/chat/completions", json={**ASK, "messages": messages}), 400, "tools_unsupported")


@pytest.mark.parametrize("path", ["/", "/web/main.js", "/web/page.css", "/web/collection.json"])
def test_the_page_is_there_and_asks_nobody_else(live: Live, path: str) -> None:
    with live.http() as http:
        reply = http.get(path)
    assert reply.status_code == 200
    assert "http://" not in reply.text.replace("http://www.w3.org/", "")
    assert "https://" not in reply.text
    if path == "/":
        assert "default-src 'none'" in reply.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/web/../api.py", "/web/%2e%2e/api.py", "/web/api.py", "/nothing", "/v1/nothing", "/docs"]
)
def test_there_is_nothing_else(live: Live, path: str) -> None:
    with live.http() as http:
        is_error(http.get(path), 404)


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"", "application/json"), (b"{", "application/json"), (b"[]", "application/json"), (b"null", "application/json"),
     (b"\xff\xfe", "application/json"), (json.dumps(ASK).encode(), "text/plain"), (b"{}" * 10, "application/json")],
)  # fmt: skip
def test_bodies_that_are_none(live: Live, content: bytes, kind: str) -> None:
    with live.http() as http:
        is_error(http.post("/v1/chat/completions", content=content, headers={"content-type": kind}), 400)


def test_a_body_that_is_no_json_is_told_where_it_goes_wrong(live: Live) -> None:
    with live.http() as http:
        reply = http.post("/v1/chat/completions", content=b'{"model": }', headers={"content-type": "application/json"})
    error = is_error(reply, 400, "invalid_request")
    assert "not JSON" in error["message"]
    assert "character 10" in error["message"]
    assert error["param"] is None


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "messages", "model", "temperature", "top_p", "n", "stop", "seed", "stream_options", "logit_bias", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "alpha", "expert", "routing", "candidates", "response_format",
    "tools", "tool_choice", "logprobs", "top_logprobs", "frequency_penalty", "max_completion_tokens", "user",
]  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3))
def test_any_body_has_an_answer_or_a_refusal(live: Live, changes: dict[str, Any]) -> None:
    with live.http() as http:
        reply = http.post("/v1/chat/completions", json={**ASK, "max_tokens": 2, **changes})
    if reply.status_code != 200:
        assert reply.status_code in (400, 404), reply.text
        is_error(reply, reply.status_code)


def test_a_bad_request_does_not_disturb_another(live: Live) -> None:
    with live.http() as http:
        body = {**ASK, "max_tokens": 300, "seed": 1, "ignore_eos": True}
        alone = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    found: list[Any] = []

    def good() -> None:
        with live.http() as http:
            found.append(http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"])

    thread = threading.Thread(target=good)
    thread.start()
    # After "a" only the end is allowed, which may not come yet: this row fails beside the other.
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "a"}}}
    stuck = {**ASK, "min_tokens": 50, "response_format": schema}
    failed = 0
    with live.http() as http:
        while thread.is_alive():
            http.post("/v1/chat/completions", content=b"{")
            is_error(http.post("/v1/chat/completions", json=stuck), 400, "generation_failed")
            failed += bool(live.engine.active)
    assert failed
    assert found == [alone]


def test_a_step_that_fails_costs_what_ran_and_no_more(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    fragile = start()
    step, failing = fragile.engine.step, threading.Event()

    def fail() -> Any:
        if failing.is_set():
            failing.clear()
            raise MemoryError("a secret place")
        return step()

    monkeypatch.setattr(fragile.engine, "step", fail)
    with fragile.http() as http:
        failing.set()
        error = is_error(http.post("/v1/chat/completions", json=ASK | {"max_tokens": 3}), 500)
        assert "secret" not in error["message"]
        assert http.post("/v1/chat/completions", json=ASK | {"max_tokens": 3}).status_code == 200
    assert fragile.idle()


def test_a_failed_step_is_logged_by_kind_and_place(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fragile = start()
    fragile.service.scheduler.traces = False

    def fail() -> Any:
        raise MemoryError("a secret place")

    monkeypatch.setattr(fragile.engine, "step", fail)
    with fragile.http() as http:
        is_error(http.post("/v1/chat/completions", json=ASK), 500)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fusionroute.serve"]
    assert re.search(r"MemoryError at test_api\.py:\d+ fail < scheduler\.py:\d+ _advance", line)
    assert "secret" not in caplog.text


def test_half_a_step_leaves_nothing_behind(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed step has read in part is not kept for rows that begin alike."""
    fragile = start()
    body = {**ASK, "max_tokens": 20, "temperature": 0, "messages": [{"role": "user", "content": "word " * 30}]}
    with fragile.http() as http:
        expected = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        fragile.engine.prefixes.shrink(0)
        run, failing = fragile.engine.members.run, threading.Event()

        def fail(jobs: Any) -> Any:
            if failing.is_set() and len(jobs[0].ids) > 40:
                failing.clear()
                run(jobs[:1])
                raise MemoryError
            return run(jobs)

        monkeypatch.setattr(fragile.engine.members, "run", fail)
        failing.set()
        is_error(http.post("/v1/chat/completions", json=body), 500)
        assert fragile.engine.prefixes.entries == []
        assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"] == expected
    assert fragile.idle()


def test_a_row_that_cannot_begin_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    fragile = start()

    def fail(row: int, ids: Any) -> None:
        raise MemoryError

    with fragile.http() as http:
        monkeypatch.setattr(fragile.engine.prefixes, "give", fail)
        is_error(http.post("/v1/chat/completions", json=ASK), 500)
        monkeypatch.undo()
        assert http.post("/v1/chat/completions", json=ASK | {"max_tokens": 3}).status_code == 200
    assert fragile.idle()


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "[" * 100_000}}]}], "max_tokens": 2},
        {"messages": [{"role": "user", "content": "\ud800"}], "max_tokens": 2},
        {"messages": ASK["messages"], "response_format": {"type": "json_object"}, "n": 2, "ignore_eos": True},
    ],
)  # fmt: skip
def test_texts_that_are_none(live: Live, body: dict[str, Any]) -> None:
    with live.http() as http:
        reply = http.post(
            "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert reply.status_code in (200, 400), reply.text


@pytest.mark.parametrize(
    "body", [{"prompt": "\ud800"}, {"prompt": []}, {"prompt": [[]]}, {"prompt": ""}, {"prompt": [[-1]]},
             {"prompt": [[1]] * 5000}, {"prompt": "a", "stream": True, "max_tokens": 0},
             {"prompt": "a", "stream": True, "echo": True}, {"prompt": "a", "suffix": "b"}]
)  # fmt: skip
def test_prompts_that_are_none(live: Live, body: dict[str, Any]) -> None:
    with live.http() as http:
        is_error(
            http.post("/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}), 400
        )


def test_what_still_runs_when_time_is_up_ends_in_good_order(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    closing = start(drain_seconds=0.5)
    closing.slowed(monkeypatch, 0.05)
    with closing.http() as http, http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        closing.service.scheduler.stop()
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "stopping"
    assert rest[-1] == "data: [DONE]"
    assert closing.idle()


def test_stopping_finishes_what_runs_and_refuses_what_comes(start: Start) -> None:
    closing = start(drain_seconds=20)
    replies: list[httpx.Response] = []

    def ask() -> None:
        with closing.http() as http:
            replies.append(http.post("/v1/chat/completions", json=LONG))

    with closing.http() as http:
        http.get("/health")  # a connection that stays
        thread = threading.Thread(target=ask)
        thread.start()
        while not closing.engine.active:
            time.sleep(0.001)
        closing.service.scheduler.stop()
        is_error(http.post("/v1/chat/completions", json=ASK), 503, "stopping")
        assert http.get("/health/ready").status_code == 503
        assert http.get("/health/live").status_code == 200
    closing.stop()
    thread.join()
    assert replies[0].status_code == 200
    assert replies[0].json()["usage"]["completion_tokens"] == 400
