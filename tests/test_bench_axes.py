"""The benchmark of all three axes at tiny sizes: what it measures is there, and means what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch_geometric.data")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
from bench import axes
from bench._axes_accuracy import OBJECTIVES, WAYS, gathered

TINY = ["--quick", "--layers", "2", "4", "--nodes", "1000", "--objectives", "1", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    axes.main([*TINY, "--output", str(folder)])
    return folder


def by_size(report: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {(row["system"], row["layers"], row["objectives"]): row for row in report["rows"]}


def test_each_system_has_its_peaks_and_times(folder: Path) -> None:
    text = (folder / "axes-quick-cpu.json").read_text()
    assert str(folder) not in text
    rows = by_size(json.loads(text))
    assert len(rows) == 5 * 4
    for row in rows.values():
        assert row["peak_bytes"] > 0
        assert row["seconds"] > 0
    for kept in ("plain", "graph alone", "objectives alone"):  # each layer's activations, of a part or of all nodes
        assert rows[kept, 4, 1]["peak_bytes"] > 1.15 * rows[kept, 2, 1]["peak_bytes"]
    for one in ("all three", "depth alone"):
        assert rows[one, 4, 1]["peak_bytes"] < 1.05 * rows[one, 2, 1]["peak_bytes"]
    assert rows["all three", 4, 3]["row_bytes"] == 4 * 3 * rows["all three", 4, 3]["parameters"]
    assert rows["plain", 4, 3]["row_bytes"] == rows["all three", 4, 1]["row_bytes"] == 0
    assert "<svg" in (folder / "axes-quick-cpu.svg").read_text()


def test_the_target_leaves_the_row_block_out(folder: Path) -> None:
    report = json.loads((folder / "axes-quick-cpu.json").read_text())
    rows, (target,) = by_size(report), report["targets"]
    largest, smallest = rows["all three", 4, 3], rows["all three", 2, 1]
    assert target["value"] == (largest["peak_bytes"] - largest["row_bytes"]) / smallest["peak_bytes"]


def test_what_is_kept_makes_the_report_again_and_the_rest_is_told(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "axes-quick-cpu.jsonl").read_text().splitlines()
    (tmp_path / "axes-quick-cpu.jsonl").write_text("\n".join(lines[:3]) + "\n")
    rows = axes.main([*TINY, "--kept", "--output", str(tmp_path)])["rows"]
    assert [row.get("why") for row in rows] == [None] * 3 + ["not run"] * 17
    assert rows[3]["estimated_bytes"] > 0  # the smallest step of this system is known


def test_what_takes_too_much_by_the_estimate_is_not_run(tmp_path: Path) -> None:
    arguments = [*TINY, "--systems", "plain", "--output", str(tmp_path)]
    first, *rest = axes.main([*arguments, "--memory", "0.0000001"])["rows"]
    assert "why" not in first
    assert {row["why"] for row in rest} == {"does not fit"}
    deep = next(row for row in rest if (row["layers"], row["objectives"]) == (4, 3))
    assert deep["estimated_bytes"] == 2 * first["peak_bytes"] + 4 * 3 * deep["parameters"]
    (tmp_path / "axes-quick-cpu.jsonl").unlink()
    rest = axes.main([*arguments, "--seconds", "0"])["rows"][1:]
    assert all(row["why"].startswith("not run: about ") for row in rest)


def test_training_on_real_graphs(tmp_path: Path) -> None:
    data, generator = tmp_path / "data" / "pcg", torch.Generator().manual_seed(0)
    data.mkdir(parents=True)
    ring = range(64)
    (data / "edges.csv").write_text("".join(f"{i},{(i + 1) % 64}\n{(i + 1) % 64},{i}\n" for i in ring))
    features, labels = torch.randn(64, 4, generator=generator), torch.rand(64, 3, generator=generator) < 0.4
    (data / "features.csv").write_text("".join(",".join(f"{x:.3f}" for x in row.tolist()) + "\n" for row in features))
    (data / "labels.csv").write_text("".join(",".join(str(int(y)) for y in row) + "\n" for row in labels))
    (data / "split.csv").write_text("".join(f"{('train', 'val', 'train', 'test')[i % 4]}\n" for i in ring))
    report = axes.main(["--quick", "--accuracies", str(data.parent), "--seeds", "2", "--output", str(tmp_path)])
    assert str(tmp_path) not in (tmp_path / "axes-accuracies-quick-cpu.json").read_text()
    assert [(row["way"], row["objective"]) for row in report["rows"]] == [(w, o) for w in WAYS for o in OBJECTIVES]
    for row in report["rows"]:
        assert (row["seeds"], row["epochs"], row["layers"]) == (2, 2, 2)
        assert 0 < row["test"] <= 100
        assert row["peak_bytes"] > 0
        assert 0 <= row["conflict"] <= 1
    kept, exact = (
        [run["test"] for run in report["runs"] if (run["way"], run["objective"]) == (way, "mean")]
        for way in (WAYS[0], WAYS[2])
    )
    assert exact == pytest.approx(kept, abs=5.0)  # the same gradients, but for other masks and rounding
    assert gathered(report["runs"]) == report["rows"]
