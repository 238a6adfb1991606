"""What a report's table and its page both say: columns, rows in order, and notes on what the figures rest on."""

from collections.abc import Mapping
from typing import Any

from fusionroute.evaluation.names import FINETUNED

HELD_OUT = "The items are rows held out of training, to choose settings by; test items are others."
_NAMED = 10  # items without a score or a verdict that a note names; the JSON names all


def scored_tasks(report: Mapping[str, Any]) -> list[str]:
    """The benchmarks that have an accuracy."""
    return [name for name, settings in report["settings"]["tasks"].items() if settings["primary"] is not None]


def heads(report: Mapping[str, Any]) -> list[str]:
    """The columns of the table."""
    tasks = scored_tasks(report)
    found = ["system", *tasks, *(["average", "− FusionRoute", "p"] if tasks else [])]
    return [*found, *(["win rate"] if win_rate_rows(report) else []), "tokens/s", "passes/token"]


def average_rows(report: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """(system, average, low, high), the best first."""
    found = [(name, entry["average"]) for name, entry in report["systems"].items() if "average" in entry]
    return sorted(((n, a["accuracy"], a["low"], a["high"]) for n, a in found), key=lambda row: -row[1])


def win_rate_rows(report: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """(system, win rate, low, high), the best first; empty if nothing was judged."""
    found = [(name, entry["win_rate"]) for name, entry in report["systems"].items() if "win_rate" in entry]
    return sorted(((n, w["rate"], w["low"], w["high"]) for n, w in found), key=lambda row: -row[1])


def beside(report: Mapping[str, Any]) -> list[list[str]]:
    """What the table leaves out, heads first: every other metric, answers cut off and their length."""
    tasks = scored_tasks(report)
    metrics: dict[str, list[str]] = {}
    for task in tasks:
        others = [entry["benchmarks"].get(task, {}).get("other", ()) for entry in report["systems"].values()]
        metrics[task] = sorted({metric for each in others for metric in each})
    rows = [["system", *(f"{task} {m}" for task in tasks for m in metrics[task]), "cut off", "tokens/answer"]]
    for name, entry in report["systems"].items():
        if "cut_off" not in entry:
            continue
        cells = [entry["benchmarks"][task]["other"].get(m) for task in tasks for m in metrics[task]]
        rows.append([name, *("" if value is None else f"{value:.3f}" for value in cells)])
        rows[-1] += [f"{entry['cut_off']:.0%}", f"{entry['mean_tokens']:.0f}"]
    return rows


def unscored_notes(report: Mapping[str, Any]) -> list[str]:
    """Which items have no score, and why."""
    return [
        f"No score for {name} on {task}, {each}."
        for name, entry in report["systems"].items()
        for task, found in entry["benchmarks"].items()
        for each in _named(found.get("reasons", {}))
    ]


def win_rate_notes(report: Mapping[str, Any]) -> list[str]:
    """What the win rates rest on, and which items have no verdict."""
    judge = report["settings"]["judge"]
    if not judge:
        return []
    accuracy = "" if judge["held_out"] is None else f"; {judge['held_out']}"
    offline = "reward" in judge["identity"]
    how = "a reward model, the higher score wins" if offline else "asked in both orders, a split counts ½"
    notes = [f"Win rate against {judge['against']} on general prompts; judge: {judge['name']} ({how}{accuracy})."]
    if FINETUNED not in report["systems"]:
        notes.append(f"The paper's win rates are against {FINETUNED}, which was not run.")
    for name, entry in report["systems"].items():
        reasons = entry.get("win_rate", {}).get("reasons", {})
        notes += [f"No verdict for {name}, {each}." for each in _named(reasons)]
    return notes


def reward_notes(report: Mapping[str, Any]) -> list[str]:
    """What leans on a reward model and how good that is, what Collab did and cost, and answers that nobody judged."""
    notes = []
    if reward := report["settings"]["reward"]:
        how_good = reward["held_out"] or "its accuracy on held-out pairs is unknown"
        notes.append(f"Reward model of {' and '.join(reward['systems'])}: {reward['source']}; {how_good}.")
    if collab := report["settings"]["collab"]:
        knobs = ", ".join(f"{key} {value}" for key, value in collab.items() if key not in ("limit", "cost"))
        notes.append(f"Collab ({knobs}) answers the first {collab['limit']} items of each benchmark.")
        if cost := collab["cost"]:
            notes.append(
                f"A token of Collab's costs {cost['seconds']:.1f} times the seconds and {cost['passes']:.1f} times the "
                f"passes of one of FusionRoute's on the same items ({collab['rows']} rows at a time against "
                f"{report['settings']['batch']}; the reward model's passes are in the seconds alone)."
            )
    for name, entry in report["systems"].items():
        lost = {task: count for task, count in entry.get("unanswered", {}).items() if count}
        if lost and not win_rate_rows(report):
            notes += [f"{name} has no answer to {count} items of {task}." for task, count in lost.items()]
    return notes


def _named(reasons: Mapping[str, str]) -> list[str]:
    """Items by reason, a text for each."""
    by_reason: dict[str, list[str]] = {}
    for item, why in reasons.items():
        by_reason.setdefault(why, []).append(item)
    return [
        f"items {', '.join(items[:_NAMED])}{f' and {len(items) - _NAMED} more' if len(items) > _NAMED else ''}: {why}"
        for why, items in by_reason.items()
    ]


def p_text(value: float) -> str:
    """A p-value, as 10,000 draws know it."""
    return "< 0.001" if value < 0.0005 else f"{value:.3f}"
