"""The figure of `bench.axes`: a step's peak against layers, nodes and objectives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

AXES = {"layers": "layers", "nodes": "nodes", "objectives": "objectives"}


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw a panel for each axis, the other two at their least; hollow marks are estimates.

    The dashed line is of the first system with the other two at their most.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "axes"  # the same file for the same numbers
    names = list(dict.fromkeys(row["system"] for row in rows))
    least = {axis: min(row[axis] for row in rows) for axis in AXES}
    most = {axis: max(row[axis] for row in rows) for axis in AXES}
    figure, panels = plt.subplots(1, len(AXES), figsize=(10, 3.6), sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        for name, marker in zip(names, "os^dv", strict=False):
            (line,) = panel.plot([], [], marker=marker, markersize=5, linewidth=1, label=name)
            _line(panel, _along(rows, name, axis, least), axis, marker, line.get_color(), "-")
        ours = _along(rows, names[0], axis, most)
        panel.plot([], [], color="C0", linestyle="--", label=f"{names[0]}, others largest")
        _line(panel, ours, axis, "o", "C0", "--")
        panel.set(xscale="log", yscale="log", xlabel=AXES[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("peak of a step, MiB")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _along(rows: Sequence[dict[str, Any]], name: str, axis: str, at: dict[str, int]) -> list[dict[str, Any]]:
    others = [other for other in AXES if other != axis]
    return [row for row in rows if row["system"] == name and all(row[other] == at[other] for other in others)]


def _line(panel: Any, rows: Sequence[dict[str, Any]], axis: str, marker: str, color: Any, style: str) -> None:
    heights = [(row["peak_bytes"] or row.get("estimated_bytes", 0)) / 2**20 for row in rows]
    places = [row[axis] for row in rows]
    panel.plot(places, heights, color=color, linewidth=1, linestyle=style)
    for place, height, row in zip(places, heights, rows, strict=True):
        face = color if row["peak_bytes"] is not None else "white"
        panel.plot([place], [height], marker=marker, markersize=5, color=color, markerfacecolor=face)
