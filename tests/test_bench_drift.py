"""The benchmark of drift with few layers: numbers, figure and accuracies are there, and mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch_geometric")
pytest.importorskip("matplotlib")
from bench import _drift_cost, _drift_networks, drift
from bench._drift_networks import SYSTEMS, Work

WORK = Work(nodes=20, edges=40, channels=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RECOLLECT_DATA", raising=False)
        patch.setattr(_drift_cost, "COSTS", dict(list(_drift_cost.COSTS.items())[::2]))
        drift.main(["--quick", "--costs", "--accuracies", "--repeats", "1", "--epochs", "1", "--output", str(folder)])
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    text = (folder / f"{name}-quick-cpu.json").read_text()
    assert str(folder) not in text
    return json.loads(text)


def test_errors_by_depth_and_a_figure(folder: Path) -> None:
    report = read(folder, "drift")
    for rows in report["depths"].values():
        assert [row["depth"] for row in rows] == [4, 8]
        for row in rows:
            assert row["errors"]["exact"] == 0.0
            assert 0.0 < row["errors"]["float"] < 1e-5
            assert 0.0 < row["errors"]["torch_geometric"] < 1e-5
            assert isinstance(row["errors"]["memcnn"], (float, str))  # a text, where it is not installed
    assert len(report["targets"]) == 4
    assert all(target["reached"] for target in report["targets"])
    assert "<svg" in (folder / "drift-quick-cpu.svg").read_text()


def test_costs_are_ratios(folder: Path) -> None:
    for row in read(folder, "drift-costs")["costs"].values():
        assert row["step_ratio"] == row["seconds"]["exact"] / row["seconds"]["float"]
        assert row["peak_ratio"] == row["peak_bytes"]["exact"] / row["peak_bytes"]["float"]


def test_accuracies_of_all_seeds(folder: Path) -> None:
    found = read(folder, "drift-accuracies")["accuracies"]
    assert set(found) == {f"digits, {kind}" for kind in ("float", "exact", "residual", "BDIA", "Midpoint")}
    for row in found.values():
        assert len(row["all"]) == 2
        assert row["mean"] == pytest.approx(sum(row["all"]) / 2)


@pytest.mark.parametrize("norm", _drift_networks.NORMS)
def test_all_systems_compute_the_same(norm: str) -> None:
    expected = None
    for name in ("float", "torch_geometric", "exact"):
        blocks = _drift_networks.stacks(20, WORK, norm)
        assert blocks[0] is blocks[16]
        runs = SYSTEMS[name](blocks, WORK.graph())
        for found in (_drift_networks.gradients(run, blocks, WORK) for run in runs):
            expected = expected or found
            tolerance = 0.02 if name == "exact" else 1e-3
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
