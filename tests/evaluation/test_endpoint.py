"""What a chat endpoint is asked, what its replies mean, and what happens when it gives none."""

import json
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest
from fake_endpoint import Act, FakeEndpoint, verdict
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.errors import UsageError
from fusionroute.evaluation.endpoint import REMINDER, Endpoint, Verdict, parse

Serve = Callable[..., tuple[FakeEndpoint, Endpoint]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """A fake endpoint that does these acts one after another, the last one for ever, and a client without patience."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made: list[FakeEndpoint] = []

    def start(*acts: Act, **settings: Any) -> tuple[FakeEndpoint, Endpoint]:
        made.append(FakeEndpoint(lambda number, body: acts[min(number, len(acts) - 1)]))
        return made[-1], Endpoint(made[-1].url, "judge-1", **{"pause": 0.01, "tries": 3, **settings})

    yield start
    for fake in made:
        fake.close()


# Replies

scores = st.one_of(st.none(), st.integers(1, 10), st.sampled_from([1.25, 9.75]))


def objects(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.dictionaries(st.sampled_from(["better", "score_a", "score_b", "x"]), values)


noise = st.text(st.characters(exclude_characters="{}", codec="utf-8"), max_size=60)


@given(noise, noise, st.sampled_from("AB"), scores, scores)
def test_a_verdict_is_found_whatever_stands_around_it(before: str, after: str, better: str, a: Any, b: Any) -> None:
    reply = f"{before}```json\n{json.dumps({'score_a': a, 'score_b': b, 'better': better}, indent=1)}\n```{after}"
    assert parse(reply) == Verdict(better, (a, b))


@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    parse(text)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | objects(x)))
def test_no_json_breaks_the_reader(value: Any) -> None:
    parse(json.dumps(value))


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 9000,
        "{" * 20_000,
        '{"a":' + "[" * 15_000,
        '{"score_a":' + "9" * 9000,
    ],
)
def test_depth_does_not_break_the_reader(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("better", ["tie", "", "neither", "A and B", "C", 3, None, "AB"])
def test_a_draw_is_no_verdict(better: Any) -> None:
    assert parse(json.dumps({"score_a": 5, "score_b": 5, "better": better})) is None


@pytest.mark.parametrize("better", ["a", "Answer A", "answer_a", " (A). ", "response A", "**A**"])
def test_a_verdict_may_be_said_in_other_words(better: str) -> None:
    assert parse(json.dumps({"Better": better})) == Verdict("A", (None, None))


@pytest.mark.parametrize("score", [0, 11, -1, "much", float("nan"), float("inf"), True, [7], {}])
def test_an_impossible_score_is_none(score: Any) -> None:
    assert parse(json.dumps({"score_a": score, "score_b": "7.5", "better": "B"})) == Verdict("B", (None, 7.5))


def test_the_last_verdict_counts_and_may_be_inside() -> None:
    assert parse(f"First {verdict('A')}, but on second thought {verdict('B')}.") == parse(verdict("B"))
    assert parse(json.dumps({"result": {"better": "A"}})) == Verdict("A", (None, None))


# Questions


def test_a_question_holds_the_request_and_both_answers_as_they_are(serve: Serve) -> None:
    fake, endpoint = serve(verdict("B"))
    found = endpoint.compare("Why {first}?", "Because {second} \\1.", "{prompt} %s")
    body = fake.bodies[0]
    assert (found["better"], found["scores"], found["unscored"]) == ("B", [7.25, 3], None)
    assert (body["path"], body["model"], body["temperature"]) == ("/v1/chat/completions", "judge-1", 0)
    asked = body["messages"][-1]["content"]
    assert "<request>\nWhy {first}?\n</request>" in asked
    assert "<answer_a>\nBecause {second} \\1.\n</answer_a>" in asked
    assert "<answer_b>\n{prompt} %s\n</answer_b>" in asked


def test_nonsense_is_asked_again_with_a_reminder(serve: Serve) -> None:
    fake, endpoint = serve("Both are nice.", verdict("A"))
    found = endpoint.compare("p", "x", "y")
    assert (found["better"], found["raw"]) == ("A", ["Both are nice.", verdict("A")])
    assert [m["content"] for m in fake.bodies[1]["messages"][-2:]] == ["Both are nice.", REMINDER]


def test_nothing_but_nonsense_is_unscored_with_the_replies_kept(serve: Serve) -> None:
    fake, endpoint = serve("Both are nice.")
    found = endpoint.compare("p", "x", "y")
    assert (found["better"], found["raw"], len(fake.bodies)) == (None, ["Both are nice."] * 3, 3)
    assert "Both are nice." in found["unscored"]


BODIES = ["", "not json", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}', "[" * 9000]


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_completion_is_asked_again(body: str, serve: Serve) -> None:
    fake, endpoint = serve((200, {}, body), verdict("A"))
    assert endpoint.compare("p", "x", "y")["better"] == "A"
    assert len(fake.bodies) == 2


def test_fields_that_an_endpoint_refuses_are_left_out_from_then_on(serve: Serve) -> None:
    refusal = json.dumps({"error": {"message": "Unsupported parameter: 'max_tokens', use another."}})
    fake, endpoint = serve((400, {}, refusal), verdict("A"))
    assert [endpoint.compare("p", "x", "y")["better"] for _ in range(2)] == ["A", "A"]
    assert ["max_tokens" in body for body in fake.bodies] == [True, False, False]
    assert all(body["temperature"] == 0 for body in fake.bodies)


# Failures


@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_what_passes_is_tried_again(status: int, serve: Serve) -> None:
    fake, endpoint = serve((status, {}, "busy"), (status, {}, "busy"), verdict("A"))
    assert endpoint.compare("p", "x", "y")["better"] == "A"
    assert len(fake.bodies) == 3


def test_what_does_not_pass_is_unscored(serve: Serve) -> None:
    fake, endpoint = serve((503, {}, "the  model\nis loading"))
    found = endpoint.compare("p", "x", "y")
    assert (found["unscored"], len(fake.bodies)) == ("HTTP 503 the model is loading", 3)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str, serve: Serve) -> None:
    value = "0.3" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    fake, endpoint = serve((429, {"Retry-After": value}, ""), verdict("A"), pause=0)
    started = time.monotonic()
    assert endpoint.compare("p", "x", "y")["better"] == "A"
    assert 0.3 <= time.monotonic() - started < 5
    assert len(fake.bodies) == 2


def test_who_wants_too_long_a_wait_is_not_asked_again(serve: Serve) -> None:
    fake, endpoint = serve((429, {"Retry-After": "3600"}, "slow down"))
    assert "429" in endpoint.compare("p", "x", "y")["unscored"]
    assert len(fake.bodies) == 1


def test_a_score_beyond_all_numbers_is_none() -> None:
    found = parse('{"score_a": ' + "9" * 400 + ', "score_b": 3, "better": "A"}')
    assert found is not None
    assert (found.better, found.scores) == ("A", (None, 3.0))


def test_a_judge_that_never_decides_is_given_up(serve: Serve) -> None:
    fake, endpoint = serve(*["I think both are nice."] * 6, tries=1, at_once=1)
    found = compare_all(endpoint, 9)
    assert len(fake.bodies) == 6
    assert "in a row" in found[-1]["unscored"]


@pytest.mark.parametrize("value", ["soon", "nan", "-5", "", "inf"])
def test_a_strange_retry_after_does_no_harm(value: str, serve: Serve) -> None:
    _, endpoint = serve((429, {"Retry-After": value}, ""), verdict("A"))
    assert endpoint.compare("p", "x", "y")["better"] == (None if value == "inf" else "A")


def test_silence_is_a_timeout(serve: Serve) -> None:
    _, endpoint = serve(None, timeout=0.1, tries=2)
    assert endpoint.compare("p", "x", "y")["unscored"] == "no reply within 0.1 s"


def compare_all(endpoint: Endpoint, count: int) -> list[dict[str, Any]]:
    keys = [f"p{number}" for number in range(count)]
    return [row for _, row in endpoint.several(lambda key: endpoint.compare(key, "x", "y"), keys)]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_all_questions(status: int, serve: Serve) -> None:
    fake, endpoint = serve((status, {}, "no"), at_once=1)
    found = compare_all(endpoint, 5)
    assert len(fake.bodies) == 1
    assert all(f"HTTP {status}" in row["unscored"] for row in found)


def test_a_question_that_is_refused_is_not_the_end(serve: Serve) -> None:
    fake, endpoint = serve((400, {}, "too long"), verdict("A"), at_once=1)
    found = compare_all(endpoint, 3)
    assert [row["better"] for row in found] == [None, "A", "A"]
    assert len(fake.bodies) == 3


def test_a_dead_endpoint_is_given_up_and_asked_again_in_the_next_run(serve: Serve) -> None:
    acts = [(500, {}, "")] * 6
    fake, endpoint = serve(*acts, verdict("A"), tries=1, at_once=1)
    found = compare_all(endpoint, 9)
    assert len(fake.bodies) == 6
    assert "in a row" in found[-1]["unscored"]
    assert [row["better"] for row in compare_all(endpoint, 2)] == ["A", "A"]


def test_nobody_there(serve: Serve) -> None:
    fake, endpoint = serve(verdict("A"), tries=2)
    fake.close()
    assert "refused" in endpoint.compare("p", "x", "y")["unscored"]


# The key and where it goes


def test_the_key_is_sent_and_never_comes_back(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, _ = serve(
        (500, {}, "bad key sk-secret"), "sk-secret you sent", (200, {}, "sk-secret"), (403, {}, "sk-secret")
    )
    monkeypatch.setenv("FUSIONROUTE_JUDGE_KEY", "sk-secret\n")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    endpoint = Endpoint.of(f"{fake.url}/#m")
    endpoint.pause = 0
    found = endpoint.compare("p", "x", "y")
    assert [headers["Authorization"] for headers in fake.headers] == ["Bearer sk-secret"] * 4
    assert "[key]" in found["unscored"]
    assert "sk-secret" not in f"{found} {endpoint} {endpoint.identity}"


@pytest.mark.parametrize(("name", "sent"), [("OPENAI_API_KEY", "Bearer k"), ("NOTHING", None)])
def test_without_a_key_of_ours_it_is_the_usual_one_or_none(
    name: str, sent: str | None, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("FUSIONROUTE_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv(name, "k")
    fake, _ = serve(verdict("A"))
    Endpoint.of(f"{fake.url}#m").compare("p", "x", "y")
    assert fake.headers[0].get("Authorization") == sent


def test_a_redirect_does_not_take_the_key_along(serve: Serve) -> None:
    other, _ = serve(verdict("A"))
    _, endpoint = serve((302, {"Location": f"{other.url}/chat/completions"}, ""), key="sk-secret")
    assert "HTTP 302" in endpoint.compare("p", "x", "y")["unscored"]
    assert other.bodies == []


@pytest.mark.parametrize(
    "text",
    [
        "https://host/v1",
        "https://#m",
        "ftp://host/v1#m",
        "https://u:sk-secret@host/v1#m",
        "https://h/v1?k=sk-secret#m",
        "https://h:port/v1#m",
        "https://[h/v1#m",
        "https://h/v\u00e41#m",
    ],
)
def test_a_strange_address_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(UsageError, match="URL#MODEL") as caught:
        Endpoint.of(text)
    assert "sk-secret" not in str(caught.value)


def test_a_strange_key_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONROUTE_JUDGE_KEY", "sk-secret\nX: y")
    with pytest.raises(UsageError, match="one line") as caught:
        Endpoint.of("https://host/v1#m")
    assert "sk-secret" not in str(caught.value)


def test_the_whole_address_may_be_given() -> None:
    whole, short = (Endpoint.of(f"https://host/v1{rest}#org/m:7b") for rest in ("/chat/completions", ""))
    assert whole.identity == short.identity
