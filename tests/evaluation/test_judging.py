"""Contests, the judges that settle them, and win rates from an evaluation to its report."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_endpoint import FakeEndpoint, verdict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fusionroute.collection import read_config
from fusionroute.copying import PROVENANCE
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation import page, report
from fusionroute.evaluation.endpoint import Endpoint
from fusionroute.evaluation.evaluate import Evaluation, evaluate
from fusionroute.evaluation.judging import ChatJudge, Contest, RewardJudge, judge_all, load, outcome
from fusionroute.evaluation.reward import RewardModel
from fusionroute.evaluation.store import Store

DATA = Path(__file__).parent / "fixtures"
HELD_OUT = {"value": 0.625, "low": 0.5, "high": 0.75, "n": 80, "domains": {}, "sources": []}
SYSTEMS = ["fusionroute", "expert:math", "uniform"]


def first_of(text: str) -> str:
    """The first answer of a question."""
    return text.split("<answer_a>\n")[1].split("\n</answer_a>")[0]


class Taste:
    """A judge's ways, by name, on a real server; counts what it is asked."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.fake = FakeEndpoint(self._act)
        self.judge = ChatJudge(Endpoint(self.fake.url, "judge-1", pause=0.01, tries=2))

    def _act(self, number: int, body: dict[str, Any]) -> str:
        first = first_of(body["messages"][1]["content"])
        ways = {"first": "A", "second": "B", "good": "A" if first == "good" else "B", "nonsense": "?"}
        if self.way == "nonsense on the second":
            return verdict("A") if first == "good" else "I like both."
        return verdict(ways[self.way])

    @property
    def asked(self) -> int:
        return len(self.fake.bodies)


@pytest.fixture
def taste(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Taste]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made: list[Taste] = []

    def make(way: str) -> Taste:
        made.append(Taste(way))
        return made[-1]

    yield make
    for each in made:
        each.fake.close()


# Contests

SETTLED = [("", "x", 0.0), (" \n", "x", 0.0), ("x", "", 1.0), ("", " ", 0.5), ("x", "x\n", 0.5), ("x", "y", None)]


@pytest.mark.parametrize(("mine", "theirs", "won"), SETTLED)
def test_blank_and_equal_answers_need_no_judge(
    mine: str, theirs: str, won: float | None, taste: Callable[[str], Taste], tmp_path: Path
) -> None:
    contest, judge, verdicts = Contest("p", mine, theirs), taste("first"), Store(tmp_path / "verdicts.jsonl")
    assert contest.settled() == won
    judge_all(judge.judge, [contest], verdicts)
    assert judge.asked == (2 if won is None else 0)
    assert outcome(contest, judge.judge.identity, verdicts) == (0.5 if won is None else won, None)


def test_a_key_depends_on_all_that_the_verdict_depends_on() -> None:
    contest, judge = Contest("p", "x", "y"), {"model": "m", "rubric": "r"}
    others = [replace(contest, prompt="q"), replace(contest, mine="z"), Contest("p", "y", "x")]
    keys = {contest.key(judge), contest.key(judge | {"rubric": "s"}), *(other.key(judge) for other in others)}
    assert len(keys) == 5


# An endpoint as judge


@pytest.mark.parametrize(
    ("way", "mine", "won"),
    [("good", "good", 1.0), ("good", "bad", 0.0), ("first", "good", 0.5), ("second", "bad", 0.5)],
)
def test_both_orders_are_asked_and_a_split_is_a_half(
    way: str, mine: str, won: float, taste: Callable[[str], Taste], tmp_path: Path
) -> None:
    judge, verdicts = taste(way), Store(tmp_path / "verdicts.jsonl")
    contest = Contest("p", mine, "bad" if mine == "good" else "good")
    judge_all(judge.judge, [contest], verdicts)
    assert outcome(contest, judge.judge.identity, verdicts) == (won, None)
    firsts = [first_of(body["messages"][1]["content"]) for body in judge.fake.bodies]
    assert sorted(firsts) == ["bad", "good"]


def test_raw_verdicts_of_both_orders_are_kept(taste: Callable[[str], Taste], tmp_path: Path) -> None:
    judge = taste("good")
    judge_all(judge.judge, [Contest("p", "good", "bad")], Store(tmp_path / "verdicts.jsonl"))
    row = json.loads((tmp_path / "verdicts.jsonl").read_text())
    assert (row["judge"], row["prompt"], row["mine"], row["theirs"]) == ("judge-1", "p", "good", "bad")
    assert [(reply["mine_is"], reply["raw"]) for reply in row["replies"]] == [
        ("A", [verdict("A")]),
        ("B", [verdict("B")]),
    ]


def test_what_has_a_verdict_is_not_asked_again(taste: Callable[[str], Taste], tmp_path: Path) -> None:
    judge, path = taste("good"), tmp_path / "verdicts.jsonl"
    contests = [Contest("p", "good", "bad"), Contest("q", "good", "bad"), Contest("p", "good", "bad")]
    judge_all(judge.judge, contests[:1], Store(path))
    assert judge.asked == 2
    judge_all(judge.judge, contests, Store(path))
    assert judge.asked == 4


def test_half_a_verdict_is_completed_in_the_next_run(taste: Callable[[str], Taste], tmp_path: Path) -> None:
    judge, contest, path = taste("nonsense on the second"), Contest("p", "good", "bad"), tmp_path / "verdicts.jsonl"
    judge_all(judge.judge, [contest], Store(path))
    won, why = outcome(contest, judge.judge.identity, Store(path))
    assert won is None
    assert "I like both." in str(why)
    before, judge.way = judge.asked, "good"
    judge_all(judge.judge, [contest], Store(path))
    assert outcome(contest, judge.judge.identity, Store(path)) == (1.0, None)
    assert judge.asked == before + 1


def test_a_verdict_that_cannot_be_kept_is_told(
    taste: Callable[[str], Taste], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def put(*_: Any) -> None:
        raise FusionRouteError("no space left")

    monkeypatch.setattr(Store, "put", put)
    judge, contest, verdicts = taste("good"), Contest("p", "good", "bad"), Store(tmp_path / "verdicts.jsonl")
    judge_all(judge.judge, [contest], verdicts)
    assert "no space left" in capsys.readouterr().err
    assert outcome(contest, judge.judge.identity, verdicts) == (None, "not judged yet")


# A reward model as judge


@pytest.fixture(scope="module")
def folder(make_collection: Callable[[str], Path]) -> Path:
    return make_collection("adapters")


@pytest.fixture(scope="module")
def reward(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out, base = tmp_path_factory.mktemp("reward"), read_config(folder).router_spec.source
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.score.weight.data.normal_()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    (out / "reward.json").write_text(json.dumps(HELD_OUT))
    return out


def test_the_higher_reward_wins(reward: Path, tmp_path: Path) -> None:
    model, verdicts = RewardModel(str(reward)), Store(tmp_path / "verdicts.jsonl")
    judge, answers = RewardJudge(model), ["7", "hello there", "a b c d", "one two three"]
    scores = dict(zip(answers, model.score([("p", answer) for answer in answers]), strict=True))
    contests = [Contest("p", mine, theirs) for mine in answers for theirs in answers if mine != theirs]
    judge_all(judge, contests, verdicts)
    for contest in contests:
        won = float(scores[contest.mine] > scores[contest.theirs])
        assert outcome(contest, judge.identity, verdicts) == (won, None)


class Constant(RewardModel):
    """Every answer is worth the same."""

    def __init__(self, value: float) -> None:
        self.value, self.calls = value, 0
        self.source, self.digest, self.max_length, self.accuracy = "constant", ["0", None], 8, None

    def score(self, answers: Any, batch: int = 16) -> list[float]:
        self.calls += len(answers)
        return [self.value] * len(answers)


@pytest.mark.parametrize(("value", "won"), [(1.5, 0.5), (float("nan"), None), (float("inf"), None)])
def test_equal_rewards_are_a_half_and_no_rewards_no_verdict(value: float, won: float | None, tmp_path: Path) -> None:
    judge, contest, verdicts = RewardJudge(Constant(value)), Contest("p", "x", "y"), Store(tmp_path / "v.jsonl")
    judge_all(judge, [contest], verdicts)
    assert outcome(contest, judge.identity, verdicts)[0] == won


def test_an_answer_is_scored_once_in_however_many_contests(tmp_path: Path) -> None:
    model = Constant(1)
    contests = [Contest("p", str(number), "reference") for number in range(40)]
    judge_all(RewardJudge(model), contests, Store(tmp_path / "v.jsonl"))
    assert model.calls == 41


def test_the_judge_is_not_the_model_that_selects(reward: Path) -> None:
    with pytest.raises(UsageError, match="trained on other pairs"):
        load(str(reward), RewardModel(str(reward)))


# The whole of it


@pytest.fixture(scope="module")
def judged(folder: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Three systems on the general prompts, judged by a reward model."""
    wanted = Evaluation(
        folder, tmp_path_factory.mktemp("judged"), ["general"], SYSTEMS, DATA, batch=8, judge=str(reward)
    )
    evaluate(wanted)
    return wanted


def again(wanted: Evaluation, out: Path, **changes: Any) -> Evaluation:
    """The same with its answers, in another folder."""
    shutil.copytree(wanted.out, out)
    return replace(wanted, out=out, **changes)


def test_every_system_but_the_reference_has_a_win_rate(judged: Evaluation, reward: Path) -> None:
    found = json.loads(report.as_json(report.read(judged.out)))
    assert "win_rate" not in found["systems"]["fusionroute"]
    for name in SYSTEMS[1:]:
        rate = found["systems"][name]["win_rate"]
        assert (rate["against"], rate["judge"], rate["n"], rate["unscored"]) == ("fusionroute", str(reward), 3, 0)
        assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
    assert found["settings"]["judge"]["accuracy"] == HELD_OUT


def test_general_is_no_part_of_the_accuracies(judged: Evaluation, tmp_path: Path) -> None:
    found = report.read(judged.out)["systems"]["fusionroute"]
    assert (found["benchmarks"], "average" in found) == ({}, False)
    both = again(judged, tmp_path / "both", tasks=["gsm8k", "general"], limit=1)
    evaluate(both)
    found = report.read(both.out)["systems"]["uniform"]
    assert set(found["benchmarks"]) == {"gsm8k"}
    assert (found["average"]["n"], found["win_rate"]["n"]) == (1, 1)


def test_a_second_run_judges_nothing(judged: Evaluation) -> None:
    before = (judged.out / "verdicts.jsonl").read_bytes()
    evaluate(judged)
    assert (judged.out / "verdicts.jsonl").read_bytes() == before


def test_the_report_says_against_whom_and_by_whom(judged: Evaluation, reward: Path) -> None:
    found = report.read(judged.out)
    for text in (report.as_markdown(found), page.render(found, judged.out)):
        assert "win rate" in text
        assert f"against fusionroute on general prompts; judge: {reward}" in text
        assert "62.5 % [50.0, 75.0] of 80 held-out pairs" in text
        assert "which was not run" in text  # the paper's reference


def test_the_reference_may_be_any_system(judged: Evaluation, tmp_path: Path) -> None:
    other = again(judged, tmp_path / "other", against="uniform")
    evaluate(other)
    mine, theirs = (report.read(wanted.out)["systems"] for wanted in (other, judged))
    assert mine["fusionroute"]["win_rate"]["rate"] == pytest.approx(1 - theirs["uniform"]["win_rate"]["rate"])


def test_the_fine_tuned_model_is_the_reference_where_it_runs(judged: Evaluation, tmp_path: Path) -> None:
    spec = read_config(judged.collection).expert_specs[0]
    finetuned = f"{spec.source}+{judged.collection / str(spec.module)}"
    wanted = again(judged, tmp_path / "out", systems=["fusionroute", "finetuned"], finetuned=finetuned, limit=1)
    assert evaluate(wanted)["judge"]["against"] == "finetuned"


def test_a_reference_that_does_not_run_is_refused(judged: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--against router"):
        evaluate(replace(judged, out=tmp_path, against="router"))
    with pytest.raises(UsageError, match="--finetuned"):
        evaluate(replace(judged, out=tmp_path, systems=["all"], against="finetuned"))


@pytest.mark.parametrize("changes", [{"judge": None}, {"systems": ["uniform"]}])
def test_without_judge_or_reference_the_answers_are_there_and_the_report_says_so(
    changes: dict[str, Any], judged: Evaluation, tmp_path: Path
) -> None:
    evaluate(again(judged, tmp_path / "out", **changes))
    found = report.read(tmp_path / "out")
    assert "--judge" in found["not_run"]["win rates"] or "--against" in found["not_run"]["win rates"]
    assert all("win_rate" not in entry for entry in found["systems"].values())
    assert "Not run: win rates" in report.as_markdown(found)
    assert "win rate<" not in page.render(found, tmp_path / "out")


def test_a_collection_may_carry_its_judge(judged: Evaluation, tmp_path: Path) -> None:
    torch.manual_seed(1)
    spec = read_config(judged.collection).router_spec
    collection, own = tmp_path / "collection", tmp_path / "collection" / "baselines" / "judge"
    shutil.copytree(judged.collection, collection)
    model = AutoModelForSequenceClassification.from_pretrained(spec.source, num_labels=1)
    settings = LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=["score"], target_modules=["q_proj"])
    get_peft_model(model, settings).save_pretrained(own)
    (own / PROVENANCE).write_text(json.dumps({"base_digest": spec.digest}))
    wanted = again(judged, tmp_path / "out", collection=collection, judge=None)
    assert evaluate(wanted)["judge"]["name"] == "the collection's baselines/judge"
    assert report.read(wanted.out)["systems"]["uniform"]["win_rate"]["n"] == 3


def test_an_endpoint_judges_and_leaves_no_key_behind(
    run: Callable, judged: Evaluation, taste: Callable[[str], Taste], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSIONROUTE_JUDGE_KEY", "sk-secret")
    judge, wanted = taste("first"), again(judged, tmp_path / "out")
    words = ["-c", wanted.collection, "--data", DATA, "--tasks", "general", "--system", ",".join(SYSTEMS), "--json"]
    words = ["evaluate", "--out", wanted.out, "--judge", f"{judge.fake.url}#judge-2", *words]
    code, out, error = run(*words)
    rate = json.loads(out)["systems"]["expert:math"]["win_rate"]
    assert (code, rate["rate"], rate["judge"], rate["n"]) == (0, 0.5, "judge-2", 3)
    assert judge.asked > 0
    assert judge.fake.headers[0]["Authorization"] == "Bearer sk-secret"
    kept = "".join(path.read_text() for path in wanted.out.rglob("*.json*")) + out + error
    assert "sk-secret" not in kept
    before = judge.asked
    run(*words)
    assert judge.asked == before


def test_items_without_a_verdict_count_a_half_and_are_named(
    run: Callable, judged: Evaluation, taste: Callable[[str], Taste], tmp_path: Path
) -> None:
    judge, wanted = taste("nonsense"), again(judged, tmp_path / "out")
    # One expert's answers differ from the reference's for certain.
    rows = [json.loads(line) for line in (wanted.out / "answers.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = f"{row['system']} {number}"
    (wanted.out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["-c", wanted.collection, "--data", DATA, "--tasks", "general", "--system", ",".join(SYSTEMS)]
    code, out, _ = run("evaluate", "--out", wanted.out, "--judge", f"{judge.fake.url}#m", *words)
    rate = report.read(wanted.out)["systems"]["uniform"]["win_rate"]
    assert (code, rate["rate"], rate["n"], rate["unscored"]) == (3, 0.5, 3, 3)
    assert "0.500 [0.500, 0.500] (3)" in out
    assert all(item in out for item in rate["reasons"])


def test_a_system_that_never_won_might_have(judged: Evaluation, tmp_path: Path) -> None:
    wanted = again(judged, tmp_path / "out")
    rows = [json.loads(line) for line in (wanted.out / "answers.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = "" if row["system"] == "uniform" else "something"
    (wanted.out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rate = report.read(wanted.out)["systems"]["uniform"]["win_rate"]
    assert (rate["rate"], rate["low"], rate["n"]) == (0, 0, 3)
    assert rate["high"] == pytest.approx(0.5615, abs=1e-4)  # Wilson's, of 0 in 3


def test_a_defective_prompt_counts(judged: Evaluation, tmp_path: Path) -> None:
    data = tmp_path / "data" / "general"
    data.mkdir(parents=True)
    (data / "prompts.jsonl").write_text((DATA / "general" / "prompts.jsonl").read_text() + '{"id": "broken"}\n')
    wanted = again(judged, tmp_path / "out", data=data.parent)
    evaluate(wanted)
    found = report.read(wanted.out)
    rate = found["systems"]["uniform"]["win_rate"]
    assert (rate["n"], rate["reasons"]) == (4, {"broken": "an answer is missing"})
    assert report.unscored(found) == 2


def test_judge_and_selection_are_kept_apart(judged: Evaluation, tmp_path: Path) -> None:
    wanted = replace(judged, out=tmp_path / "out", systems=["fusionroute", "sequence-selection"], reward=judged.judge)
    with pytest.raises(UsageError, match="by which answers are selected"):
        evaluate(wanted)
    assert not wanted.out.exists()
