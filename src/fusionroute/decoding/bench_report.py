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
    ("drafting", "drafting", "{:.2f}"),
    ("GB/s", "gigabytes_per_second", "{:.1f}"),
    ("tokens/step", "tokens_per_step", "{:.2f}"),
    ("switches", "switch_rate", "{:.2f}"),
    ("run length", "route_run_length", "{:.1f}"),
    ("catch-up", "catch_up_share", "{:.2f}"),
    ("first visits, s", "prefill_seconds", "{:.2f}"),
    ("KV, MB", "kv_megabytes", "{:.0f}"),
    ("weights and KV, MB", "peak_megabytes", "{:.0f}"),
)


def render(document: dict[str, Any]) -> str:
    """Markdown: a table of the results, the conditions under it, and what else was measured."""
    about = document["conditions"]
    tokens = ", ".join(f"{new} (batch {batch})" for batch, new in about["new_tokens"].items())
    lines = [
        *table(document["results"]),
        "",
        f"Ratio: to {about['yardstick']}, in the same round on the same prompts; medians of {about['rounds']} rounds. "
        "Drafting: the same to the mode without a drafter. "
        f"{about['dtype']}, {about['threads']} threads, {about['memory_gigabytes_per_second']:.0f} GB/s of memory, "
        f"{about['prompts']} prompts, at most {tokens} new tokens, torch {about['torch']}, transformers "
        f"{about['transformers']}. Load before the start: {about['load_before']:.2f}.",
    ]
    if "looping" in document:
        lines += [
            "",
            f"{about['looping_prompts']} prompts whose answer loops, apart:",
            "",
            *table(document["looping"]),
        ]
    for row in document.get("agreement", []):
        lines += [
            "",
            f"{row['mode']}: {row['tokens']:.1%} of tokens and {row['routes']:.1%} of routes as in the reference, "
            f"logits at most {row['largest_logit_difference']:.2g} apart where the route is the same.",
        ]
    for name, times in document.get("step_milliseconds", {}).items():
        lines += ["", f"Step time as the row grows, routes {name}, ms: " + " ".join(f"{t:.1f}" for t in times)]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table of results."""
    lines = ["| " + " | ".join(name for name, _, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = ["" if row[key] is None else form.format(row[key]) for _, key, form in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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
