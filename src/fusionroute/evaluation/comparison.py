"""Whether a report agrees with a published one: figure by figure, by the intervals of the published. Loads no model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.markdown import table
from fusionroute.evaluation.report import unscored
from fusionroute.files import read_json


def read(path: Path) -> dict[str, Any]:
    """A report that `report --json` wrote.

    Raises:
        FusionRouteError: a file that is no report.
    """
    found = read_json(path)
    parts = [found.get(key) for key in ("systems", "settings")] if isinstance(found, dict) else [None]
    if not (all(isinstance(part, dict) for part in parts) and "tasks" in found["settings"]):
        raise FusionRouteError(f"{path} is no report: `fusionroute report FOLDER --json` writes one")
    return found


def compare(published: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the systems that both have, on the benchmarks that both asked alike.

    Returns:
        `{"figures": [{"system", "figure": TASK, "average" or "win rate", "published": {"value", "low", "high", "n"},
        "found": {…}, "inside": whether the found value is within the published interval}], "notes": [what else
        differs]}`. An average is compared where it is over the same benchmarks, a win rate where it is against the same
        system by the same judge.

    Raises:
        FusionRouteError: there is no such figure.
    """
    notes = []
    ours, theirs = published["settings"], found["settings"]
    alike = []
    for task, settings in ours["tasks"].items():
        if task in theirs["tasks"]:
            other = theirs["tasks"][task]
            differing = [key for key in settings if key not in _RUNTIME and settings[key] != other.get(key)]
            if differing:
                notes.append(f"{task} is not compared, since it was not asked alike: {', '.join(differing)}")
            else:
                alike.append(task)
    digests = theirs.get("weights") or {}
    if members := [name for name, own in (ours.get("weights") or {}).items() if digests.get(name, own) != own]:
        notes.append(f"the weights are others: {', '.join(members)}")
    if missing := unscored(found):
        notes.append(f"{missing} items have no score here and count as wrong, or no verdict and count ½")
    notes += [
        f"{key} is {theirs.get(key)} here and {ours[key]} in the published report"
        for key in ("limit", "dtype", "held_out")
        if ours.get(key) != theirs.get(key)
    ]
    both = [name for name in published["systems"] if name in found["systems"]]
    figures = [
        {
            "system": name,
            "figure": figure,
            "published": old,
            "found": new,
            "inside": old["low"] <= new["value"] <= old["high"],
        }
        for name in both
        for figure, old, new in _figures(published, found, name, alike)
    ]
    if not figures:
        why = "; ".join(notes) or f"its systems are {', '.join(published['systems'])}"
        raise FusionRouteError(f"there is nothing to compare with the published report: {why}")
    return {"figures": figures, "notes": notes}


_RUNTIME = ("packages", "python", "limits")  # of a benchmark's settings: where it ran


def _figures(
    published: Mapping[str, Any], found: Mapping[str, Any], name: str, alike: list[str]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    old, new = published["systems"][name], found["systems"][name]
    for task in alike:
        if task in old["benchmarks"] and task in new["benchmarks"]:
            yield task, _estimate(old["benchmarks"][task]), _estimate(new["benchmarks"][task])
    if "average" in old and "average" in new and set(old["benchmarks"]) == set(new["benchmarks"]) <= set(alike):
        yield "average", _estimate(old["average"]), _estimate(new["average"])
    if "win_rate" in old and "win_rate" in new:
        judges = [(report["settings"]["judge"]["identity"], report["settings"]["judge"]["against"])
                  for report in (published, found)]  # fmt: skip
        if judges[0] == judges[1]:
            yield "win rate", _estimate(old["win_rate"]), _estimate(new["win_rate"])


def _estimate(entry: Mapping[str, Any]) -> dict[str, Any]:
    value = entry["accuracy"] if "accuracy" in entry else entry["rate"]
    return {"value": value, **{key: entry[key] for key in ("low", "high", "n")}}


def outside(comparison: Mapping[str, Any]) -> int:
    """Figures that are not within their published intervals."""
    return sum(not figure["inside"] for figure in comparison["figures"])


def as_json(comparison: Mapping[str, Any]) -> str:
    return json.dumps(comparison, indent=2, ensure_ascii=False)


def as_markdown(comparison: Mapping[str, Any]) -> str:
    """A line for each figure, then how many agree and what else differs."""
    rows = [
        [
            *(each["system"], each["figure"], _text(each["published"]), _text(each["found"])),
            "inside" if each["inside"] else "**outside**",
        ]
        for each in comparison["figures"]
    ]
    count, out = len(rows), outside(comparison)
    lines = [*table(["system", "figure", "published", "here", "published interval"], rows), ""]
    lines.append(f"{count - out} of {count} figures are within the published 95 % intervals.")
    lines += [f"Note: {note}." for note in comparison["notes"]]
    return "\n".join(lines)


def _text(estimate: Mapping[str, Any]) -> str:
    value, low, high, n = (estimate[key] for key in ("value", "low", "high", "n"))
    return f"{value:.3f} [{low:.3f}, {high:.3f}] of {n}"
