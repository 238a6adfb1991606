"""What an evaluation found, from its results folder alone: figures first, then ways of showing them. Loads no model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.statistics import Estimate, difference_of, mean_of
from fusionroute.evaluation.store import Store
from fusionroute.files import read_json

OURS = "fusionroute"
ORACLE = "oracle"  # of the experts, the one that does best on the prompt, in hindsight


def read(folder: Path) -> dict[str, Any]:
    """The whole report.

    Returns:
        `{"systems": {NAME: {"benchmarks": {TASK: {"accuracy", "low", "high", "n", "unscored", "other": {…}}},
        "average": {…}, "difference": {…}, "tokens_per_second", "passes_per_token", "mean_tokens", "cut_off",
        "routing": {TASK: {"shares", "switch_rate", "overruled_rate"}}}}, "settings": {…}, "not_run": {NAME: why}}`.
        Accuracies are of all items asked for: one without a score counts as wrong, and in `unscored`. `difference` is
        to FusionRoute, item by item, with a p-value.

    Raises:
        FusionRouteError: the folder holds no evaluation.
    """
    if not (folder / "plan.json").is_file():
        raise FusionRouteError(
            f"{folder} holds no evaluation (no plan.json): run `fusionroute evaluate --out {folder}`"
        )
    plan = read_json(folder / "plan.json")
    answers, scores = Store(folder / "answers.jsonl"), Store(folder / "scores.jsonl")
    vectors: dict[str, dict[str, list[float | None]]] = {}
    systems: dict[str, Any] = {}
    for name, system in plan["systems"].items():
        vectors[name] = {}
        entry: dict[str, Any] = {"benchmarks": {}, **_cost(system, answers), "routing": {}}
        for task, cell in system["tasks"].items():
            rows = [None if key is None else scores.get(key) for key in cell["scores"]]
            primary = plan["tasks"][task]["primary"]
            vectors[name][task] = [_score(row, primary) for row in rows]
            others = {metric for row in rows if row for metric in row["scores"]} - {primary}
            entry["benchmarks"][task] = _benchmark(vectors[name][task]) | {
                "metric": primary,
                "other": {m: _benchmark([_score(row, m) for row in rows])["accuracy"] for m in sorted(others)},
            }
            if system["routed"]:
                entry["routing"][task] = _routing(cell, answers, plan["experts"])
        systems[name] = entry
    experts = [vectors[f"expert:{name}"] for name in plan["experts"] if f"expert:{name}" in vectors]
    if len(experts) == len(plan["experts"]) > 1:
        vectors[ORACLE] = {
            task: [_best(each) for each in zip(*(e[task] for e in experts), strict=True)] for task in plan["tasks"]
        }
        systems[ORACLE] = {"benchmarks": {task: _benchmark(v) for task, v in vectors[ORACLE].items()}, "routing": {}}
    for name, entry in systems.items():
        mine = _filled(vectors[name])
        entry["average"] = _as_dict(mean_of(mine)) | {
            "unscored": sum(b["unscored"] for b in entry["benchmarks"].values())
        }
        if name != OURS and OURS in vectors:
            entry["difference"] = _as_dict(difference_of(mine, _filled(vectors[OURS])))
    settings = {key: plan[key] for key in ("collection", "limit", "dtype", "batch", "reward")}
    settings["tasks"] = {name: task["settings"] for name, task in plan["tasks"].items()}
    return {"systems": systems, "settings": settings, "not_run": plan["not_run"]}


def unscored(report: dict[str, Any]) -> int:
    """Items without a score, over all systems."""
    return sum(entry["average"]["unscored"] for entry in report["systems"].values())


def average_rows(report: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """(system, average, low, high), the best first."""
    found = [(name, entry["average"]) for name, entry in report["systems"].items()]
    return sorted(((n, a["accuracy"], a["low"], a["high"]) for n, a in found), key=lambda row: -row[1])


def _score(row: dict[str, Any] | None, metric: str) -> float | None:
    return None if row is None or row["unscored"] is not None else row["scores"].get(metric)


def _best(scores: tuple[float | None, ...]) -> float | None:
    known = [score for score in scores if score is not None]
    return max(known) if known else None


def _filled(vectors: dict[str, list[float | None]]) -> list[list[float]]:
    return [[score or 0.0 for score in vector] for vector in vectors.values()]


def _benchmark(vector: list[float | None]) -> dict[str, Any]:
    found = mean_of([[score or 0.0 for score in vector]])
    return _as_dict(found) | {"unscored": sum(score is None for score in vector)}


def _as_dict(estimate: Estimate) -> dict[str, Any]:
    named = {"accuracy": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n}
    return named if estimate.p is None else named | {"p": estimate.p}


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


def _routing(cell: dict[str, Any], answers: Store, experts: list[str]) -> dict[str, Any]:
    """Shares of the tokens, switches between tokens, and tokens at which the router overruled the expert."""
    rows = _found(cell, answers)
    tokens = sum(row["tokens"] for row in rows)
    written = dict.fromkeys(experts, 0)
    for row in rows:
        for expert, _, count in row["pieces"]:
            written[expert] = written.get(expert, 0) + count
    return {
        "shares": {name: count / max(tokens, 1) for name, count in written.items()},
        "switch_rate": sum(max(len(row["pieces"]) - 1, 0) for row in rows) / max(tokens - len(rows), 1),
        "overruled_rate": sum(row["overruled"] for row in rows) / max(tokens, 1),
    }


def as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2, ensure_ascii=False)


def as_markdown(report: dict[str, Any]) -> str:
    """The table of the paper's shape, what it rests on, and where the tokens went."""
    tasks = list(report["settings"]["tasks"])
    lines = [
        "| system | " + " | ".join(tasks) + " | average | − FusionRoute | p | tokens/s | passes/token |",
        "|---" * (len(tasks) + 6) + "|",
    ]
    for name, entry in report["systems"].items():
        cells = [_accuracy(entry["benchmarks"][task]) for task in tasks]
        cells.append(_accuracy(entry["average"]))
        if difference := entry.get("difference"):
            cells += [f"{difference['accuracy']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"]
            cells += [f"{difference['p']:.3f}"]
        else:
            cells += ["", ""]
        cost = entry.get("tokens_per_second")
        cells += ["", ""] if cost is None else [f"{cost:.0f}", f"{entry['passes_per_token']:.2f}"]
        lines.append(f"| {'**fusionroute**' if name == OURS else name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Accuracy over all items asked for, with 95 % bootstrap intervals; differences are paired, item by item.",
    ]
    missing = unscored(report)
    if missing:
        lines.append(f"{missing} items have no score and count as wrong; in brackets how many.")
    if reward := report["settings"]["reward"]:
        lines.append(f"Reward model of sequence-selection: {reward['source']}, on held-out pairs {reward['accuracy']}.")
    lines += [f"Not run: {name}: {why}." for name, why in report["not_run"].items()]
    routed = {name: entry for name, entry in report["systems"].items() if entry["routing"]}
    if routed:
        experts = list(next(iter(next(iter(routed.values()))["routing"].values()))["shares"])
        lines += ["", "| who writes | benchmark | " + " | ".join(experts) + " | switches | overruled |"]
        lines.append("|---" * (len(experts) + 4) + "|")
        for name, entry in routed.items():
            for task, found in entry["routing"].items():
                shares = " | ".join(f"{found['shares'].get(expert, 0):.2f}" for expert in experts)
                lines.append(
                    f"| {name} | {task} | {shares} | {found['switch_rate']:.2f} | {found['overruled_rate']:.2f} |"
                )
    return "\n".join(lines) + "\n"


def _accuracy(found: dict[str, Any]) -> str:
    lost = f" ({found['unscored']})" if found["unscored"] else ""
    return f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{lost}"
