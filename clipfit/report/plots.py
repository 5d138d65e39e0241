"""Curves as pictures: SVG that takes its colours from the page that it stands in, or PNG. All of matplotlib is here."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipfit.errors import UsageError
from clipfit.measure.curves import LossCurve, Point
from clipfit.measure.reliability import Bin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Drawing = Callable[["Axes", "Palette"], None]
SIZE = (4.4, 2.9)  # inches; 72 to one are a pixel of the SVG, so that letters have their size on a phone
RC = {
    "svg.hashsalt": "clipfit", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "lines.linewidth": 1.8,
    "legend.frameon": False, "legend.fontsize": 9, "axes.labelsize": 9.5,
}  # fmt: skip


@dataclass(frozen=True)
class Palette:
    """Colours by what they stand for."""

    ink: str
    faint: str
    first: str
    second: str


# of SVG: no colours but places for them, which the page's own take
HELD = Palette("#010101", "#020202", "#030303", "#040404")
VARIABLES = {HELD.ink: "currentColor", HELD.faint: "var(--line)", HELD.first: "var(--first)",
             HELD.second: "var(--second)"}  # fmt: skip
PRINTED = Palette("#222222", "#d5d8de", "#1f6fc4", "#c45a00")


def require_installed() -> None:
    """Raises UsageError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a report needs matplotlib, which cannot be imported here: pip install 'clipfit[report]'.")


def svg(draw: Drawing) -> str:
    """An `<svg>` to stand within a page, its colours `currentColor` and the page's variables. The same each time."""
    text = _drawn(draw, HELD, "svg").decode("utf-8")
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"| (?:width|height)="[\d.]+pt"| version="1.1"', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # figure_1, axes_1: the same in every picture of a page
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    for held, variable in VARIABLES.items():
        text = text.replace(held, variable)
    return text


def png(draw: Drawing) -> bytes:
    """The same on white, for slides."""
    return _drawn(draw, PRINTED, "png")


def _drawn(draw: Drawing, palette: Palette, form: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        **matplotlib.rcParamsDefault, **RC, "backend": "agg",
        "text.color": palette.ink, "axes.edgecolor": palette.ink, "axes.labelcolor": palette.ink,
        "xtick.color": palette.ink, "ytick.color": palette.ink,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(color=palette.faint, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes, palette)
        data = io.BytesIO()
        if form == "svg":
            figure.savefig(data, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(data, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def accuracies(
    test: Sequence[Point], folds: Sequence[Point], alpha: float, what: str = "test", other: str = "folds of the shots"
) -> Drawing:
    """Accuracy over α: of the test solid, of the folds dashed, each with its 95% interval; a line at the run's α."""

    def draw(axes: Axes, palette: Palette) -> None:
        axes.axvline(alpha, color=palette.ink, linewidth=0.9, alpha=0.6, linestyle=":")
        for points, colour, style, label in (
            (folds, palette.second, "--", other),
            (test, palette.first, "-", what),
        ):
            if points:
                _curve(axes, points, colour, style, label)
        axes.set_xlabel("α  (0 pre-trained, 1 fine-tuned)")
        axes.set_ylabel("accuracy, %")
        axes.set_xlim(-0.03, 1.03)
        axes.legend(loc="best")

    return draw


def _curve(axes: Axes, points: Sequence[Point], colour: str, style: str, label: str) -> None:
    x = [point.alpha for point in points]
    axes.plot(x, [100 * point.value for point in points], style, color=colour, marker="o", markersize=3.5, label=label)
    low = [100 * point.low for point in points if point.low is not None]
    high = [100 * point.high for point in points if point.high is not None]
    if len(low) == len(high) == len(x):
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def loss(curve: LossCurve) -> Drawing:
    """One loss over the steps."""

    def draw(axes: Axes, palette: Palette) -> None:
        few = len(curve.steps) < 40
        axes.plot(curve.steps, curve.values, color=palette.first, marker="o" if few else None, markersize=2.5)
        axes.set_xlabel("step" if curve.steps_a_point == 1 else f"step, means of {curve.steps_a_point}")
        finite = [value for value in curve.values if math.isfinite(value)]
        if finite and min(finite) >= 0:
            axes.set_ylim(bottom=0)

    return draw


def reliability(now: Sequence[Bin], before: Sequence[Bin], label: str) -> Drawing:
    """What is right of the images that are given a probability; the area of a dot is the share of images."""

    def draw(axes: Axes, palette: Palette) -> None:
        axes.plot([0, 100], [0, 100], color=palette.ink, linewidth=0.9, alpha=0.6, linestyle=":")
        for bins, colour, style, name in (
            (before, palette.second, "--", "zero-shot"),
            (now, palette.first, "-", label),
        ):
            if not bins:
                continue
            n = sum(b.n for b in bins)
            x, y = [100 * b.confidence for b in bins], [100 * b.accuracy for b in bins]
            axes.plot(x, y, style, color=colour, linewidth=1.2, label=name)
            axes.scatter(x, y, [8 + 160 * b.n / n for b in bins], color=colour, alpha=0.55, linewidths=0)
        axes.set_xlabel("probability given, %")
        axes.set_ylabel("of those right, %")
        axes.set_xlim(-2, 102)
        axes.set_ylim(-2, 102)
        axes.legend(loc="upper left")

    return draw


def file_name(*parts: Any) -> str:
    """A name of a PNG file from words, whatever is in them."""
    return "-".join(re.sub(r"[^\w.]+", "-", str(part)).strip("-.") or "x" for part in parts) + ".png"
