"""An evaluation's report as one HTML file that needs nothing else: table, intervals drawn, answers in colour."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fusionroute.evaluation import page_forced
from fusionroute.evaluation.names import OURS
from fusionroute.evaluation.report_notes import (
    HELD_OUT,
    average_rows,
    beside,
    heads,
    p_text,
    reward_notes,
    scored_tasks,
    unscored_notes,
    win_rate_notes,
    win_rate_rows,
)
from fusionroute.evaluation.store import Store
from fusionroute.files import read_json

COLOURS = ("#4c78a8", "#e0a33c", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
EXAMPLES = 2  # of each benchmark

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #5f6368; --paper: #fff; --rule: #ddd; --shade: #f5f6f8;
  --ours: #eaf1fa; --mark: #c0392b; --line: #3d6a9e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --soft: #a3a7ad; --paper: #17191c; --rule: #3a3d42;
  --shade: #212429; --ours: #22324a; --mark: #ff7b6b; --line: #8ab4e8; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: var(--ink);
  background: var(--paper); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .55em; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.ours { font-weight: 600; background: var(--ours); }
tr.group th { padding-top: 1em; }
.scroll { overflow-x: auto; }
.scroll td:first-child { position: sticky; left: 0; background: var(--paper); }
.scroll tr.ours td:first-child { background: var(--ours); }
.small { color: var(--soft); font-size: .85em; font-weight: normal; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--shade); padding: .7em;
  border-left: 3px solid var(--rule); }
.piece { border-radius: 2px; }
.key { display: inline-block; margin-right: 1em; }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .3em; vertical-align: -.1em; }
summary { cursor: pointer; }
svg text { fill: var(--ink); }
svg .soft { fill: var(--soft); }
svg .tick { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .curve { fill: none; stroke: var(--line); stroke-width: 2; }
svg .band { fill: var(--line); opacity: .18; }
svg .dot { fill: var(--mark); }
svg .theirs { fill: var(--line); stroke: var(--line); stroke-width: 2; }
svg .ours { fill: var(--mark); stroke: var(--mark); stroke-width: 2; }
.drawing { min-width: 640px; max-width: 910px; display: block; }
.panels { display: flex; flex-wrap: wrap; gap: .5em; }
.settings td { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
.settings td + td { text-align: left; }
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
        _beside(report),
        *_drawn("Average over the benchmarks", average_rows(report)),
        *_drawn("Win rates", win_rate_rows(report), *win_rate_notes(report)),
        *_drawn("Average accuracy by α", _by_alpha(report)),
        *page_forced.sections(report["teacher_forced"]),
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


def _by_alpha(report: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    found = ((f"α = {row['alpha']:g}", row["average"]) for row in report["alpha_sweep"])
    return [(name, average["accuracy"], average["low"], average["high"]) for name, average in found]


def _table(report: Mapping[str, Any]) -> str:
    tasks, judged = scored_tasks(report), win_rate_rows(report)
    rows = ["<div class=scroll><table><tr>" + "".join(f"<th>{escape(head)}" for head in heads(report))]
    for name, entry in report["systems"].items():
        cells = [_accuracy(entry["benchmarks"][task]) for task in tasks]
        if tasks:
            difference = entry.get("difference")
            cells += [_accuracy(entry["average"]), _signed(difference) if difference else ""]
            cells += [escape(p_text(difference["p"])) if difference else ""]
        if judged:
            won = entry.get("win_rate")
            cells.append(_accuracy({**won, "accuracy": won["rate"]}) if won else "")
        cost = "tokens_per_second" in entry
        cells += [f"{entry['tokens_per_second']:.0f}", f"{entry['passes_per_token']:.2f}"] if cost else ["", ""]
        kind = " class=ours" if name == OURS else ""
        rows.append(f"<tr{kind}><td>{escape(name)}" + "".join(f"<td>{cell}" for cell in cells))
    notes = [
        "Accuracy over all items asked for with 95 % bootstrap intervals; differences paired, item by item; "
        "an item without a score counts as wrong, one without a verdict ½; in brackets how many."
    ]
    notes += [HELD_OUT] if report["settings"]["held_out"] else []
    notes += [escape(note) for note in unscored_notes(report) + reward_notes(report)]
    notes += [f"Not run: {escape(name)}: {escape(why)}." for name, why in report["not_run"].items()]
    return "\n".join(rows) + "</table></div><p class=small>" + "<br>".join(notes) + "</p>"


def _beside(report: Mapping[str, Any]) -> str:
    columns, *rows = beside(report)
    lines = ["<details><summary>Other metrics, lengths</summary><div class=scroll><table><tr>"]
    lines += [f"<th>{escape(head)}" for head in columns]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    return "".join(lines) + "</table></div></details>"


def _accuracy(found: Mapping[str, Any]) -> str:
    lost = f" ({found['unscored']})" if found["unscored"] else ""
    interval = f"<br><span class=small>{found['low']:.3f}–{found['high']:.3f}</span>"
    return f"{found['accuracy']:.3f}{lost}{interval}"


def _signed(found: Mapping[str, Any]) -> str:
    return f"{found['accuracy']:+.3f}<br><span class=small>{found['low']:+.3f} to {found['high']:+.3f}</span>"


def _drawn(title: str, rows: Sequence[tuple[str, float, float, float]], *notes: str) -> list[str]:
    """A section with (system, mean, low, high) as a drawing; nothing without rows."""
    if not rows:
        return []
    small = "<p class=small>" + "<br>".join(map(escape, notes)) + "</p>"
    return [f"<h2>{escape(title)}</h2>", _intervals(rows), *([small] if notes else [])]


def _intervals(rows: Sequence[tuple[str, float, float, float]]) -> str:
    left, width, height = 210, 640, 24
    top = max([high for _, _, _, high in rows] + [0.01]) * 1.05
    lines = [
        f"<div class=scroll><svg viewBox='0 0 {left + width + 60} {height * len(rows) + 30}' role=img class=drawing>"
    ]
    for i, (name, mean, low, high) in enumerate(rows):
        y = height * i + height / 2
        kind = "ours" if name == OURS else "theirs"
        a, b, m = (left + width * value / top for value in (low, high, mean))
        lines.append(
            f"<text x={left - 10} y={y + 5:.0f} text-anchor=end font-size=13>{escape(name)}</text>"
            f"<line x1={a:.1f} x2={b:.1f} y1={y} y2={y} class={kind} />"
            f"<circle cx={m:.1f} cy={y} r=4 class={kind} />"
            f"<text x={b + 8:.1f} y={y + 5:.0f} font-size=12 class=soft>{mean:.3f}</text>"
        )
    base = height * len(rows) + 4
    lines.append(f"<line x1={left} x2={left + width} y1={base} y2={base} class=axis />")
    step = next(size for size in (0.01, 0.02, 0.05, 0.1, 0.2) if top / size <= 10)
    for tick in range(int(top / step) + 1):
        x = left + width * tick * step / top
        lines.append(f"<text x={x:.0f} y={base + 16} text-anchor=middle class=tick>{tick * step:.2f}</text>")
    return "\n".join(lines) + "</svg></div>"


def _routing(report: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    routed = {name: entry["routing"] for name, entry in report["systems"].items() if entry["routing"]}
    if not routed:
        return "<p>No routed system was run.</p>"
    tasks = list(report["settings"]["tasks"])
    experts = dict.fromkeys(expert for each in routed.values() for f in each.values() for expert in f["shares"])
    rows = [_key(experts, colours) + "<div class=scroll><table><tr><th>system"]
    rows[0] += "".join(f"<th>{escape(task)}" for task in tasks)
    for name, each in routed.items():
        cells = "".join(f"<td>{_shares(each[task], colours) if task in each else ''}" for task in tasks)
        rows.append(f"<tr{' class=ours' if name == OURS else ''}><td>{escape(name)}{cells}")
    note = "Tokens by expert; under them how often the expert changes and how often the router overrules it, per token."
    return "\n".join(rows) + f"</table></div><p class=small>{note}</p>"


def _shares(found: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """A bar of the experts' shares, and the rates of switching and overruling."""
    width, left, parts = 120, 0.0, []
    for expert, share in found["shares"].items():
        parts.append(
            f"<rect x={left:.1f} width={width * share:.1f} height=12 fill='{colours.get(expert, '#999')}'>"
            f"<title>{escape(expert)} {share:.2f}</title></rect>"
        )
        left += width * share
    rates = f"{found['switch_rate']:.2f} · {found['overruled_rate']:.2f}"
    return f"<svg width={width} height=12>{''.join(parts)}</svg><br><span class=small>{rates}</span>"


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
            value, metric = "no score", plan["tasks"][task]["primary"]
            if score is not None:
                # What a judge compares has no score of its own.
                value = score["unscored"] or (f"{metric} {score['scores'].get(metric):g}" if metric else "")
            title = f"{task} {row['item']}" + (f": {value}" if value else "")
            text = "".join(
                f"<span class=piece style='background:{colours.get(expert, '#999')}66' title='{escape(expert)}'>"
                f"{escape(piece)}</span>"
                for expert, piece, _ in row["pieces"]
            )
            parts.append(
                f"<details {'open' if shown == 1 else ''}><summary>{escape(title)}</summary>"
                f"<pre class=small>{escape(row['prompt'])}</pre><pre>{text}</pre></details>"
            )
    return "\n".join(parts)


def _settings(report: Mapping[str, Any]) -> str:
    rows = ["<div class=scroll><table class=settings>"]
    flat = {n: value for n, value in report["settings"].items() if n not in ("tasks", "collection", "judge")}
    flat |= {f"judge: {name}": value for name, value in (report["settings"]["judge"] or {}).items()}
    for task, found in report["settings"]["tasks"].items():
        flat |= {f"{task}: {name}": value for name, value in found.items()}
    rows += [f"<tr><td>{escape(name)}<td>{escape(str(value))}" for name, value in flat.items()]
    return "\n".join(rows) + "</table></div>"
