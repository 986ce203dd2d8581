from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from recollect.train import train
from recollect.train._figures import learning_curves
from recollect.train._report import report
from recollect.train._text import bytes_text

# Elements that stand alone in HTML.
_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects elements and text, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


PARTS = ["model=gcn", "training=autoscale", "training.num_parts=4", "training.parts_per_batch=1"]


def test_a_run_with_histories_shows_them(tmp_path):
    overrides = ["dataset=karate", *PARTS, "epochs=3", "threads=1", "training.errors_every=2", "model.num_layers=3"]
    terminal = io.StringIO()
    summary = train([*overrides, f"run_dir={tmp_path / 'run'}"], Console(file=terminal, width=200))
    _check_epochs(tmp_path / "run" / "metrics.csv", terminal.getvalue())
    page = Page((tmp_path / "run" / "report.html").read_text())
    text = " ".join(page.words)
    ages, errors = summary["histories"]["ages"], summary["histories"]["errors"]
    assert len(ages) == len(errors) == 2
    for part in (
        "whole graph",
        f"2 x 34 rows, float32: {bytes_text(2 * 34 * 4 * (16 + 1))} (cpu)",
        f"{ages[0]:.2f}",
        f"{errors[0]:.1e}",
        bytes_text(summary["peak_bytes_plain"]),
    ):
        assert part in text
    assert "drift" not in text
    assert [tag for tag, _ in page.elements].count("svg") == 4  # no picture of memory against depth


def _check_epochs(metrics, terminal):
    """Ages and errors of each epoch, in metrics and in the terminal's line: errors in the second of three."""
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        epoch = int(row["epoch"])
        (line,) = [line for line in terminal.splitlines() if line.startswith(f"epoch {epoch}/3 ")]
        ages = sorted({f"{float(row[f'age_{layer}']):.2f}" for layer in (1, 2)})
        assert f"  age {'/'.join(ages)}" in line
        errors = "/".join(f"{float(row[f'error_{layer}']):.1e}" for layer in (1, 2))
        assert ("  error " in line) == (epoch == 2)
        assert (errors in line) == (epoch == 2)
        assert 0 < float(row["age_1"]) < 4


def test_curves_of_ages_and_errors_are_those_of_the_epochs():
    history = [row(epoch, age_1=epoch / 2, age_2=epoch / 4, error_1=float("nan"), error_2=0.5) for epoch in (1, 2, 3)]
    history[1]["error_1"] = 0.25
    figures = learning_curves(history, 1, "accuracy")
    panels = {axes.get_title(loc="left"): axes for figure in figures for axes in figure.axes}
    ages, errors = panels["Mean age of the histories (steps)"], panels["Relative error of the histories"]
    assert [line.get_ydata().tolist() for line in ages.lines[:2]] == [[0.5, 1.0, 1.5], [0.25, 0.5, 0.75]]
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in errors.lines[:2]] == [
        ([2], [0.25]),
        ([2], [0.5]),
    ]
    assert all(axes.get_legend_handles_labels()[1][-1] == "best epoch (kept)" for axes in panels.values())


def test_a_run_on_the_whole_graph_has_one_column_of_costs(tmp_path):
    train(["dataset=karate", "model=gcn", "epochs=2", "threads=1", f"run_dir={tmp_path / 'run'}"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<th>measured</th><th>whole graph</th></tr><tr><td>peak memory of a step</td>" in page
    assert "histories</th>" not in page


@pytest.mark.parametrize("layers", [1, 4, 9])
@pytest.mark.parametrize("errors", [True, False])
def test_histories_of_any_depth_have_their_curves(finished, layers, errors):
    history = []
    for epoch in (1, 2, 3):
        seen = {f"age_{layer}": 1.5 for layer in range(1, layers + 1)}
        if errors:
            error = 0.1 if epoch == 2 else float("nan")
            seen |= {f"error_{layer}": error for layer in range(1, layers + 1)}
        known = row(epoch, **seen)
        del known["drift"]
        history.append(known)
    Page(report({**finished[1], "best_epoch": 1}, history, "seed: 0"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    summary = train(["dataset=karate", "model.num_layers=8", "epochs=3", "threads=1", f"run_dir={folder}"])
    return folder, summary


def test_the_page_stands_alone(finished):
    text = (finished[0] / "report.html").read_text()
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "img")
        for name in ("src", "href", "xlink:href", "data", "poster"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_the_page_has_the_runs_numbers_and_pictures(finished):
    folder, summary = finished
    page = Page((folder / "report.html").read_text())
    text = " ".join(page.words)
    for value in (
        f"{100 * summary['test_accuracy']:.2f} %",
        bytes_text(summary["peak_bytes"]),
        bytes_text(summary["peak_bytes_plain"]),
        "revgnn, 8 layers, on karate",
        "num_layers: 8",
    ):
        assert value in text
    assert [tag for tag, _ in page.elements].count("svg") == 4


def row(epoch: int, **changed: float) -> dict[str, float]:
    base = {"loss": 1.0, "val_loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.5, "drift": 1e-6}
    return {"epoch": epoch, "learning_rate": 0.1, "seconds": 1.0, **base, **changed}


@pytest.mark.parametrize(
    ("changes", "history", "said"),
    [
        ({}, [row(1)], "KiB"),
        ({}, [row(1, drift=float("nan")), row(2, drift=float("nan"))], "KiB"),
        ({}, [row(1, loss=0.0, drift=0.0), row(2)], "KiB"),
        ({"peak_bytes": None, "peak_bytes_plain": None, "memory_against_depth": []}, [row(1)], "test accuracy"),
        ({"peak_bytes_plain": None, "expected_bytes_plain": 2**34}, [row(1)], "does not fit (about 16.00 GiB)"),
        ({"largest_drift": None, "model": "<b>&amp;"}, [row(1)], "nothing was reconstructed"),
    ],
)
def test_unusual_runs_have_a_page_too(finished, changes, history, said):
    summary = {**finished[1], "best_epoch": 1, **changes}
    if summary["peak_bytes_plain"] is None:
        summary["seconds_per_epoch_plain"] = None
        summary["memory_against_depth"] = [{**point, "peak_plain": None} for point in summary["memory_against_depth"]]
    page = Page(report(summary, history, "seed: 0"))
    assert said in " ".join(page.words)


def test_names_are_not_read_as_html(finished):
    page = report({**finished[1], "model": "<script>x</script>"}, [row(1)], "a: <script>")
    assert "<script" not in page


def test_the_same_run_has_the_same_page(finished):
    folder, summary = finished
    again = json.loads((folder / "summary.json").read_text())
    assert report(again, [row(1), row(2)], "seed: 0") == report(summary, [row(1), row(2)], "seed: 0")
