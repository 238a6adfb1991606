"""An evaluation's report as one HTML file that needs nothing else: table, intervals drawn, answers in colour."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fusionroute.evaluation.report import OURS, average_rows
from fusionroute.evaluation.store import Store
from fusionroute.files import read_json

COLOURS = ("#4c78a8", "#e0a33c", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
EXAMPLES = 2  # of each benchmark

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.ours { font-weight: 600; background: #f3f6fa; }
.scroll { overflow-x: auto; }
.small { color: #666; font-size: .85em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #fafafa; padding: .7em; border-left: 3px solid #ddd; }
.piece { border-radius: 2px; }
.key { display: inline-block; margin-right: 1em; }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .3em; vertical-align: -.1em; }
summary { cursor: pointer; }
"""


def render(report: Mapping[str, Any], folder: Path) -> str:
    """The page of the report that `report.read(folder)` gave; examples are the first answers in the folder."""
    plan = read_json(folder / "plan.json")
    colours = dict(zip([*plan["experts"], "all", "router"], COLOURS * 3, strict=False))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>FusionRoute evaluation</title><style>{STYLE}</style>",
        "<h1>FusionRoute evaluation</h1>",
        f"<p>{escape(plan['collection'].rsplit('/', 1)[-1])}, {_items(report)}.</p>",
        "<h2>Accuracy</h2>",
        _table(report),
        "<h2>Average over the benchmarks</h2>",
        _intervals(report),
        "<h2>Who writes</h2>",
        _routing(report, colours),
        "<h2>Answers, coloured by expert</h2>",
        _examples(plan, folder, colours),
        "<h2>Settings</h2>",
        _settings(report),
    ]
    return "\n".join(parts) + "\n"


def _items(report: Mapping[str, Any]) -> str:
    limit = report["settings"]["limit"]
    return "all items of each benchmark" if limit is None else f"the first {limit} items of each benchmark"


def _table(report: Mapping[str, Any]) -> str:
    tasks = list(report["settings"]["tasks"])
    rows = ["<div class=scroll><table><tr><th>system" + "".join(f"<th>{escape(task)}" for task in tasks)]
    rows[0] += "<th>average<th>− FusionRoute<th>p<th>tokens/s<th>passes/token"
    for name, entry in report["systems"].items():
        cells = [_accuracy(entry["benchmarks"][task]) for task in tasks] + [_accuracy(entry["average"])]
        difference = entry.get("difference")
        cells.append(_signed(difference) if difference else "")
        cells.append(f"{difference['p']:.3f}" if difference else "")
        cost = "tokens_per_second" in entry
        cells += [f"{entry['tokens_per_second']:.0f}", f"{entry['passes_per_token']:.2f}"] if cost else ["", ""]
        kind = " class=ours" if name == OURS else ""
        rows.append(f"<tr{kind}><td>{escape(name)}" + "".join(f"<td>{cell}" for cell in cells))
    notes = [
        "Accuracy over all items asked for with 95 % bootstrap intervals; differences paired, item by item; "
        "an item without a score counts as wrong, in brackets how many."
    ]
    notes += [f"Not run: {escape(name)}: {escape(why)}." for name, why in report["not_run"].items()]
    return "\n".join(rows) + "</table></div><p class=small>" + "<br>".join(notes) + "</p>"


def _accuracy(found: Mapping[str, Any]) -> str:
    lost = f" ({found['unscored']})" if found["unscored"] else ""
    interval = f"<br><span class=small>{found['low']:.3f}–{found['high']:.3f}</span>"
    return f"{found['accuracy']:.3f}{lost}{interval}"


def _signed(found: Mapping[str, Any]) -> str:
    return f"{found['accuracy']:+.3f}<br><span class=small>{found['low']:+.3f} to {found['high']:+.3f}</span>"


def _intervals(report: Mapping[str, Any]) -> str:
    """Averages and their intervals as one drawing, best first."""
    rows = average_rows(report)
    left, width, height = 210, 640, 24
    top = max([high for _, _, _, high in rows] + [0.01]) * 1.05
    lines = [f"<svg viewBox='0 0 {left + width + 60} {height * len(rows) + 30}' role=img width=100%>"]
    for i, (name, mean, low, high) in enumerate(rows):
        y = height * i + height / 2
        colour = "#c0392b" if name == OURS else COLOURS[0]
        a, b, m = (left + width * value / top for value in (low, high, mean))
        lines.append(
            f"<text x={left - 10} y={y + 5:.0f} text-anchor=end font-size=13>{escape(name)}</text>"
            f"<line x1={a:.1f} x2={b:.1f} y1={y} y2={y} stroke='{colour}' stroke-width=2 />"
            f"<circle cx={m:.1f} cy={y} r=4.5 fill='{colour}' />"
            f"<text x={b + 8:.1f} y={y + 5:.0f} font-size=12 fill='#666'>{mean:.3f}</text>"
        )
    base = height * len(rows) + 4
    lines.append(f"<line x1={left} x2={left + width} y1={base} y2={base} stroke='#999' />")
    for tick in range(6):
        x, value = left + width * tick / 5, top * tick / 5
        lines.append(f"<text x={x:.0f} y={base + 16} text-anchor=middle font-size=11 fill='#666'>{value:.2f}</text>")
    return "\n".join(lines) + "</svg>"


def _routing(report: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    routed = [(name, task, f) for name, e in report["systems"].items() for task, f in e["routing"].items()]
    if not routed:
        return "<p>No routed system was run.</p>"
    rows = [_key(routed[0][2]["shares"], colours), "<table><tr><th>system<th>benchmark<th>tokens by expert"]
    rows[-1] += "<th>switches<th>overruled"
    for name, task, found in routed:
        bar = "".join(
            f"<rect x={260 * sum(list(found['shares'].values())[:i]):.1f} width={260 * share:.1f} height=14 "
            f"fill='{colours.get(expert, '#999')}'><title>{escape(expert)} {share:.2f}</title></rect>"
            for i, (expert, share) in enumerate(found["shares"].items())
        )
        rows.append(
            f"<tr><td>{escape(name)}<td>{escape(task)}<td><svg width=260 height=14>{bar}</svg>"
            f"<td>{found['switch_rate']:.2f}<td>{found['overruled_rate']:.2f}"
        )
    return "<div class=scroll>" + "\n".join(rows) + "</table></div>"


def _key(names: Sequence[str] | Mapping[str, Any], colours: Mapping[str, str]) -> str:
    marks = (f"<span class=key><i style='background:{colours.get(n, '#999')}'></i>{escape(n)}</span>" for n in names)
    return "<p>" + "".join(marks) + "</p>"


def _examples(plan: Mapping[str, Any], folder: Path, colours: Mapping[str, str]) -> str:
    system = plan["systems"].get(OURS)
    if system is None:
        return f"<p>{OURS} was not run.</p>"
    answers, scores = Store(folder / "answers.jsonl"), Store(folder / "scores.jsonl")
    parts = [_key(plan["experts"], colours)]
    for task, cell in system["tasks"].items():
        shown = 0
        for answer_key, score_key in zip(cell["answers"], cell["scores"], strict=True):
            row = answers.get(answer_key) if answer_key else None
            if row is None or row["error"] or shown == EXAMPLES:
                continue
            shown += 1
            score = scores.get(score_key) if score_key else None
            value = "no score" if score is None else f"{plan['tasks'][task]['primary']} "
            if score is not None:
                found = score["scores"].get(plan["tasks"][task]["primary"])
                value = score["unscored"] or f"{plan['tasks'][task]['primary']} {found:g}"
            text = "".join(
                f"<span class=piece style='background:{colours.get(expert, '#999')}33' title='{escape(expert)}'>"
                f"{escape(piece)}</span>"
                for expert, piece, _ in row["pieces"]
            )
            parts.append(
                f"<details {'open' if shown == 1 else ''}><summary>{escape(task)} {escape(str(row['item']))}: "
                f"{escape(value)}</summary><pre class=small>{escape(row['prompt'])}</pre><pre>{text}</pre></details>"
            )
    return "\n".join(parts)


def _settings(report: Mapping[str, Any]) -> str:
    rows = ["<table>"]
    flat = {name: value for name, value in report["settings"].items() if name not in ("tasks", "collection")}
    for task, found in report["settings"]["tasks"].items():
        flat |= {f"{task}: {name}": value for name, value in found.items()}
    rows += [
        f"<tr><td>{escape(name)}<td style='white-space:pre-wrap;text-align:left'>{escape(str(value))}"
        for name, value in flat.items()
    ]
    return "\n".join(rows) + "</table>"
