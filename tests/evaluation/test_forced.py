"""Teacher-forced sums against plain loops over each member's own logits; what is kept, and what the report says."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionroute.collection import encode_chat, load_tokenizer
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.evaluation import forced, forced_figures, page, report
from fusionroute.evaluation.benchmarks import load_task
from fusionroute.evaluation.evaluate import Evaluation, evaluate
from fusionroute.evaluation.forced import ALPHAS, Reference, measure, reference, tokens_of
from fusionroute.evaluation.store import Store
from fusionroute.evaluation.systems import Sources, find
from fusionroute.lm_head import Head
from fusionroute.training.data import Tokens

DATA = Path(__file__).parent / "fixtures"
WITH_REFERENCES = ("gsm8k", "math500", "mbpp", "humaneval")


# ---- the rows


def sequences_of(hand: Any, count: int = 9) -> dict[str, Tokens]:
    """Random rows of uneven length whose tokens are often some member's first choice."""
    generator = random.Random(0)
    made = {}
    for number in range(count):
        start, length = generator.randint(1, 7), generator.randint(1, 9)
        ids = [generator.randrange(300) for _ in range(start + length)]
        for t in range(start, len(ids), 2):
            _, router, experts = hand.terms(ids[:t])
            ids[t] = int([router, *experts][(t + number) % (len(experts) + 1)][-1].argmax())
        made[f"row{number}"] = Tokens(tuple(ids), start)
    return made


def by_hand(terms: Any, names: list[str], labels: dict[int, int], alphas: Any) -> dict[str, Any]:
    """Sums over `labels` (after each position, the token), one at a time; of fusionroute it uses nothing."""
    sums: dict[str, dict[str, float]] = {"sums": {}, "sums_disagree": {}}
    scores, router, experts = (t.double() for t in terms)
    disagree = 0
    for at, label in labels.items():
        own = [float(e[at].log_softmax(-1)[label]) for e in experts]
        first = [int(e[at].argmax()) for e in experts]
        chosen = scores[at].tolist().index(max(scores[at].tolist()))
        values = {
            "nll/routed": -own[chosen],
            "nll/best per token": -max(own),
            "top1/routed": float(first[chosen] == label),
            "top1/best per token": float(label in first),
            "accuracy": float(own[chosen] == max(own)),
        }
        systems = {"router": router[at], "uniform": sum(e[at] for e in experts) / len(names)}
        systems |= {f"expert {name}": experts[index, at] for index, name in enumerate(names)}
        systems |= {f"alpha {float(a)}": a * router[at] + experts[chosen, at] for a in alphas}
        for name, logits in systems.items():
            values[f"nll/{name}"] = -float(logits.log_softmax(-1)[label])
            values[f"top1/{name}"] = float(int(logits.argmax()) == label)
        differ = len(set(first)) > 1
        disagree += differ
        for kind in ("sums", "sums_disagree") if differ else ("sums",):
            for name, value in values.items():
                sums[kind][name] = sums[kind].get(name, 0.0) + value
    return {"tokens": len(labels), "disagree": disagree, **sums}


def of_row(hand: Any, tokens: Tokens, alphas: Any) -> dict[str, Any]:
    labels = {t - 1: tokens.ids[t] for t in range(tokens.start, len(tokens.ids))}
    return by_hand(hand.terms(tokens.ids), hand.names, labels, alphas)


@pytest.mark.parametrize("shape", ["mixed", "adapters"])
def test_every_sum_is_that_of_plain_loops(shape: str, load: Any, oracle: Any) -> None:
    hand = oracle(shape)
    sequences = sequences_of(hand)
    got = dict(measure(load(shape), sequences, ALPHAS))
    assert got.keys() == sequences.keys()
    for key, tokens in sequences.items():
        expected = of_row(hand, tokens, ALPHAS)
        assert (got[key]["tokens"], got[key]["disagree"]) == (expected["tokens"], expected["disagree"])
        assert got[key]["sums"] == pytest.approx(expected["sums"], rel=1e-4, abs=1e-4)
        left = {name: value for name, value in got[key]["sums_disagree"].items() if value or expected["disagree"]}
        assert left == pytest.approx(expected["sums_disagree"], rel=1e-4, abs=1e-4)


def test_the_rows_tell_systems_apart(oracle: Any) -> None:
    """Or the comparison above would prove little."""
    rows = [of_row(oracle("mixed"), tokens, ALPHAS) for tokens in sequences_of(oracle("mixed")).values()]
    total = {name: sum(row["sums"][name] for row in rows) for name in rows[0]["sums"]}
    assert 0 < total["top1/routed"] < total["top1/best per token"]
    nll = [value for name, value in total.items() if name.startswith("nll/") and name != "nll/alpha 0.0"]
    assert len(set(nll)) == len(nll)


def test_tokens_where_experts_agree_are_told_apart() -> None:
    """On made-up logits: tiny random models agree at no token."""
    generator, names = torch.Generator().manual_seed(0), ["a", "b", "c"]
    common = torch.randn(40, 11, generator=generator) * 3
    router, *experts = (common + torch.randn(40, 11, generator=generator) for _ in range(4))
    scores = torch.randn(40, 3, generator=generator)
    labels = torch.randint(11, (40,), generator=generator)
    labels[::2] = common.argmax(-1)[::2]
    got = forced.token_values([router, *experts], scores.argmax(-1), labels, names, ALPHAS)
    expected = by_hand((scores, router, torch.stack(experts)), names, dict(enumerate(labels.tolist())), ALPHAS)
    where = got.pop("disagree")
    assert 0 < int(where.sum()) == expected["disagree"] < 40
    assert {name: float(v.sum()) for name, v in got.items()} == pytest.approx(expected["sums"], rel=1e-5)
    assert {name: float(v[where].sum()) for name, v in got.items()} == pytest.approx(
        expected["sums_disagree"], rel=1e-5
    )


def test_alpha_of_the_collection_is_what_it_computes(load: Any, oracle: Any) -> None:
    model, sequences = load("mixed"), sequences_of(oracle("mixed"), 4)
    for key, row in measure(model, sequences, [0.0, model.config.alpha]):
        ids, start = torch.tensor([sequences[key].ids]), sequences[key].start
        with torch.no_grad():
            logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        nll = -float(logprobs.gather(-1, ids[0, start:, None]).sum())
        assert row["sums"][f"nll/alpha {model.config.alpha}"] == pytest.approx(nll, rel=1e-4)
        assert row["sums"]["nll/alpha 0.0"] == pytest.approx(row["sums"]["nll/routed"], rel=1e-6)


def test_experts_that_are_equally_sure_are_all_the_oracle(load: Any) -> None:
    logits = torch.zeros(2, 5)
    values = forced.token_values([logits] * 3, torch.tensor([0, 1]), torch.tensor([3, 4]), ["a", "b"], [1.0])
    assert values["accuracy"].tolist() == [1.0, 1.0]
    assert values["disagree"].tolist() == [False, False]


# ---- references


def test_references_are_what_a_right_answer_looks_like() -> None:
    found = {}
    for task in (*WITH_REFERENCES, "ifeval", "general"):
        benchmark = load_task(task, DATA)
        found[task] = [(benchmark, item, reference(task, item.raw)) for item in benchmark.items]
    for task in ("ifeval", "general"):
        assert all(answer is None for _, _, answer in found[task])
    for task in WITH_REFERENCES:
        for benchmark, item, answer in found[task]:
            assert answer is not None
            score = benchmark.score(item, answer.given + answer.text)
            assert score.scores[benchmark.primary] == 1, (item.id, answer)


def test_a_row_without_its_reference_has_none() -> None:
    assert reference("mbpp", {"code": None}) is None
    assert reference("math500", {"solution": " \n"}) is None


@pytest.fixture(params=[True, False], ids=["template", "no template"])
def tokenizer(request: pytest.FixtureRequest, make_collection: Callable[[str], Path]) -> Any:
    made = load_tokenizer(make_collection("mixed"))
    if not request.param:
        made.chat_template = None
    return made


def test_the_answer_follows_the_prompt_that_is_generated_from(tokenizer: Any, load: Any) -> None:
    tokens, cut = tokens_of(tokenizer, "add two numbers", Reference("", "here is the sum"), load("mixed").config)
    assert list(tokens.ids[: tokens.start]) == encode_chat(tokenizer, [{"role": "user", "content": "add two numbers"}])
    assert "here is the sum" in tokenizer.decode(tokens.completion)
    assert tokens.ids[-1] == tokenizer.eos_token_id
    assert not cut


def test_what_is_given_is_not_measured(tokenizer: Any, load: Any) -> None:
    answer = Reference("def add(a, b):\n", "    return a + b\n")
    tokens, _ = tokens_of(tokenizer, "add two numbers", answer, load("mixed").config)
    left, measured = tokenizer.decode(tokens.ids[: tokens.start]), tokenizer.decode(tokens.completion)
    assert "def add(a, b):" in left
    assert "def" not in measured
    assert "return a + b" in measured


def test_a_long_reference_is_cut(tokenizer: Any, load: Any) -> None:
    tokens, cut = tokens_of(tokenizer, "count", Reference("", "one two " * 400), load("mixed").config)
    assert cut
    assert len(tokens.completion) == forced.MAX_TOKENS


def test_a_prompt_that_fills_the_context_is_refused(tokenizer: Any, load: Any) -> None:
    with pytest.raises(FusionRouteError, match="context"):
        tokens_of(tokenizer, "count " * 600, Reference("", "one"), load("mixed").config)


# ---- evaluate and report


@pytest.fixture(scope="module")
def results(make_collection: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """FusionRoute and one more α on three benchmarks, evaluated."""
    wanted = Evaluation(
        make_collection("adapters"),
        tmp_path_factory.mktemp("results"),
        tasks=["gsm8k", "mbpp", "ifeval"],
        systems=["fusionroute,alpha:0.5,alpha:1"],
        data=DATA,
        limit=2,
    )
    evaluate(wanted)
    return wanted


def test_the_report_has_the_teacher_forced_figures(results: Evaluation) -> None:
    found = json.loads(report.as_json(report.read(results.out)))["teacher_forced"]
    assert list(found["benchmarks"]) == ["gsm8k", "mbpp"]
    assert found["without_references"] == ["ifeval"]
    for section in (*found["benchmarks"].values(), found["average"]):
        for system in forced_figures.SYSTEMS:
            figure = section["nll"][system]
            assert 0 < figure["low"] <= figure["value"] <= figure["high"]
        assert section["nll"]["oracle"]["value"] <= section["nll"]["chosen"]["value"]
        assert section["unmeasured"] == 0
        assert [row["alpha"] for row in section["alpha"]] == sorted(ALPHAS)


def test_the_rows_are_those_of_the_reference_answers(results: Evaluation, oracle: Any) -> None:
    plan = json.loads((results.out / "plan.json").read_text())["teacher_forced"]
    rows, tokenizer = Store(results.out / "forced.jsonl"), load_tokenizer(results.collection)
    for task in ("gsm8k", "mbpp"):
        item = load_task(task, DATA).items[0]
        answer = reference(task, item.raw)
        assert answer is not None
        row = rows.get(plan["tasks"][task][0])
        assert row is not None
        config = type("", (), {"max_position_embeddings": 512, "vocab_size": 10**6})
        tokens, cut = tokens_of(tokenizer, item.prompt, answer, config)
        expected = of_row(oracle("adapters"), tokens, [1.0])
        assert (row["item"], row["tokens"], row["cut"]) == (item.id, expected["tokens"], cut)
        for name, value in expected["sums"].items():
            assert row["sums"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def test_measured_rows_are_kept(results: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results.out / "forced.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])  # killed while it wrote the last row
    measured: list[int] = []
    once = forced.measure

    def counted(model: Any, sequences: Any, alphas: Any) -> Any:
        measured.append(len(sequences))
        return once(model, sequences, alphas)

    monkeypatch.setattr(forced, "measure", counted)
    before = Store(path).rows
    evaluate(results)
    after = Store(path).rows
    assert measured == [1]
    assert len(after) == len(lines) == len(before) + 1
    evaluate(results)
    assert measured == [1]


def test_an_item_that_cannot_be_measured_is_marked_once(results: Evaluation, tmp_path: Path) -> None:
    benchmarks = [load_task("gsm8k", DATA, limit=2)]
    identity = {"weights": {}, "text": "t", "vocab_size": 300}
    planned, store = forced.plan(benchmarks, identity, 1.0, None), Store(tmp_path / "forced.jsonl")
    tokenizer = load_tokenizer(results.collection)

    class Model:
        members = ()
        config = type("", (), {"max_position_embeddings": 5, "vocab_size": 300})

    loads = []

    def loaded() -> Any:
        loads.append(1)
        return Model(), tokenizer

    forced.fill(planned, benchmarks, store, loaded)
    forced.fill(planned, benchmarks, store, loaded)
    assert len(loads) == 1
    assert ["context" in row["error"] for row in store.rows.values()] == [True, True]


def test_keys_tell_weights_prompts_and_settings_apart() -> None:
    benchmarks = [load_task("gsm8k", DATA, limit=1)]

    def key(identity: dict[str, Any], alpha: float = 1.0, dtype: str | None = None) -> Any:
        return forced.plan(benchmarks, identity, alpha, dtype)["tasks"]["gsm8k"][0]

    one = {"weights": {"router": ["a"]}, "text": "t", "vocab_size": 300, "policy": {"alpha": 1.0}}
    other = {**one, "weights": {"router": ["b"]}}
    template = {**one, "text": "another"}
    assert len({key(one), key(other), key(template), key(one, alpha=0.3), key(one, dtype="float32")}) == 5
    # All α of the sweep are measured anyway.
    assert key(one) == key({**one, "policy": {"alpha": 0.5}}, alpha=0.5)


def test_without_fusionroute_nothing_is_measured(results: Evaluation, tmp_path: Path) -> None:
    evaluate(Evaluation(results.collection, tmp_path, tasks=["gsm8k"], systems=["router"], data=DATA, limit=1))
    assert not (tmp_path / "forced.jsonl").exists()
    assert report.read(tmp_path)["teacher_forced"] is None


def test_markdown_tells_the_gap_and_the_sweep(results: Evaluation) -> None:
    found = report.read(results.out)
    text = report.as_markdown(found)
    figure = found["teacher_forced"]["average"]["nll"]["oracle"]
    assert f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" in text
    assert "| **1** |" in text
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.split("\n") if line.startswith("|")}
        assert len(widths) <= 1, block


def test_the_page_draws_them(results: Evaluation) -> None:
    text = page.render(report.read(results.out), results.out)
    assert "Teacher-forced" in text
    assert text.count("<polyline") >= 6
    assert not any(mark in text for mark in ("http://", "https://", "<script", "src="))


# ---- generated with other α


def test_the_generated_sweep_is_by_alpha(results: Evaluation) -> None:
    found = report.read(results.out)
    # The collection's own is 1, so alpha:1 is FusionRoute itself and stands there once.
    assert [(row["alpha"], row["system"]) for row in found["alpha_sweep"]] == [(0.5, "alpha:0.5"), (1.0, "fusionroute")]
    assert found["alpha_sweep"][0]["average"] == found["systems"]["alpha:0.5"]["average"]
    assert "α sweep (generated)" in report.as_markdown(found)
    answers = json.loads((results.out / "plan.json").read_text())["systems"]
    assert answers["alpha:1"]["tasks"] == answers["fusionroute"]["tasks"] != answers["alpha:0.5"]["tasks"]


def test_alpha_is_a_policy_of_the_collection(results: Evaluation, tmp_path: Path) -> None:
    system = find("alpha:0.25", Sources(results.collection, tmp_path))
    assert (system.folder, dict(system.policy), system.routed) == (results.collection, {"alpha": 0.25}, True)


@pytest.mark.parametrize("value", ["", "much", "nan", "inf", "-1", "0,5"])
def test_what_is_no_alpha_is_refused(value: str, results: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no α.*alpha:0\.5"):
        find(f"alpha:{value}", Sources(results.collection, tmp_path))


def test_a_row_that_is_not_finite_says_so(load: Any) -> None:
    model = load("mixed")
    good = [Head(member.model, model.config.vocab_size) for member in model.members]
    heads: list[Any] = [lambda hidden: good[0](hidden) * math.inf, *good[1:]]
    rows = forced._measure_batch(model, heads, [Tokens((5, 6, 7), 1)], [1.0])
    assert "not finite" in rows[0]["error"]
