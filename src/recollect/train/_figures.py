"""The report's pictures, as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from recollect.train._text import METRICS, bytes_text, per_layer
from recollect.train._trainer import Row

__all__ = [
    "COLORS",
    "STYLE",
    "WIDE",
    "draw_runs",
    "fit_axis",
    "learning_curves",
    "memory_against_depth",
    "spread_curves",
    "to_svg",
]

_INK, _SOFT, _GRID = "#1f2933", "#616e7c", "#e4e7eb"
_BLUE, _ORANGE, _GREEN = "#2563eb", "#d9480f", "#2f9e44"
COLORS = (_BLUE, _ORANGE, _GREEN, "#862e9c", "#0c8599", "#a61e4d", "#5c940d", "#495057")
_SIZE, WIDE = (4.6, 3.3), (5.6, 3.5)  # inches: of a panel, and of a figure that stands alone
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "recollect",
}


def learning_curves(history: Sequence[Row], best_epoch: int, metric: str) -> list[Figure]:
    """Loss, score, drift, ages and errors of histories against epochs, with the epoch whose parameters were kept."""
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _losses(axes, [history]),
        lambda axes: _scores(axes, [history], metric),
    ]
    if "drift" in history[0]:
        panels.append(lambda axes: _drift(axes, history))
    for name, title in (("age", "Mean age of the histories (steps)"), ("error", "Relative error of the histories")):
        if per_layer(history[0], name):
            panels.append(lambda axes, name=name, title=title: _layers(axes, history, name, title))  # type: ignore[misc]
    if "conflict" in history[0]:
        panels.append(lambda axes: _conflict(axes, history))
    return [_panel(draw, len(history), best_epoch) for draw in panels]


def spread_curves(histories: Sequence[Sequence[Row]], metric: str) -> list[Figure]:
    """Loss and score of several runs against epochs: the mean, and the band that all are in."""
    epochs = max(map(len, histories))
    return [
        _panel(lambda axes: _losses(axes, histories), epochs),
        _panel(lambda axes: _scores(axes, histories, metric), epochs),
    ]


def _panel(draw: Callable[[Axes], None], epochs: int, best_epoch: int | None = None) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlim(min(1, epochs - 1), epochs)
        if best_epoch is not None:
            axes.axvline(best_epoch, color=_SOFT, linestyle=":", linewidth=1, label="best epoch (kept)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        return figure


def draw_runs(
    axes: Axes, histories: Sequence[Sequence[Row]], key: str, color: Any, label: str, scale: float = 1.0
) -> None:
    """Draw a column of metrics.csv: of several runs the mean of those that came so far, and the band of all."""
    epochs = range(1, max(map(len, histories)) + 1)
    values = [[scale * history[e - 1][key] for history in histories if len(history) >= e] for e in epochs]
    values = [[value for value in each if math.isfinite(value)] or [math.nan] for each in values]
    axes.plot(epochs, [sum(each) / len(each) for each in values], color=color, label=label)
    if len(histories) > 1:
        low, high = ([choose(each) for each in values] for choose in (min, max))
        axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)


def _losses(axes: Axes, histories: Sequence[Sequence[Row]]) -> None:
    axes.set_title("Loss")
    draw_runs(axes, histories, "loss", _BLUE, "training (with dropout)")
    draw_runs(axes, histories, "val_loss", _ORANGE, "validation")
    values = [row[key] for history in histories for row in history for key in ("loss", "val_loss")]
    fit_axis(axes, values)


def _scores(axes: Axes, histories: Sequence[Sequence[Row]], metric: str) -> None:
    axes.set_title(METRICS[metric][0].upper() + METRICS[metric][1:] + " (%)")
    draw_runs(axes, histories, "train_accuracy", _BLUE, "training", 100)
    draw_runs(axes, histories, "val_accuracy", _ORANGE, "validation", 100)


def fit_axis(axes: Axes, values: Sequence[float]) -> None:
    """Let the vertical axis show the values and little else: in powers of ten if they span a factor of ten."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return
    low, high = min(known), max(known)
    if low > 0 and high >= 10 * low:
        axes.set_yscale("log")
        margin = (high / low) ** 0.05
        axes.set_ylim(low / margin, high * margin)
        subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
        axes.set_ylim(low - margin, high + margin)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))


def _drift(axes: Axes, history: Sequence[Row]) -> None:
    axes.set_title("Drift of the reconstruction")
    drift = [(row["epoch"], row["drift"]) for row in history if row["drift"] > 0]
    if drift:
        axes.plot(*zip(*drift, strict=True), color=_GREEN, label="largest relative error")
        fit_axis(axes, [value for _, value in drift])
    else:
        axes.text(0.5, 0.5, "nothing was reconstructed", ha="center", transform=axes.transAxes, color=_SOFT)


def _conflict(axes: Axes, history: Sequence[Row]) -> None:
    axes.set_title("Conflict of the objectives")
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["conflict"] for row in history], color=_ORANGE, label="share of opposed pairs")
    axes.plot(epochs, [row["cosine"] for row in history], color=_BLUE, label="least cosine with the update")
    axes.plot(epochs, [row["cosine_mean"] for row in history], color=_GREEN, label="mean cosine with the update")
    each = [per_layer(row, "cosine") for row in history]
    if each[0]:
        low, high = ([choose(values) for values in each] for choose in (min, max))
        axes.fill_between(epochs, low, high, color=_GREEN, alpha=0.2, label=f"of each of {len(each[0])} objectives")


def _layers(axes: Axes, history: Sequence[Row], name: str, title: str) -> None:
    """A line for each layer, or the band that many are in."""
    axes.set_title(title)
    known = [(row["epoch"], per_layer(row, name)) for row in history]
    known = [(epoch, values) for epoch, values in known if math.isfinite(values[0])]
    if not known:
        axes.text(0.5, 0.5, "not measured yet", ha="center", transform=axes.transAxes, color=_SOFT)
        return
    axes.set_ylim(bottom=0, top=1.1 * max(max(values) for _, values in known) or None)
    epochs = [epoch for epoch, _ in known]
    layers = list(zip(*(values for _, values in known), strict=True))
    if len(layers) <= 4:
        for number, (values, color) in enumerate(zip(layers, COLORS, strict=False), 1):
            axes.plot(epochs, values, color=color, marker=".", label=f"layer {number}")
        return
    low, high = ([choose(values) for _, values in known] for choose in (min, max))
    axes.fill_between(
        epochs, low, high, color=_BLUE, alpha=0.3, label=f"from least to greatest of {len(layers)} layers"
    )
    axes.plot(epochs, [sum(values) / len(values) for _, values in known], color=_BLUE, label="mean of the layers")


def memory_against_depth(curve: Sequence[dict[str, Any]]) -> Figure:
    """Peak bytes of a training step against the number of layers, reversible and with everything kept."""
    largest = max(p["peak_plain"] or p["peak"] for p in curve)
    unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20) if largest >= 2**20 else ("KiB", 2**10)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE, layout="constrained")
        axes = figure.subplots()
        axes.set_title("Peak memory of a training step against depth")
        for key, color, name in (("peak_plain", _ORANGE, "everything kept"), ("peak", _BLUE, "reversible")):
            points = [(p["layers"], p[key] / size) for p in curve if p[key] is not None]
            if not points:
                continue
            text = f"{name}: {bytes_text(round(points[-1][1] * size))}"
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=5, label=text)
        axes.set_xlabel("layers")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.legend(loc="upper left")
        return figure


def to_svg(figure: Figure) -> str:
    """The picture as an ``<svg>`` element that stands for itself: letters are drawn, nothing is linked."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
