"""The benchmark of graphs at sizes that say nothing of speed: each part writes what it measured."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():  # torch_geometric warns on its own import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    from bench import graph

from bench import _graph_accuracy as accuracy
from bench import _graph_loader as loader
from bench import _graph_models as models

OF_FILES = {"accuracy", "scores"}  # which need a graph's raw files


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the JSON files say of every part but accuracy."""
    folder = tmp_path_factory.mktemp("results")
    parts = [part for part in graph.PARTS if part not in OF_FILES]
    graph.main(["--quick", "--repeats", "1", "--output", str(folder), "--only", *parts])
    texts = {part: (folder / f"graph-{part}-quick-cpu.json").read_text() for part in parts}
    assert all(str(folder) not in text and str(Path.cwd()) not in text for text in texts.values())
    return {part: json.loads(text) for part, text in texts.items()}


def test_reports_say_where_they_come_from(reports: dict[str, Any]) -> None:
    for report in reports.values():
        assert report["versions"]["torch"] == torch.__version__
        assert report["settings"]["quick"] is True
        assert all(target["value"] is None for target in report["targets"])  # they are set for other sizes


def test_the_loader_is_held_against_sorting(reports: dict[str, Any]) -> None:
    for row in reports["loader"]["rows"]:
        assert set(row["edges_per_second"]) == {loader.RECOLLECT, loader.SORTING}
        assert row["edges"] > 0


def test_peaks_are_of_batches_of_one_size(reports: dict[str, Any]) -> None:
    small, large = reports["memory"]["steps"]
    assert large["nodes"] == 5 * small["nodes"]
    assert {batch for row in (small, large) for batch, _ in row["batch_and_halo"]} == {200}
    assert small["peak_bytes"] > 200 * 32 * 4
    assert models.peaks_targets([small, large])[0].value == large["peak_bytes"] / small["peak_bytes"]


def test_every_way_to_divide_has_figures(reports: dict[str, Any]) -> None:
    found = reports["partition"]["methods"]
    assert set(found) == {"planted", "metis", "kaminpar", "random", "contiguous"}
    assert found["metis"]["cut_share"] < 0.5 < found["random"]["cut_share"]


def test_an_epoch_is_measured_both_ways(reports: dict[str, Any]) -> None:
    row = reports["epoch"]
    assert set(row["seconds"]) == {"histories", "whole graph"}
    assert row["peak_bytes"]["histories"] < row["peak_bytes"]["whole graph"]


def test_accuracy_is_that_of_the_application(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def train(words: list[str]) -> dict[str, Any]:
        calls.append(words)
        better = 0.02 if "training=autoscale" in words else 0.0
        return {"results": [{"test_accuracy": 0.80 + better}, {"test_accuracy": 0.82 + better}], "seconds": 1.0}

    monkeypatch.setattr(accuracy, "train", train)
    (row,) = accuracy.measure_accuracy(tmp_path, ["gcn"], runs=2)
    assert [words[:2] for words in calls] == [["preset=cora_gcn", f"training={mode}"] for mode in accuracy.MODES]
    assert row["mean"] == pytest.approx({"autoscale": 83.0, "full": 81.0})
    assert row["std"]["full"] == pytest.approx(2**0.5)
    targets = {target.name: target for target in accuracy.accuracy_targets([row])}
    lost = targets["gcn: points that histories lose against the whole graph"]
    assert lost.value == pytest.approx(-2)
    assert lost.reached
    below = targets["gcn: points below the published mean, with histories"]
    assert below.value == pytest.approx(-0.71)
    assert below.limit == 0.76
    assert targets["gat: points below the published mean, with histories"].value is None
    assert all(target.value is None for target in accuracy.accuracy_targets([{**row, "epochs": 3}]))
    assert "83.00 (1.41)" in accuracy.accuracy_table([row])


def test_accuracy_needs_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        graph.main(["--only", "accuracy", "--root", str(tmp_path)])
    assert "accuracy needs --root" in capsys.readouterr().err
