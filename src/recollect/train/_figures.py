"""The report's pictures, as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from recollect.train._text import METRICS, bytes_text, per_layer
from recollect.train._trainer import Row

__all__ = ["learning_curves", "memory_against_depth", "to_svg"]

_INK, _SOFT, _GRID = "#1f2933", "#616e7c", "#e4e7eb"
_BLUE, _ORANGE, _GREEN = "#2563eb", "#d9480f", "#2f9e44"
_COLORS = (_BLUE, _ORANGE, _GREEN, "#862e9c")
_STYLE: dict[Any, Any] = {
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


def learning_curves(history: Sequence[Row], best_epoch: int, metric: str) -> Figure:
    """Loss, score, drift, ages and errors of histories against epochs, with the epoch whose parameters were kept."""
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _losses(axes, history),
        lambda axes: _scores(axes, history, metric),
    ]
    if "drift" in history[0]:
        panels.append(lambda axes: _drift(axes, history))
    for name, title in (("age", "Mean age of the histories (steps)"), ("error", "Relative error of the histories")):
        if per_layer(history[0], name):
            panels.append(lambda axes, name=name, title=title: _layers(axes, history, name, title))  # type: ignore[misc]
    if "conflict" in history[0]:
        panels.append(lambda axes: _conflict(axes, history))
    with matplotlib.rc_context(_STYLE):
        rows, columns = (1, len(panels)) if len(panels) <= 3 else (2, -(-len(panels) // 2))
        figure = Figure(figsize=(11, 3.4 * rows), layout="constrained")
        places = figure.subplots(rows, columns).flat
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        for axes, draw in zip(places, panels, strict=False):
            draw(axes)
            _decades(axes)
            _epoch_axis(axes, best_epoch, len(history))
        return figure


def _losses(axes: Axes, history: Sequence[Row]) -> None:
    epochs = [row["epoch"] for row in history]
    axes.set_title("Loss")
    axes.semilogy(epochs, [row["loss"] for row in history], color=_BLUE, label="training (with dropout)")
    axes.plot(epochs, [row["val_loss"] for row in history], color=_ORANGE, label="validation")


def _scores(axes: Axes, history: Sequence[Row], metric: str) -> None:
    epochs = [row["epoch"] for row in history]
    axes.set_title(METRICS[metric][0].upper() + METRICS[metric][1:] + " (%)")
    axes.plot(epochs, [100 * row["train_accuracy"] for row in history], color=_BLUE, label="training")
    axes.plot(epochs, [100 * row["val_accuracy"] for row in history], color=_ORANGE, label="validation")


def _drift(axes: Axes, history: Sequence[Row]) -> None:
    axes.set_title("Drift of the reconstruction")
    drift = [(row["epoch"], row["drift"]) for row in history if row["drift"] > 0]
    if drift:
        axes.semilogy(*zip(*drift, strict=True), color=_GREEN, label="largest relative error")
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
    if len(layers) <= len(_COLORS):
        for number, (values, color) in enumerate(zip(layers, _COLORS, strict=False), 1):
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
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Peak memory of a training step against depth")
        for key, color, name in (("peak_plain", _ORANGE, "everything kept"), ("peak", _BLUE, "reversible")):
            points = [(p["layers"], p[key] / size) for p in curve if p[key] is not None]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=5)
            depth, height = points[-1]
            text = f"{name}: {bytes_text(round(height * size))}"
            axes.annotate(text, (depth, height), (8, 0), textcoords="offset points", va="center", color=color)
        axes.set_xlabel("layers")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.3 * max(p["layers"] for p in curve))  # room for the names at the ends of the lines
        axes.set_xticks([t for t in axes.get_xticks() if t <= max(p["layers"] for p in curve)])
        return figure


def to_svg(figure: Figure) -> str:
    """The picture as an ``<svg>`` element that stands for itself: letters are drawn, nothing is linked."""
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _decades(axes: Axes) -> None:
    """End a logarithmic axis at powers of ten, and write these alone."""
    low, high = axes.dataLim.minposy, axes.dataLim.ymax  # the lowest above zero, and the highest
    if axes.get_yscale() == "log" and math.isfinite(low) and math.isfinite(high) and high > 0:
        axes.set_ylim(10.0 ** math.floor(math.log10(low)), 10.0 ** (math.floor(math.log10(high)) + 1))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _epoch_axis(axes: Axes, best_epoch: int, epochs: int) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlim(min(1, epochs - 1), epochs)
    axes.axvline(best_epoch, color=_SOFT, linestyle=":", linewidth=1, label="best epoch (kept)")
    axes.legend()
