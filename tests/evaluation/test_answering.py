from collections.abc import Callable
from pathlib import Path

import pytest

from fusionroute import FusionRouteForCausalLM, load_tokenizer
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.rows import Event, Request
from fusionroute.decoding.sampling import Sampling
from fusionroute.evaluation.answering import answer

PROMPTS = [[7], [1, 40, 41, 42, 43], [9, 12] * 6, [300, 4, 4, 4, 5], [88, 90]]


@pytest.fixture(scope="module")
def engine(make_collection: Callable[[str], Path]) -> Engine:
    folder = make_collection("adapters")
    return Engine(FusionRouteForCausalLM.from_pretrained(folder), load_tokenizer(folder))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_request_is_answered_as_alone(batch: int, engine: Engine) -> None:
    wanted = [(str(i), Request(prompt, 6, ignore_end=True)) for i, prompt in enumerate(PROMPTS)]
    found = dict(answer(engine, wanted, batch))
    alone = [engine.generate([request])[0] for _, request in wanted]
    assert [found[key].text for key, _ in wanted] == [completion.text for completion in alone]
    assert [sum(n for _, _, n in found[key].pieces) for key, _ in wanted] == [6] * len(wanted)


def test_no_more_than_a_batch_runs_at_once(engine: Engine) -> None:
    most = 0
    for _ in answer(engine, [(str(i), Request([7], 4 + i, ignore_end=True)) for i in range(6)], 2):
        most = max(most, len(engine.active) + len(engine.waiting))
    assert most <= 2


def test_costs_add_up(engine: Engine) -> None:
    jobs = engine.members.jobs
    found = dict(answer(engine, [(str(i), Request(p, 5, ignore_end=True)) for i, p in enumerate(PROMPTS)], 3))
    assert sum(each.passes for each in found.values()) == pytest.approx(engine.members.jobs - jobs)
    assert all(each.seconds > 0 for each in found.values())


def test_a_refused_request_and_a_failing_row_leave_the_others_alone(engine: Engine) -> None:
    def broken(ids: object) -> list[int]:
        raise ValueError("no token suits me")

    wanted = [
        ("good", Request([7], 4, ignore_end=True)),
        ("empty", Request([], 4)),
        ("broken", Request([7], 4, Sampling(mask=broken))),
        ("long", Request([7] * 5000, 4)),
    ]
    found = dict(answer(engine, wanted, 4))
    assert found["good"].error is None
    assert "no token" in str(found["empty"].error)
    assert "no token suits me" in str(found["broken"].error)
    assert "context" in str(found["long"].error)
    assert not engine.active


def test_a_step_that_fails_costs_the_rows_that_ran_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, failed = engine.step, []

    def fail_once() -> list[Event]:
        events = step()
        if not failed:
            failed.append(events)
            raise MemoryError("no room for more")
        return events

    monkeypatch.setattr(engine, "step", fail_once)
    monkeypatch.setattr(engine, "max_rows", 2)
    wanted = [(str(i), Request([7], 4, ignore_end=True)) for i in range(5)]
    found = dict(answer(engine, wanted, 4))
    assert [found[key].error for key, _ in wanted] == ["MemoryError: no room for more"] * 2 + [None] * 3
    assert [found[key].tokens for key, _ in wanted[2:]] == [4] * 3
    assert (list(engine.active), list(engine.waiting)) == ([], [])
