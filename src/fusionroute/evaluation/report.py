"""What an evaluation found, from its results folder alone: all figures, as JSON or Markdown. Loads no model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionroute.errors import FusionRouteError
from fusionroute.evaluation import forced_figures, judging
from fusionroute.evaluation.markdown import table
from fusionroute.evaluation.names import ALPHA, COLLAB, ORACLE, OURS
from fusionroute.evaluation.report_notes import (
    HELD_OUT,
    beside,
    heads,
    p_text,
    reward_notes,
    scored_tasks,
    unscored_notes,
    win_rate_notes,
    win_rate_rows,
)
from fusionroute.evaluation.scoring import weighted_mean
from fusionroute.evaluation.statistics import Estimate, difference_of, mean_of, proportion_of
from fusionroute.evaluation.store import Store
from fusionroute.files import read_json


def read(folder: Path) -> dict[str, Any]:
    """The whole report.

    Returns:
        `{"systems": {NAME: {"benchmarks": {TASK: {"accuracy", "low", "high", "n", "unscored", "reasons": {ITEM: why},
        "metric", "other": {METRIC: mean}}},
        "average": {…}, "difference": {…}, "tokens_per_second", "passes_per_token", "mean_tokens", "cut_off",
        "routing": {TASK: {"shares", "switch_rate", "overruled_rate"}}, "win_rate": {"against", "judge", "rate", "low",
        "high", "n", "unscored", "reasons": {ITEM: why}}}}, "teacher_forced": {…}, "alpha_sweep": [{"alpha", "system",
        "average"}], "settings": {…}, "not_run": {NAME: why}}`.
        Accuracies are of all items asked for: one without a score counts as wrong, and in `unscored`. `other` metrics
        are means as lm-eval takes them: a share of instructions weighs as many as the item has. `difference` is to
        FusionRoute, item by item, with a p-value. A win rate is of all items asked for too: one without a verdict
        counts ½, and in `unscored`. There is no `average` and `difference` without benchmarks, no `win_rate` without a
        judge. `teacher_forced` is as `forced_figures.read` gives it, or None.

    Raises:
        FusionRouteError: the folder holds no evaluation.
    """
    if not (folder / "plan.json").is_file():
        raise FusionRouteError(
            f"{folder} holds no evaluation (no plan.json): run `fusionroute evaluate --out {folder}`"
        )
    plan = read_json(folder / "plan.json")
    answers, scores = Store(folder / "answers.jsonl"), Store(folder / "scores.jsonl")
    verdicts = Store(folder / "verdicts.jsonl")
    scored = [name for name, task in plan["tasks"].items() if task["primary"] is not None]
    vectors: dict[str, dict[str, list[float | None]]] = {}
    systems: dict[str, Any] = {}
    for name, system in plan["systems"].items():
        vectors[name] = {}
        entry: dict[str, Any] = {"benchmarks": {}, **_cost(system, answers), "routing": {}}
        for task, cell in system["tasks"].items():
            if system["routed"]:
                entry["routing"][task] = _routing(cell, answers, plan["experts"])
            if task not in scored:
                entry["unanswered"] = {task: len(cell["answers"]) - len(_found(cell, answers))}
                continue
            rows = [None if key is None else scores.get(key) for key in cell["scores"]]
            primary = plan["tasks"][task]["primary"]
            vectors[name][task] = [_score(row, primary) for row in rows]
            others = {metric for row in rows if row for metric in row["scores"]} - {primary}
            entry["benchmarks"][task] = _benchmark(vectors[name][task]) | {
                "reasons": _reasons(plan["tasks"][task], cell, rows, answers),
                "metric": primary,
                "other": {metric: _other(rows, metric) for metric in sorted(others)},
            }
        if plan.get("judge") and name != plan["judge"]["against"]:
            entry["win_rate"] = _win_rate(name, plan, answers, verdicts)
        systems[name] = entry
    experts = [vectors[f"expert:{name}"] for name in plan["experts"] if f"expert:{name}" in vectors]
    if scored and len(experts) == len(plan["experts"]) > 1:
        vectors[ORACLE] = {
            task: [_best(each) for each in zip(*(e[task] for e in experts), strict=True)] for task in scored
        }
        systems[ORACLE] = {"benchmarks": {task: _benchmark(v) for task, v in vectors[ORACLE].items()}, "routing": {}}
    for name, entry in systems.items() if scored else ():
        mine = _filled(vectors[name])
        entry["average"] = _as_dict(mean_of(mine)) | {
            "unscored": sum(b["unscored"] for b in entry["benchmarks"].values())
        }
        if name != OURS and OURS in vectors:
            # On its own items: Collab answers fewer.
            ours = [found[: len(part)] for part, found in zip(mine, _filled(vectors[OURS]), strict=True)]
            entry["difference"] = _as_dict(difference_of(mine, ours))
    settings = {key: plan[key] for key in ("collection", "limit", "dtype", "base", "batch", "reward")}
    settings |= {key: plan.get(key) for key in ("judge", "collab", "held_out")}
    settings["weights"] = _weights(plan) or None
    if settings["collab"]:
        settings["collab"] |= {"cost": _collab_cost(plan, answers)}
    settings["tasks"] = {name: task["settings"] for name, task in plan["tasks"].items()}
    forced = plan.get("teacher_forced")
    return {
        "systems": systems,
        "teacher_forced": forced and forced_figures.read(forced, plan["experts"], Store(folder / "forced.jsonl")),
        "alpha_sweep": _alpha_sweep(plan, systems),
        "settings": settings,
        "not_run": plan["not_run"],
    }


def _weights(plan: dict[str, Any]) -> dict[str, Any]:
    """Digests of the collection's members and route head, those that take part in any system of the table.

    Other systems have other weights under the same names: merged ones, a router after phase 1, a variant.
    """
    own = [
        OURS,
        "router",
        "query-level",
        "uniform",
        *(f"{how}:{name}" for how in ("expert", "fixed") for name in plan["experts"]),
    ]
    found: dict[str, Any] = {}
    for name in own:
        found = {**(plan["systems"].get(name, {}).get("identity") or {}).get("weights", {}), **found}
    return found


def _alpha_sweep(plan: dict[str, Any], systems: dict[str, Any]) -> list[dict[str, Any]]:
    """FusionRoute's average by α, from `alpha:VALUE` and itself; empty if no other α was run."""
    found: dict[float, dict[str, Any]] = {}
    for name in (OURS, *(name for name in systems if name.startswith(ALPHA))):
        if "average" in systems.get(name, ()):
            alpha = float(plan["systems"][name]["identity"]["policy"]["alpha"])
            found.setdefault(alpha, {"alpha": alpha, "system": name, "average": systems[name]["average"]})
    return [found[alpha] for alpha in sorted(found)] if any(name.startswith(ALPHA) for name in systems) else []


def unscored(report: Mapping[str, Any]) -> int:
    """Items without a score or a verdict, over all systems."""
    figures = [[*entry["benchmarks"].values(), entry.get("win_rate")] for entry in report["systems"].values()]
    # Where anything is judged, a verdict that is missing counts the answer that is.
    lost = [] if win_rate_rows(report) else [entry.get("unanswered", {}) for entry in report["systems"].values()]
    return sum(found["unscored"] for each in figures for found in each if found) + sum(sum(e.values()) for e in lost)


def _score(row: dict[str, Any] | None, metric: str) -> float | None:
    return None if row is None or row["unscored"] is not None else row["scores"].get(metric)


def _reasons(
    task: Mapping[str, Any], cell: Mapping[str, Any], rows: list[dict[str, Any] | None], answers: Store
) -> dict[str, str]:
    """Of the items without a score: why."""
    found = {}
    for item, key, row in zip(task["items"], cell["answers"], rows, strict=False):  # Collab answers fewer
        if row is not None and row["unscored"] is None:
            continue
        given = None if key is None else answers.get(key)
        if key is None:
            found[item] = f"defective row: {task['defects'].get(item, 'it cannot be asked')}"
        elif given is None:
            found[item] = "not answered"
        else:
            found[item] = given["error"] or ("not scored" if row is None else row["unscored"])
    return found


def _best(scores: tuple[float | None, ...]) -> float | None:
    known = [score for score in scores if score is not None]
    return max(known) if known else None


def _filled(vectors: dict[str, list[float | None]]) -> list[list[float]]:
    return [[score or 0.0 for score in vector] for vector in vectors.values()]


def _benchmark(vector: list[float | None]) -> dict[str, Any]:
    found = proportion_of([score or 0.0 for score in vector])
    return _as_dict(found) | {"unscored": sum(score is None for score in vector)}


def _other(rows: list[dict[str, Any] | None], metric: str) -> float:
    """The mean of a metric beside the primary one, over all items; see `Score.weights`."""
    weights = [(row or {}).get("weights", {}).get(metric, 1.0) for row in rows]
    return weighted_mean([(_score(row, metric) or 0.0, weight) for row, weight in zip(rows, weights, strict=True)])


def _as_dict(estimate: Estimate) -> dict[str, Any]:
    named = {"accuracy": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n}
    return named if estimate.p is None else named | {"p": estimate.p}


def _win_rate(name: str, plan: dict[str, Any], answers: Store, verdicts: Store) -> dict[str, Any]:
    judge, task = plan["judge"], judging.TASK
    sides = [plan["systems"][each]["tasks"][task]["answers"] for each in (name, judge["against"])]
    contests = (
        judging.contest_of(*(None if key is None else answers.get(key) for key in keys))
        for keys in zip(*sides, strict=False)  # Collab answers fewer items than others
    )
    outcomes = [judging.outcome(contest, judge["identity"], verdicts) for contest in contests]
    found = proportion_of([0.5 if won is None else won for won, _ in outcomes])
    reasons = {item: why for item, (_, why) in zip(plan["tasks"][task]["items"], outcomes, strict=False) if why}
    return {
        "against": judge["against"],
        "judge": judge["name"],
        "rate": found.mean,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "unscored": len(reasons),
        "reasons": reasons,
    }


def _found(cell: dict[str, Any], answers: Store) -> list[dict[str, Any]]:
    rows = [answers.get(key) for key in cell["answers"] if key is not None]
    return [row for row in rows if row is not None and not row["error"]]


def _cost(system: dict[str, Any], answers: Store) -> dict[str, Any]:
    rows = [row for cell in system["tasks"].values() for row in _found(cell, answers)]
    tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
    return {
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "passes_per_token": sum(row["passes"] for row in rows) / max(tokens, 1),
        "mean_tokens": tokens / max(len(rows), 1),
        "cut_off": sum(row["finish"] == "length" for row in rows) / max(len(rows), 1),
    }


def _collab_cost(plan: dict[str, Any], answers: Store) -> dict[str, float]:
    """Of a token, seconds and passes, as multiples of FusionRoute's on the same items; empty without one of them."""
    sides = []
    for name in (COLLAB, OURS):
        system = plan["systems"].get(name, {"tasks": {}})
        few = {task: {"answers": cell["answers"][: plan["collab"]["limit"]]} for task, cell in system["tasks"].items()}
        sides.append(_cost({"tasks": few}, answers))
    theirs, ours = sides
    if not (theirs["tokens_per_second"] and ours["tokens_per_second"]):
        return {}
    return {
        "seconds": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "passes": theirs["passes_per_token"] / ours["passes_per_token"],
    }


def _routing(cell: dict[str, Any], answers: Store, experts: list[str]) -> dict[str, Any]:
    """Shares of the tokens, switches between tokens, and tokens at which the router overruled the expert."""
    rows = _found(cell, answers)
    tokens = sum(row["tokens"] for row in rows)
    pairs = sum(max(row["tokens"] - 1, 0) for row in rows)  # of neighbouring tokens
    written = dict.fromkeys(experts, 0)
    for row in rows:
        for expert, _, count in row["pieces"]:
            written[expert] = written.get(expert, 0) + count
    return {
        "shares": {name: count / max(tokens, 1) for name, count in written.items()},
        "switch_rate": sum(max(len(row["pieces"]) - 1, 0) for row in rows) / max(pairs, 1),
        "overruled_rate": sum(row["overruled"] for row in rows) / max(tokens, 1),
    }


def as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2, ensure_ascii=False)


def as_markdown(report: dict[str, Any]) -> str:
    """The table of the paper's shape, what it rests on, and where the tokens went."""
    tasks, judged = scored_tasks(report), win_rate_rows(report)
    rows: list[list[str]] = []
    for name, entry in report["systems"].items():
        cells = [f"**{OURS}**" if name == OURS else name]
        cells += [_accuracy(entry["benchmarks"][task]) for task in tasks]
        cells += [_accuracy(entry["average"])] if tasks else []
        if difference := entry.get("difference"):
            cells += [f"{difference['accuracy']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"]
            cells += [p_text(difference["p"])]
        elif tasks:
            cells += ["", ""]
        if judged:
            won = entry.get("win_rate")
            cells.append("" if won is None else _accuracy(won | {"accuracy": won["rate"]}))
        cost = entry.get("tokens_per_second")
        cells += ["", ""] if cost is None else [f"{cost:.0f}", f"{entry['passes_per_token']:.2f}"]
        rows.append(cells)
    lines = [
        *table(heads(report), rows),
        "",
        "Accuracy over all items asked for, with 95 % bootstrap intervals; differences are paired, item by item.",
    ]
    if report["settings"]["held_out"]:
        lines.append(HELD_OUT)
    missing = unscored(report)
    if missing:
        lines.append(
            f"{missing} items have no score and count as wrong, or no verdict and count ½; in brackets how many."
        )
    lines += unscored_notes(report) + win_rate_notes(report) + reward_notes(report)
    lines += [f"Not run: {name}: {why}." for name, why in report["not_run"].items()]
    columns, *others = beside(report)
    lines += ["", *table(columns, others)]
    routed = {name: entry["routing"] for name, entry in report["systems"].items() if entry["routing"]}
    if routed:
        experts = list(next(iter(next(iter(routed.values())).values()))["shares"])
        rows = [
            [name, task, *(f"{found['shares'].get(expert, 0):.2f}" for expert in experts)]
            + [f"{found[rate]:.2f}" for rate in ("switch_rate", "overruled_rate")]
            for name, routing in routed.items()
            for task, found in routing.items()
        ]
        lines += ["", *table(["who writes", "benchmark", *experts, "switches", "overruled"], rows)]
    if sweep := report["alpha_sweep"]:
        rows = [[f"{each['alpha']:g}", each["system"], _accuracy(each["average"])] for each in sweep]
        lines += ["", *table(["α sweep (generated)", "system", "average accuracy"], rows)]
    if report["teacher_forced"]:
        lines += forced_figures.lines(report["teacher_forced"])
    return "\n".join(lines) + "\n"


def _accuracy(found: dict[str, Any]) -> str:
    lost = f" ({found['unscored']})" if found["unscored"] else ""
    return f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{lost}"
