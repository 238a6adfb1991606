"""Held-out figures against plain Python on each member's own logits, one row at a time."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionroute import collection, tiny
from fusionroute.configuration import MemberSpec
from fusionroute.errors import FusionRouteError
from fusionroute.modeling import FusionRouteForCausalLM
from fusionroute.router import RouteHead
from fusionroute.training.data import Item, Tokens
from fusionroute.training.heldout import measure, render


def make_items(count: int, *, longest: int = 9, seed: int = 0, vocab: int = 320) -> list[Item]:
    """Random rows of uneven length in two domains, `math` the larger."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for number in range(count):
        prompt, length = torch.randint(1, longest + 1, (2,), generator=generator).tolist()
        ids = torch.randint(0, vocab, (prompt + length,), generator=generator).tolist()
        items.append(Item((Tokens(tuple(ids), prompt),), "code" if number % 3 == 2 else "math"))
    return items


def first_of_equals(values: list[float]) -> int:
    return values.index(max(values))


def by_hand(oracle: Any, items: list[Item], alpha: float) -> dict[str, Any]:
    """Every figure of `measure` without its intervals; of fusionroute it uses nothing."""
    names = oracle.names
    nll: dict[str, list[float]] = {}
    top1: dict[str, list[float]] = {}
    routes, right, tokens = [], [], 0
    for item in items:
        ids, start = item.sequences[0].ids, item.sequences[0].start
        scores, router, experts = (t.double() for t in oracle.terms(ids))
        for t in range(start, len(ids)):
            tokens += 1
            label, at = ids[t], t - 1
            greedy = [int(e[at].argmax()) for e in experts]
            if len(set(greedy)) == 1:
                continue
            own = [float(e[at].log_softmax(-1)[label]) for e in experts]
            route = first_of_equals(scores[at].tolist())
            weights = scores[at].softmax(-1).tolist()
            routes.append(route)
            right.append(float(route == first_of_equals(own)))
            mean = sum(e[at] for e in experts) / len(names)
            systems = {"router": router[at], "fused": alpha * router[at] + experts[route, at], "uniform": mean}
            for index, name in enumerate(names):
                systems[f"expert {name}"] = experts[index, at]
                systems[f"fixed {name}"] = alpha * router[at] + experts[index, at]
            for name, logits in systems.items():
                nll.setdefault(name, []).append(-float(logits.log_softmax(-1)[label]))
                top1.setdefault(name, []).append(float(int(logits.argmax()) == label))
            nll.setdefault("routed", []).append(-own[route])
            nll.setdefault("soft", []).append(-sum(w * o for w, o in zip(weights, own, strict=True)))
            nll.setdefault("best per token", []).append(-max(own))
            top1.setdefault("routed", []).append(float(greedy[route] == label))
            top1.setdefault("best per token", []).append(float(label in greedy))
    size = len(routes)
    means = {name: sum(values) / size for name, values in nll.items()}
    best = min(names, key=lambda name: means[f"expert {name}"])
    gap = means[f"expert {best}"] - means["best per token"]
    return {
        "rows": len(items),
        "tokens": tokens,
        "informative": size,
        "best_expert": best,
        "nll": means,
        "top1": {name: sum(values) / size for name, values in top1.items()},
        "shares": {name: routes.count(index) / size for index, name in enumerate(names)},
        "routing_accuracy": sum(right) / size,
        "gap_closed": (means[f"expert {best}"] - means["routed"]) / gap if gap else math.nan,
        "over_best_expert": means["routed"] / means[f"expert {best}"] - 1,
    }


def points(section: dict[str, Any]) -> dict[str, Any]:
    """The figures of a section without their intervals."""
    bare = dict(section)
    for key in ("routing_accuracy", "gap_closed", "over_best_expert"):
        bare[key] = section[key][0]
    for key in ("nll", "top1"):
        bare[key] = {name: value[0] for name, value in section[key].items()}
    return bare


def likely_labels(oracle: Any, items: list[Item]) -> list[Item]:
    """Every second label replaced by some member's first choice: random ones are never anybody's."""
    changed = []
    for number, item in enumerate(items):
        ids, start = list(item.sequences[0].ids), item.sequences[0].start
        for t in range(start, len(ids), 2):
            _, router, experts = oracle.terms(ids[:t])
            ids[t] = int([router, *experts][(t + number) % (len(experts) + 1)][-1].argmax())
        changed.append(Item((Tokens(tuple(ids), start),), item.domain))
    return changed


@pytest.fixture(scope="module", params=["mixed", "adapters", "bare"])
def measured(request: pytest.FixtureRequest, load: Any, oracle: Any) -> tuple[dict[str, Any], Any, list[Item]]:
    """The figures of a collection, its oracle, and the rows."""
    hand = oracle(request.param)
    items = likely_labels(hand, make_items(15))
    return measure(load(request.param), items), hand, items


@pytest.mark.parametrize("section", ["math", "code", "all"])
def test_every_figure_is_that_of_plain_python(measured: Any, section: str) -> None:
    result, hand, items = measured
    got = points(result["all"] if section == "all" else result["domains"][section])
    expected = by_hand(hand, [i for i in items if section in ("all", i.domain)], 1.0)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, (dict, float)) else value)


def test_the_rows_tell_systems_apart(measured: Any) -> None:
    """Or the comparison above would prove little."""
    _, hand, items = measured
    expected = by_hand(hand, items, 1.0)
    assert 0 < expected["top1"]["routed"] < expected["top1"]["best per token"] < 1
    assert 0 < max(expected["shares"].values()) < 1
    assert len(set(expected["nll"].values())) == len(expected["nll"])


def test_domains_are_those_of_the_rows(measured: Any) -> None:
    assert list(measured[0]["domains"]) == ["code", "math"]


def test_alpha_weighs_the_router_in_every_fused_system(make_collection: Callable[[str], Path], oracle: Any) -> None:
    model = FusionRouteForCausalLM.from_pretrained(make_collection("mixed"), alpha=0.25)
    items = likely_labels(oracle("mixed"), make_items(6))
    got, expected = points(measure(model, items)["all"]), by_hand(oracle("mixed"), items, 0.25)
    for name in ("fused", "fixed math", "fixed code", "fixed general"):
        assert got["nll"][name] == pytest.approx(expected["nll"][name], rel=1e-4), name


def test_fused_and_fixed_are_what_the_collection_computes(load: Any) -> None:
    """The reference's own forward, by policy."""
    model, items = load("mixed"), make_items(5, seed=3)
    got = points(measure(model, items)["all"])["nll"]
    for name, policy in [("fused", {})] + [(f"fixed {n}", {"expert": n}) for n in model.config.expert_names]:
        losses = []
        for item in items:
            ids, start = item.sequences[0].ids, item.sequences[0].start
            with torch.no_grad():
                greedy = torch.stack(
                    [m(input_ids=torch.tensor([ids])).logits[0, :, :320].argmax(-1) for m in model.experts]
                )
                logits = model(torch.tensor([ids]), **policy).logits[0].log_softmax(-1)
            losses += [
                -float(logits[t - 1, ids[t]]) for t in range(start, len(ids)) if len(set(greedy[:, t - 1].tolist())) > 1
            ]
        assert got[name] == pytest.approx(sum(losses) / len(losses), rel=1e-4), name


def test_the_order_of_the_rows_changes_no_figure(load: Any) -> None:
    items = make_items(9, seed=4)
    forward, backward = (points(measure(load("mixed"), rows)["all"]) for rows in (items, items[::-1]))
    for key in ("nll", "top1", "shares"):
        assert forward[key] == pytest.approx(backward[key], rel=1e-5, abs=1e-7)


def test_a_member_whose_logits_are_of_an_unknown_kind_is_refused(make_collection: Callable[[str], Path]) -> None:
    """Logits are computed from the LM head alone; of a model that does more to them the figures would be wrong."""

    def double(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits = 2 * output.logits
        return output

    model = FusionRouteForCausalLM.from_pretrained(make_collection("llama"))
    model.members[-1].model.register_forward_hook(double)
    with pytest.raises(FusionRouteError, match="after the LM head"):
        measure(model, make_items(2))


# ---- intervals


def intervals(section: dict[str, Any]) -> list[list[float]]:
    return [
        *section["nll"].values(), *section["top1"].values(),
        section["routing_accuracy"], section["gap_closed"], section["over_best_expert"],
    ]  # fmt: skip


def test_intervals_contain_the_value(measured: Any) -> None:
    for section in (*measured[0]["domains"].values(), measured[0]["all"]):
        for value, low, high in intervals(section):
            assert low <= value <= high


def test_one_row_has_intervals_of_no_width(load: Any) -> None:
    for value, low, high in intervals(measure(load("mixed"), make_items(1))["all"]):
        assert (low, high) == (pytest.approx(value), pytest.approx(value))


def test_an_interval_is_the_bootstraps_over_rows(measured: Any) -> None:
    """Rows drawn with replacement in plain Python; ends agree as well as a few thousand draws allow."""
    import random

    result, hand, items = measured
    rows = []
    for item in items:
        try:
            figures = by_hand(hand, [item], 1.0)
        except ZeroDivisionError:  # no position of it is in S
            rows.append((0.0, 0))
            continue
        rows.append((figures["nll"]["routed"] * figures["informative"], figures["informative"]))
    generator = random.Random(0)
    draws = []
    for _ in range(4000):
        picked = generator.choices(rows, k=len(rows))
        draws.append(sum(a for a, _ in picked) / max(sum(b for _, b in picked), 1))
    draws.sort()
    _, low, high = result["all"]["nll"]["routed"]
    width = draws[3899] - draws[100]
    assert low == pytest.approx(draws[100], abs=0.12 * width)
    assert high == pytest.approx(draws[3899], abs=0.12 * width)


def test_the_same_seed_gives_the_same_intervals(load: Any) -> None:
    items = make_items(5)
    assert measure(load("mixed"), items, seed=3) == measure(load("mixed"), items, seed=3)
    assert measure(load("mixed"), items, seed=3) != measure(load("mixed"), items, seed=4)


# ---- where experts do not disagree


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], FusionRouteForCausalLM]:
    """A collection of one model and the same with an adapter of this scale: they disagree seldom, or never at 0."""
    root = tmp_path_factory.mktemp("agreeing")
    made: dict[float, FusionRouteForCausalLM] = {}

    def make(scale: float) -> FusionRouteForCausalLM:
        if scale not in made:
            place = root / str(scale)
            tokenizer = tiny.make_tokenizer(place / "base")
            model = tiny.make_model(place / "base", vocab_size=len(tokenizer))
            tiny.make_adapter(place / "adapter", model, scale=scale)
            head = RouteHead(32, ["plain", "other"])
            torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
            head.trained = True
            place.joinpath("head").mkdir()
            head.save(place / "head")
            base = str(place / "base")
            experts = [MemberSpec("plain", base), MemberSpec("other", base, adapter=str(place / "adapter"))]
            collection.assemble(place / "out", MemberSpec("router", base), experts, head=place / "head")
            made[scale] = FusionRouteForCausalLM.from_pretrained(place / "out")
        return made[scale]

    return make


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def test_experts_that_never_disagree_give_zeros(agreeing: Any) -> None:
    result = measure(agreeing(0.0), make_items(6, vocab=300))
    section = result["all"]
    assert section["informative"] == 0
    assert section["tokens"] > 0
    assert set(numbers([section["nll"], section["top1"], section["shares"]])) == {0.0}


def test_experts_that_never_disagree_give_numbers(agreeing: Any) -> None:
    result = measure(agreeing(0.0), make_items(6, vocab=300))
    assert all(math.isfinite(n) for n in numbers(result))
    json.dumps(result, allow_nan=False)


@pytest.fixture(scope="module")
def seldom(agreeing: Any) -> dict[str, Any]:
    """Figures of five rows of which one has positions in S: a third of all draws leave it out."""
    model = agreeing(0.02)
    few, none = [], []
    for item in make_items(120, longest=3, vocab=300):
        ids, start = torch.tensor([item.sequences[0].ids]), item.sequences[0].start
        with torch.no_grad():
            a, b = (m(input_ids=ids).logits[0, start - 1 : -1].argmax(-1) for m in model.experts)
        (none if torch.equal(a, b) else few).append(item)
    result = measure(model, [few[0], *none[:4]])
    assert result["all"]["rows"] == 5
    assert result["all"]["informative"] > 0
    return result


def test_a_draw_without_a_disagreement_makes_no_interval_nan(seldom: dict[str, Any]) -> None:
    assert [n for n in numbers(seldom) if not math.isfinite(n)] == []


def test_a_draw_without_a_disagreement_is_no_loss_of_zero(seldom: dict[str, Any]) -> None:
    """Every draw that has the one row in S gives its value; there is nothing else to draw."""
    value, low, high = seldom["all"]["nll"]["routed"]
    assert (low, high) == (pytest.approx(value), pytest.approx(value))


# ---- Markdown


def tables(text: str) -> list[list[list[str]]]:
    """Cells of each table, after making sure that it is one to any Markdown reader."""
    found = []
    for block in text.split("\n\n"):
        lines = block.strip("\n").split("\n")
        if not lines[0].startswith("|"):
            assert not any("|" in line for line in lines), block
            continue
        cells = [
            [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")] for line in lines
        ]
        assert len({len(row) for row in cells}) == 1, block
        assert set(cells[1]) == {"---"}
        found.append([cells[0], *cells[2:]])
    return found


def test_render_is_three_markdown_tables(measured: Any) -> None:
    nll, top1, shares = tables(render(measured[0]))
    assert all(table[0][1:] == ["code", "math", "all"] for table in (nll, top1, shares))
    assert [row[0] for row in nll[1:]] == list(measured[0]["all"]["nll"])
    assert [row[0] for row in top1[1:]] == list(measured[0]["all"]["top1"])


def test_render_tells_the_figures(measured: Any) -> None:
    result = measured[0]
    nll, top1, shares = tables(render(result))
    for row in nll[1:]:
        assert row[3] == "{:.3f} [{:.3f}, {:.3f}]".format(*result["all"]["nll"][row[0]])
    for row in top1[1:]:
        assert row[1] == "{:.3f} [{:.3f}, {:.3f}]".format(*result["domains"]["code"]["top1"][row[0]])
    cells = {row[0]: row[1:] for row in shares[1:]}
    for name, share in result["domains"]["math"]["shares"].items():
        assert cells[f"share of {name}"][1] == f"{share:.3f}"
    counts = result["all"]
    assert cells["rows / tokens / S"][2] == f"{counts['rows']} / {counts['tokens']} / {counts['informative']}"


def test_measuring_leaves_the_collection_as_it_was(load: Any) -> None:
    model, ids = load("adapters"), torch.tensor([[5, 9, 250, 17]])
    with torch.no_grad():
        before = model(ids).logits
        measure(model, make_items(3))
        assert torch.equal(model(ids).logits, before)
