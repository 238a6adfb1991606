"""The teacher-forced part of the page: the gap to the oracle as a table, the sweep of α as small drawings."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fusionroute.evaluation.forced_figures import AVERAGE, COLUMNS, GAP, GAP_HEADS, TITLES, gap_figures, notes, shown

DRAWN = {"nll": "NLL, lower is better", "top1_disagree": "Top-1 where experts differ, higher is better"}
_WIDTH, _HEIGHT = 232, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 24, 24  # room around the axes, for their labels


def sections(found: Mapping[str, Any] | None) -> list[str]:
    """Headings, table and drawings of what `forced_figures.read` gave; nothing of nothing."""
    if not found:
        return []
    if found[AVERAGE] is None:
        return ["<p class=small>" + "<br>".join(map(escape, notes(found))) + "</p>"]
    parts = [
        "<h2>Teacher-forced: chosen against best possible</h2>",
        _table(found),
        "<p class=small>" + "<br>".join(map(escape, notes(found))) + "</p>",
        "<h2>Teacher-forced: sweep of α</h2>",
        f"<p class=small>Difference to the collection’s own α, {found['alpha']:g} (the dot), on the same tokens; the "
        "band is the 95 % bootstrap interval over items. α = 0 is the chosen expert alone.</p>",
    ]
    for measure, title in DRAWN.items():
        panels = [_panel(name, section["alpha"], measure, found["alpha"]) for name, section in shown(found).items()]
        parts.append(f"<h3>{escape(title)}</h3><div class=panels>{''.join(panels)}</div>")
    return [*parts, _sweep(found)]


def _table(found: Mapping[str, Any]) -> str:
    heads = ["", *GAP_HEADS]
    rows = ["<div class=scroll><table><tr>" + "".join(f"<th>{escape(head)}" for head in heads)]
    for measure in GAP:
        rows.append(f"<tr class=group><th colspan={len(heads)}>{escape(TITLES[measure])}")
        for task, section in shown(found).items():
            cells = [_cell(figure, form) for figure, form in gap_figures(section, measure)]
            best = section["best_expert"][measure]
            if best is not None:
                cells[list(COLUMNS).index("best_expert")] += f" <span class=small>({escape(best)})</span>"
            rows.append(f"<tr><td>{escape(task)}" + "".join(f"<td>{cell}" for cell in cells))
    return "\n".join(rows) + "</table></div>"


def _sweep(found: Mapping[str, Any]) -> str:
    rows = ["<details><summary>The figures, average of the benchmarks</summary><div class=scroll><table><tr><th>α"]
    rows[0] += "".join(f"<th>{escape(title)}" for title in TITLES.values())
    for row in found[AVERAGE]["alpha"]:
        kind = " class=ours" if row["alpha"] == found["alpha"] else ""
        rows.append(f"<tr{kind}><td>{row['alpha']:g}" + "".join(f"<td>{_cell(row[m])}" for m in TITLES))
    return "\n".join(rows) + "</table></div></details>"


def _cell(figure: Mapping[str, float] | None, form: str = ".3f") -> str:
    if figure is None:
        return "–"
    low, high = (f"{figure[side]:{form}}" for side in ("low", "high"))
    return f"{figure['value']:{form}}<br><span class=small>{low} to {high}</span>"


def _panel(name: str, rows: Sequence[Mapping[str, Any]], measure: str, own: float) -> str:
    """One benchmark's differences over α as a line in its band."""
    known = [(row["alpha"], row["difference"][measure]) for row in rows if row["difference"][measure] is not None]
    if not known:
        return ""
    right = max(alpha for alpha, _ in known) or 1.0
    values = [figure[side] for _, figure in known for side in ("value", "low", "high")]
    bottom, top = min(values), max(values)
    room = (top - bottom) * 0.05 or 0.01
    bottom, top = bottom - room, top + room

    def x(alpha: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * alpha / right

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (top - value) / (top - bottom)

    line = " ".join(f"{x(alpha):.1f},{y(figure['value']):.1f}" for alpha, figure in known)
    band = [(alpha, figure["low"]) for alpha, figure in known] + [(a, f["high"]) for a, f in reversed(known)]
    outline = " ".join(f"{x(alpha):.1f},{y(value):.1f}" for alpha, value in band)
    parts = [
        f"<svg width={_WIDTH} height={_HEIGHT} viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img>"
        f"<title>{escape(name)}</title><text x={_LEFT} y=14 font-size=13>{escape(name)}</text>"
        f"<polygon points='{outline}' class=band /><line x1={_LEFT} x2={_WIDTH - _RIGHT} y1={y(0):.1f} y2={y(0):.1f} "
        f"class=axis /><polyline points='{line}' class=curve /><circle cx={x(own):.1f} cy={y(0):.1f} r=4 class=dot />"
    ]
    for value in (top - room, 0.0, bottom + room):
        # Not where it would lie on the zero.
        if value == 0 or abs(y(value) - y(0)) > 14:
            parts.append(f"<text x={_LEFT - 6} y={y(value) + 4:.1f} text-anchor=end class=tick>{value:+.3f}</text>")
    for tick in range(5):
        alpha = right * tick / 4
        parts.append(
            f"<text x={x(alpha):.1f} y={_HEIGHT - 6} text-anchor=middle class=tick>"
            f"{'α = ' if tick == 0 else ''}{alpha:g}</text>"
        )
    return "".join(parts) + "</svg>"
