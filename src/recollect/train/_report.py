"""report.html: a run on one page, in one file."""

from __future__ import annotations

import string
from collections.abc import Sequence
from html import escape
from typing import Any

from recollect.train._figures import learning_curves, memory_against_depth, to_svg
from recollect.train._text import METRICS, percent_text, table
from recollect.train._trainer import Row

__all__ = ["report"]

_PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 66rem; margin: 2.5rem auto;
         padding: 0 1.5rem; }
  h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
  h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
  p { max-width: 48rem; }
  .lead { color: #616e7c; margin: 0 0 1.5rem; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; }
  .tile { border: 1px solid #e4e7eb; border-radius: .5rem; padding: .9rem 1.1rem; }
  .tile b { display: block; font-size: 1.6rem; line-height: 1.25; }
  .tile span { color: #616e7c; font-size: .9rem; }
  table { border-collapse: collapse; }
  th, td { text-align: left; padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
  th { font-weight: 600; }
  td { font-variant-numeric: tabular-nums; }
  svg { width: 100%; height: auto; }
  details pre { background: #f5f7fa; padding: 1rem; border-radius: .5rem; overflow-x: auto; font-size: .85rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="lead">$lead</p>
<div class="tiles">$tiles</div>
$costs
$body
<h2>$about</h2>
<table>$facts</table>
<details><summary>Settings</summary><pre>$settings</pre></details>
</body>
</html>
""")

_COSTS = string.Template("""\
<h2>What it costs</h2>
<table><tr><th>measured</th>$modes<th></th></tr>$rows</table>
<p>Memory is the measured peak of one training step above what is there before and after it: parameters, gradients, the
optimizer's state, histories and the graph. Seconds are medians of epochs (their steps and an evaluation), one
of each kind after the other.</p>
$figure""")


def report(summary: dict[str, Any], history: Sequence[Row], settings: str) -> str:
    """Make the page.

    Args:
        summary: see `recollect.train._summary.summarize`.
        history: the epochs; of several runs none.
        settings: as YAML.

    Returns:
        HTML that needs no other file and no network.
    """
    facts, costs = table(summary)
    runs = summary.get("results", [])
    title = f"{summary['model']}, {summary['layers']} layers, on {summary['dataset']}"
    curves = "" if runs else to_svg(learning_curves(history, summary["best_epoch"], summary["metric"]))
    return _PAGE.substitute(
        title=escape(f"{title}, {len(runs)} runs" if runs else title),
        lead=escape(f"recollect {summary['recollect']}, torch {summary['torch']}, {facts[-1][1]}"),
        tiles="".join(
            f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for n, v in _tiles(summary)
        ),
        costs=_costs(summary, costs),
        body=_runs(runs, METRICS[summary["metric"]]) if runs else f"<h2>Learning curves</h2>\n{curves}",
        about="The runs; where they differ, as in the first" if runs else "The run",
        facts="".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts),
        settings=escape(settings),
    )


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = [(f"test {METRICS[summary['metric']]}", percent_text(summary, "test_accuracy"))]
    _, costs = table(summary)
    if summary["peak_bytes"] is not None:
        compared = f" ({summary['modes'][1]}: {{}})" if len(summary["modes"]) == 2 else ""
        tiles += [(name + compared.format(second), first) for name, first, second, _ in costs]
    return tiles


def _runs(runs: Sequence[dict[str, Any]], metric: str) -> str:
    """A row for each run; the split, where there are several."""
    columns = {"seed": "seed", "split": "split", "best_epoch": "best epoch", "epochs": "epochs"}
    if runs[0]["split"] == runs[-1]["split"]:
        del columns["split"]
    names = [*columns.values(), f"test {metric}", f"validation {metric}"]
    rows = [
        [*(str(run[key]) for key in columns), percent_text(run, "test_accuracy"), percent_text(run, "val_accuracy")]
        for run in runs
    ]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f"<h2>Each run</h2>\n<table><tr>{head}</tr>{body}</table>"


def _costs(summary: dict[str, Any], costs: list[tuple[str, str, str, str]]) -> str:
    if summary["peak_bytes"] is None:
        return ""
    modes = summary["modes"]
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[: 2 * len(modes)]) + "</tr>" for row in costs
    )
    curve = summary["memory_against_depth"]
    return _COSTS.substitute(
        modes="".join(f"<th>{escape(mode)}</th>" for mode in modes),
        rows=rows,
        figure=to_svg(memory_against_depth(curve)) if curve else "",
    )
