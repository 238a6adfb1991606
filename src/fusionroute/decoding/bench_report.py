"""The decoding benchmark's document as a table and as a picture."""

from pathlib import Path
from typing import Any

from fusionroute.errors import UsageError

COLUMNS = (
    ("batch", "batch", "{}"),
    ("mode", "mode", "{}"),
    ("drafter", "drafter", "{}"),
    ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("ratio", "ratio", "{:.2f}"),
    ("GB/s", "gigabytes_per_second", "{:.1f}"),
    ("tokens/step", "tokens_per_step", "{:.2f}"),
    ("switches", "switch_rate", "{:.2f}"),
    ("run length", "route_run_length", "{:.1f}"),
    ("first visits, s", "prefill_seconds", "{:.2f}"),
    ("KV, MB", "kv_megabytes", "{:.0f}"),
)


def render(document: dict[str, Any]) -> str:
    """A Markdown table of the results, and the conditions under it."""
    lines = ["| " + " | ".join(name for name, _, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in document["results"]:
        cells = [form.format("" if row[key] is None else row[key]) for _, key, form in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    about = document["conditions"]
    lines += [
        "",
        f"Ratio: to {about['yardstick']}, of the same round; medians. {about['dtype']}, {about['threads']} threads, "
        f"{about['memory_gigabytes_per_second']:.0f} GB/s of memory, {about['prompts']} prompts, at most "
        f"{about['new_tokens']} new tokens; {about['looping_answers_left_out']} prompts left out whose answer loops.",
    ]
    for name, times in document.get("step_milliseconds", {}).items():
        lines.append(f"Milliseconds of a step as the row grows, routes {name}: " + " ".join(f"{t:.1f}" for t in times))
    return "\n".join(lines) + "\n"


def plot(document: dict[str, Any], path: Path) -> None:
    """Bars of every variant's ratio, one panel per batch.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'fusionroute[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({row["batch"] for row in document["results"]})
    figure, panels = pyplot.subplots(1, len(batches), figsize=(5.2 * len(batches), 5), sharey=True, squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        rows = [row for row in document["results"] if row["batch"] == batch][::-1]
        names = [row["mode"] + (f" + {row['drafter']}" if row["drafter"] else "") for row in rows]
        panel.barh(names, [row["ratio"] for row in rows], color="#4c78a8")
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(f"batch {batch}")
        panel.set_xlabel("tokens/s ÷ one expert alone in transformers")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
