"""report.html: a run on one page, in one file."""

from __future__ import annotations

import string
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from recollect.train._figures import learning_curves, memory_against_depth, spread_curves, to_svg
from recollect.train._text import METRICS, budget_rows, bytes_text, layers_text, percent_text, table
from recollect.train._trainer import Row

__all__ = ["html_table", "page", "panels", "report"]

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
  h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
  h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
  p { max-width: 48rem; }
  .lead { color: #616e7c; margin: 0 0 1.5rem; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; }
  .tile { border: 1px solid #e4e7eb; border-radius: .5rem; padding: .9rem 1.1rem; }
  .tile b { display: block; font-size: 1.6rem; line-height: 1.25; }
  .tile span { color: #616e7c; font-size: .9rem; }
  /* A shadow where a table goes on beyond the edge. */
  .wide { overflow-x: auto; background:
    linear-gradient(to right, #fff 40%, #fff0) left / 2rem 100% no-repeat local,
    linear-gradient(to left, #fff 40%, #fff0) right / 2rem 100% no-repeat local,
    linear-gradient(to right, #0002, #0000) left / .5rem 100% no-repeat scroll,
    linear-gradient(to left, #0002, #0000) right / .5rem 100% no-repeat scroll; }
  table { border-collapse: collapse; }
  th, td { text-align: left; padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
  th { font-weight: 600; }
  td { font-variant-numeric: tabular-nums; }
  .columns th, .columns td { white-space: nowrap; }
  .panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
  .figure { max-width: 44rem; }
  svg { width: 100%; height: auto; }
  @media (max-width: 40rem) {
    body { margin: 1rem auto; padding: 0 1rem; }
    th, td { padding-right: .75rem; font-size: .9rem; }
    .columns th, .columns td { padding-right: .5rem; font-size: .85rem; }
    .columns td:first-child { white-space: normal; }
  }
  @media print {
    body { margin: 0; max-width: none; padding: 0 1px; font-size: 11pt; }
    .wide { overflow: visible; background: none; }
    .figure { max-width: 30rem; }
    .columns th, .columns td { padding-right: .6rem; font-size: 8pt; white-space: normal; }
    .tile, .panels > *, .figure, tr { break-inside: avoid; }
    h2 { break-after: avoid; }
    .panels { grid-template-columns: repeat(2, 1fr); }
  }
  details { margin-top: 1.5rem; }
  details pre { background: #f5f7fa; padding: 1rem; border-radius: .5rem; overflow-x: auto; font-size: .85rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="lead">$lead</p>
<div class="tiles">$tiles</div>
$body
<h2>$about</h2>
$facts
<details><summary>Settings</summary><pre>$settings</pre></details>
</body>
</html>
""")

_COSTS = string.Template("""\
<h2>What it costs</h2>
$table
<p>Memory is the measured peak of one training step above what is there before and after it: parameters, $gradients
optimizer's state, histories and the graph. Seconds are medians of epochs (their steps and an evaluation), one
of each kind after the other.</p>
$figure""")


def report(
    summary: dict[str, Any], history: Sequence[Row], settings: str, histories: Sequence[Sequence[Row]] = ()
) -> str:
    """Make the page.

    Args:
        summary: see `recollect.train._summary.summarize`.
        history: the epochs; of several runs none.
        settings: as YAML.
        histories: the epochs of several runs.

    Returns:
        HTML that needs no other file and no network.
    """
    facts, costs = table(summary)
    runs = summary.get("results", [])
    title = f"{summary['model']}, {layers_text(summary)}on {summary['dataset']}"
    if runs:
        curves = panels(spread_curves(histories, summary["metric"])) if histories else ""
        body = _runs(runs, METRICS[summary["metric"]])
        body += f"<h2>Learning curves: the mean, and the band of all runs</h2>\n{curves}" if curves else ""
    else:
        curves = panels(learning_curves(history, summary["best_epoch"], summary["metric"]))
        body = f"<h2>Learning curves</h2>\n{curves}"
    return page(
        f"{title}, {len(runs)} runs" if runs else title,
        f"recollect {summary['recollect']}, torch {summary['torch']}, {facts[-1][1]}",
        _tiles(summary),
        _costs(summary, costs) + _budget(summary) + body,
        "The runs; where they differ, as in the first" if runs else "The run",
        facts,
        settings,
    )


def page(
    title: str,
    lead: str,
    tiles: Sequence[tuple[str, str]],
    body: str,
    about: str,
    facts: Sequence[tuple[str, str]],
    settings: str,
) -> str:
    """Fill the page.

    Args:
        title: its heading.
        lead: the line below.
        tiles: names and values that stand out.
        body: HTML.
        about: heading of the facts.
        facts: names and values.
        settings: text.
    """
    return _PAGE.substitute(
        title=escape(title),
        lead=escape(lead),
        tiles="".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for n, v in tiles),
        body=body,
        about=escape(about),
        facts=html_table([], facts, headed=True),
        settings=escape(settings),
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], headed: bool = False) -> str:
    """A table that scrolls where the screen is narrower.

    Args:
        head: names of the columns; none if empty.
        rows: text.
        headed: whether the first cell of each row is its name.
    """
    first = "th" if headed else "td"
    kind = "" if headed else ' class="columns"'
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if head else []
    for row in rows:
        cells = [f"<{first}>{escape(row[0])}</{first}>", *(f"<td>{escape(cell)}</td>" for cell in row[1:])]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table{kind}>{"".join(lines)}</table></div>'


def panels(figures: Sequence[Figure]) -> str:
    """Figures side by side, or below each other where the screen is narrow."""
    return '<div class="panels">' + "".join(f"<div>{to_svg(figure)}</div>" for figure in figures) + "</div>"


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
    return f"<h2>Each run</h2>\n{html_table(names, rows)}"


def _budget(summary: dict[str, Any]) -> str:
    """What is kept of each unit, in a run with a memory budget."""
    budget = summary.get("memory_budget")
    if budget is None:
        return ""
    names = ["unit", "keeps, everything kept", "what is done", "keeps", "adds to a step"]
    said = (
        f"A step may allocate {bytes_text(budget['bytes'])}, gradients of parameters included. The plan was made on "
        f"the first batch, and its peak was measured: {bytes_text(budget['peak_bytes'])}."
    )
    return f"<h2>Memory budget</h2>\n<p>{escape(said)}</p>\n{html_table(names, budget_rows(budget))}"


def _costs(summary: dict[str, Any], costs: list[tuple[str, str, str, str]]) -> str:
    if summary["peak_bytes"] is None:
        return ""
    modes = summary["modes"]
    width = 2 * len(modes)
    curve = summary["memory_against_depth"]
    return _COSTS.substitute(
        gradients="gradients, the" if summary.get("memory_budget") is None else "but not gradients, the",
        table=html_table(["measured", *modes, ""][:width], [row[:width] for row in costs]),
        figure=f'<div class="figure">{to_svg(memory_against_depth(curve))}</div>' if curve else "",
    )
