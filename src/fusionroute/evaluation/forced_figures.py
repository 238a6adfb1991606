"""What the teacher-forced rows come to: chosen against best possible, and the sweep of α. Numbers and text; no model.

A figure is a mean over tokens, so its interval is a bootstrap over items of a ratio of sums. The average over
benchmarks weighs each alike, as the table of accuracies does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusionroute.evaluation.markdown import table
from fusionroute.evaluation.statistics import estimate_of, resamples
from fusionroute.evaluation.store import Store

# Each over all tokens, and over those at which the experts' first choices differ.
MEASURES = ("nll", "nll_disagree", "top1", "top1_disagree")
SYSTEMS = ("chosen", "best_expert", "oracle", "fused", "router", "uniform")
AVERAGE = "average"
_NAMED = 3  # items not measured that a note names; the JSON names all
_SMALL = 1e-6  # a gap to the oracle below this is none


def read(plan: Mapping[str, Any], experts: Sequence[str], store: Store) -> dict[str, Any] | None:
    """All figures; without an average if nothing could be measured.

    Args:
        plan: as `forced.plan` made it.

    Returns:
        `{"benchmarks": {TASK: section}, "average": section, "alpha", "max_tokens", "without_references": […]}`, a
        section being `{"items", "unmeasured", "reasons": {ITEM: why}, "cut", "tokens", "disagree", MEASURE: {SYSTEM:
        figure}, "best_expert": {MEASURE: NAME}, "gap_closed": {MEASURE: figure}, "agreement": {"all", "disagree"},
        "alpha": [{"alpha", MEASURE: figure, "difference": {MEASURE: figure}}]}`, a figure `{"value", "low", "high"}`,
        or None where there is no token to speak of. Differences are to the collection's own α, on the same draws.
    """
    sections, draws = {}, []
    for number, (task, keys) in enumerate(plan["tasks"].items()):
        rows = [None if key is None else store.get(key) for key in keys]
        found = [row for row in rows if row is not None and not row["error"]]
        counts = {
            "items": len(rows),
            "unmeasured": len(rows) - len(found),
            "reasons": {row["item"]: row["error"] for row in rows if row is not None and row["error"]},
            "cut": sum(row["cut"] for row in found),
            "tokens": sum(row["tokens"] for row in found),
            "disagree": sum(row["disagree"] for row in found),
        }
        if found:
            draws.append(_draws(found, seed=number))
            sections[task] = counts | _section(draws[-1], experts, plan, len(found))
        else:
            sections[task] = counts
    about = {name: plan[name] for name in ("alpha", "max_tokens", "without_references")}
    if not draws:
        return {"benchmarks": sections, AVERAGE: None, **about} if sections else None
    # A benchmark without a token of the kind says nothing of it; the others' mean is the average.
    together = {name: _mean([each[name] for each in draws]) for name in draws[0]}
    measured = sum(section["items"] - section["unmeasured"] for section in sections.values())
    sums = {
        name: sum(s[name] for s in sections.values()) for name in ("items", "unmeasured", "cut", "tokens", "disagree")
    }
    return {
        "benchmarks": sections,
        AVERAGE: sums | _section(together, experts, plan, measured),
        **about,
    }


def swept(alpha: float) -> str:
    """The name under which rows hold the figures of Eq. 1 with this α."""
    return f"alpha {float(alpha)}"


def _draws(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, np.ndarray]:
    """By figure and kind of token, its mean over tokens: of the items as they are and of each draw, `[1 + DRAWS]`."""
    weights = resamples(len(rows), seed)
    found: dict[str, np.ndarray] = {}
    for kind, size, sums in (("", "tokens", "sums"), ("_disagree", "disagree", "sums_disagree")):
        names = list(rows[0][sums])
        table = np.array([[row[sums][name] for name in names] for row in rows])
        sizes = weights @ np.array([row[size] for row in rows], dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = weights @ table / sizes[:, None]
        found |= {name + kind: means[:, place] for place, name in enumerate(names)}
    return found


def _mean(each: Sequence[np.ndarray]) -> np.ndarray:
    known = [values for values in each if np.isfinite(values[0])]
    return np.mean(known, axis=0) if known else each[0]


def _section(
    draws: Mapping[str, np.ndarray], experts: Sequence[str], plan: Mapping[str, Any], n: int
) -> dict[str, Any]:
    section: dict[str, Any] = {"best_expert": {}, "gap_closed": {}}
    for measure in MEASURES:
        what, kind = _parts(measure)
        of_experts = {name: draws[f"{what}/expert {name}{kind}"] for name in experts}
        better = min if what == "nll" else max
        # The best on the items as they are, kept for every draw.
        best = better(experts, key=lambda name: of_experts[name][0])
        systems = {
            "chosen": draws[f"{what}/routed{kind}"],
            "best_expert": of_experts[best],
            "oracle": draws[f"{what}/best per token{kind}"],
            "fused": draws[f"{what}/{swept(plan['alpha'])}{kind}"],
            "router": draws[f"{what}/router{kind}"],
            "uniform": draws[f"{what}/uniform{kind}"],
            **{f"expert:{name}": values for name, values in of_experts.items()},
        }
        section[measure] = {name: _figure(values, n) for name, values in systems.items()}
        section["best_expert"][measure] = best if np.isfinite(of_experts[best][0]) else None
        gap = systems["best_expert"] - systems["oracle"]
        with np.errstate(divide="ignore", invalid="ignore"):
            closed = np.where(np.abs(gap) > _SMALL, (systems["best_expert"] - systems["chosen"]) / gap, np.nan)
        section["gap_closed"][measure] = _figure(closed, n)
    section["agreement"] = {
        "all": _figure(draws["accuracy"], n),
        "disagree": _figure(draws["accuracy_disagree"], n),
    }
    section["alpha"] = []
    for alpha in plan["alphas"]:
        row: dict[str, Any] = {"alpha": alpha, "difference": {}}
        for measure in MEASURES:
            mine, own = (draws[f"/{swept(value)}".join(_parts(measure))] for value in (alpha, plan["alpha"]))
            row[measure] = _figure(mine, n)
            row["difference"][measure] = _figure(mine - own, n)
        section["alpha"].append(row)
    return section


def _parts(measure: str) -> tuple[str, str]:
    """`nll_disagree` to (`nll`, `_disagree`), `nll` to (`nll`, ``)."""
    what, line, kind = measure.partition("_")
    return what, line + kind


def _figure(values: np.ndarray, n: int) -> dict[str, float] | None:
    found = estimate_of(values, n)
    return None if found is None else {"value": found.mean, "low": found.low, "high": found.high}


# ---- as text

TITLES = {
    "nll": "NLL",
    "nll_disagree": "NLL where experts differ",
    "top1": "top-1",
    "top1_disagree": "top-1 where experts differ",
}
COLUMNS = {
    "chosen": "chosen expert",
    "best_expert": "best single expert",
    "oracle": "oracle",
    "fused": "fused",
    "uniform": "product of all",
}
GAP = ("nll", "top1", "top1_disagree")  # the measures that the table of the gap shows
GAP_HEADS = (*COLUMNS.values(), "gap closed", "routes as the oracle")


def gap_figures(section: Mapping[str, Any], measure: str) -> list[tuple[Any, str]]:
    """A line of the table of the gap: the figures under `GAP_HEADS`, and the form that each is written in."""
    agreement = section["agreement"]["disagree" if _parts(measure)[1] else "all"]
    found: list[tuple[Any, str]] = [(section[measure][system], ".3f") for system in COLUMNS]
    return [*found, (section["gap_closed"][measure], "+.2f"), (agreement, ".2f")]


def lines(found: Mapping[str, Any]) -> list[str]:
    """Markdown: a table of the gap to the oracle, one of the sweep of α, and what they rest on."""
    if found[AVERAGE] is None:
        return ["", *notes(found)]
    heads = ["teacher-forced", "benchmark", *GAP_HEADS]
    rows = [
        [TITLES[measure], task, *(_cell(figure, form) for figure, form in gap_figures(section, measure))]
        for measure in GAP
        for task, section in shown(found).items()
    ]
    sweep = []
    for row in found[AVERAGE]["alpha"]:
        mark = "**" if row["alpha"] == found["alpha"] else ""
        sweep.append([f"{mark}{row['alpha']:g}{mark}", *(_cell(row[measure]) for measure in TITLES)])
    return ["", *table(heads, rows), "", *notes(found), "", *table(["α", *TITLES.values()], sweep), "", SWEPT]


SWEPT = "Sweep of α on the same tokens, average of the benchmarks; the collection's own α stands out."


def shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that have figures, the average last."""
    sections = {task: section for task, section in found["benchmarks"].items() if "nll" in section}
    return {**sections, AVERAGE: found[AVERAGE]}


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the figures mean and rest on."""
    return [*(_basis(found) if found[AVERAGE] else ["Teacher-forced figures: none."]), *_unmeasured(found)]


def _basis(found: Mapping[str, Any]) -> list[str]:
    whole = found[AVERAGE]
    share = whole["disagree"] / max(whole["tokens"], 1)
    said = [
        f"On {whole['items'] - whole['unmeasured']} reference answers, {whole['tokens']} tokens, nothing generated; "
        f"the experts' first choices differ at {share:.1%}. NLL in nats per token; the average weighs benchmarks "
        "alike. The oracle takes the best expert for each token: no routing can beat it. Gap closed: how far the "
        "chosen experts come from the best single expert to the oracle.",
    ]
    if whole["cut"]:
        said.append(f"References longer than {found['max_tokens']} tokens, cut there: {whole['cut']}.")
    if found["without_references"]:
        said.append(f"Without reference answers: {', '.join(found['without_references'])}.")
    return said


def _unmeasured(found: Mapping[str, Any]) -> list[str]:
    said = []
    for task, section in found["benchmarks"].items():
        if section["unmeasured"]:
            reasons = list(section["reasons"].items())
            why = "".join(f" {item}: {reason}." for item, reason in reasons[:_NAMED])
            why += f" And {len(reasons) - _NAMED} more." if len(reasons) > _NAMED else ""
            said.append(f"Not measured: {section['unmeasured']} of {section['items']} items of {task}.{why}")
    return said


def _cell(figure: Mapping[str, float] | None, form: str = ".3f") -> str:
    if figure is None:
        return "–"
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"
