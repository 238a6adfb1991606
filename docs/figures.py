"""The figures of how-it-works.md, each for light and for dark pages. Drawn, not measured.

    python docs/figures.py            # into docs/images
    python docs/figures.py FOLDER     # elsewhere; a test compares

Text is drawn as outlines and nothing depends on the day, so the same matplotlib writes the same files.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK = {"light": "#24292f", "dark": "#e6e6e6"}
FAINT = {"light": "#6e7781", "dark": "#9aa4af"}
EMPTY = {"light": "#eceff3", "dark": "#353a45"}
# Of the router and three experts; white text can be read on each.
ROUTER, GENERAL, MATH, CODE = "#4f5bd5", "#3a7d44", "#b3541e", "#8e44ad"


class Canvas:
    """Axes without frame, in units of boxes, with the colours of one theme."""

    def __init__(self, theme: str, width: float, height: float) -> None:
        self.ink, self.faint, self.empty = INK[theme], FAINT[theme], EMPTY[theme]
        self.figure, self.axes = plt.subplots(figsize=(width * 0.57, height * 0.57))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")
        self.figure.subplots_adjust(0, 0, 1, 1)

    def box(self, x: float, y: float, w: float, h: float, text: str, colour: str, size: float = 9) -> None:
        patch = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.12", color=colour, linewidth=0)
        self.axes.add_patch(patch)
        self.axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color="white", fontsize=size)

    def cell(self, x: float, y: float, text: str, colour: str | None, mark: str | None = None) -> None:
        """One token's place, filled with a member's colour or empty."""
        style: dict[str, Any] = {"facecolor": colour or self.empty, "linewidth": 0}
        self.axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.72, **style))
        self.axes.text(
            x + 0.5, y + 0.4, text, ha="center", va="center", fontsize=8, color="white" if colour else self.faint
        )
        if mark is not None:
            self.axes.text(x + 0.5, y - 0.22, mark, ha="center", va="center", fontsize=8, color=self.ink)

    def text(self, x: float, y: float, text: str, *, size: float = 9, faint: bool = False, align: str = "left") -> None:
        colour = self.faint if faint else self.ink
        self.axes.text(x, y, text, ha=align, va="center", fontsize=size, color=colour, linespacing=1.4)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": self.faint, "linewidth": 1.2}
        self.axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def flow(theme: str) -> Canvas:
    """One token: router, route, expert, Eq. 1."""
    c = Canvas(theme, 15, 6.4)
    c.text(0.1, 3.1, "prompt and\ntokens so far")
    c.box(2.9, 4.2, 2.6, 1.1, "router", ROUTER, 11)
    for y, name, colour in ((2.9, "general", "#7a8490"), (1.9, "math", MATH), (0.9, "code", "#7a8490")):
        c.box(6.4, y, 2.2, 0.8, name, colour, 10)
    c.arrow((1.7, 3.7), (2.8, 4.6))
    c.arrow((2.0, 2.7), (6.3, 2.2), 0.12)
    c.arrow((4.3, 4.1), (6.3, 2.4), 0.2)
    c.text(2.3, 3.4, "scores W h:\nmath is chosen", size=8.5, faint=True)
    c.box(10.3, 2.6, 2.1, 1.1, "add\n(Eq. 1)", ROUTER, 10)
    c.arrow((5.6, 4.9), (10.8, 3.8), -0.2)
    c.text(6.4, 5.75, "the router's own logits, times α", size=8.5, faint=True)
    c.arrow((8.7, 2.3), (10.3, 2.9), 0.12)
    c.text(9.2, 1.9, "the expert's logits", size=8.5, faint=True)
    c.arrow((12.5, 3.15), (13.4, 3.15))
    c.text(13.5, 3.15, "next\ntoken")
    c.arrow((14.0, 2.5), (1.0, 2.5), -0.33)
    return c


def watermarks(theme: str) -> Canvas:
    """What each member has read of one row."""
    c = Canvas(theme, 16, 6.4)
    tokens = ["What", "is", "3", "+", "4", "?", "It", "is", "7", ".", "x", "="]
    writers = [None] * 6 + [GENERAL, GENERAL, MATH, GENERAL, CODE, CODE]
    for x, (token, writer) in enumerate(zip(tokens, writers, strict=True)):
        c.cell(x + 3.4, 5.0, token, writer)
    c.text(0.1, 5.4, "the row, by writer", size=9)
    for y, (name, colour, seen) in enumerate(
        (("code", CODE, 11), ("math", MATH, 8), ("general", GENERAL, 9), ("router", ROUTER, 11))
    ):
        level = 0.5 + y * 1.05
        c.text(0.1, level + 0.4, name)
        for x in range(12):
            c.cell(x + 3.4, level, "", colour if x < seen else None)
        c.axes.plot([seen + 3.4] * 2, [level - 0.1, level + 0.9], color=c.ink, linewidth=2)
    c.text(0.1, 0.12, "bars are watermarks: math, chosen next, reads four tokens in one pass", size=8.5, faint=True)
    return c


def rows(theme: str) -> Canvas:
    """Adapters on one base: all members as rows of one product."""
    c = Canvas(theme, 15, 5.6)
    for y, (name, colour) in enumerate((("code", CODE), ("math", MATH), ("general", GENERAL), ("router", ROUTER))):
        level = 0.6 + y * 1.05
        c.box(0.1, level, 2.6, 0.85, name, colour)
        c.arrow((2.8, level + 0.42), (4.4, level + 0.42))
        c.box(9.2, level, 2.2, 0.85, "A, B", colour)
        c.arrow((8.0, level + 0.42), (9.1, level + 0.42))
        c.arrow((11.5, level + 0.42), (12.6, level + 0.42))
        c.text(12.7, level + 0.42, "logits")
    c.box(4.5, 0.6, 3.4, 4.0, "base weights,\nread once\nfor all rows", "#5b6572", 11)
    c.text(0.1, 5.2, "the same new token, once for each member", size=9)
    c.text(9.2, 5.2, "its own LoRA is added", size=9)
    c.text(0.1, 0.15, "Whole models are the same picture with four bases, each read on its own.", size=8.5, faint=True)
    return c


def speculation(theme: str) -> Canvas:
    """Drafts are kept where they are what Eq. 1 draws."""
    c = Canvas(theme, 15, 6.2)
    draft = ["return", "a", "+", "b", "+", "c"]
    drawn = ["return", "a", "+", "b", "⏎", ""]
    writers = [CODE, CODE, CODE, CODE, GENERAL, None]
    for x, token in enumerate(draft):
        c.cell(4.4 + x * 1.3, 4.4, token, "#7a8490")
    for x, (token, writer) in enumerate(zip(drawn, writers, strict=True)):
        c.cell(4.4 + x * 1.3, 1.9, token, writer, ("=", "=", "=", "=", "≠", "")[x])
        if token:
            c.arrow((4.9 + x * 1.3, 4.35), (4.9 + x * 1.3, 2.75))
    c.text(0.1, 4.8, "drafted, at no cost\nto speak of")
    c.text(0.1, 3.55, "one pass of the router\nand of each chosen expert", faint=True, size=8.5)
    c.text(0.1, 2.3, "drawn from Eq. 1\nat each place")
    c.text(12.4, 4.8, "6 proposed", size=9)
    c.text(12.4, 2.3, "4 kept and one\ncorrection: 5 tokens", size=9)
    c.text(0.1, 0.9, "The first place that differs ends the block: its own draw stands, the rest is thrown away.",
           size=8.5, faint=True)  # fmt: skip
    c.text(0.1, 0.35, "Watermarks go back to there. So drafts change speed, and no token.", size=8.5, faint=True)
    return c


FIGURES = {"flow": flow, "watermarks": watermarks, "adapter-rows": rows, "speculation": speculation}


def main(folder: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "fusionroute", "svg.fonttype": "path", "font.family": "DejaVu Sans"})
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        for theme in INK:
            canvas = draw(theme)
            canvas.figure.savefig(folder / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None})
            plt.close(canvas.figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
