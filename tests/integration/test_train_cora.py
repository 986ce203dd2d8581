"""A short run on Cora with histories comes close to one on the whole graph; by the same command, but for one switch."""

from __future__ import annotations

import os

import pytest

from recollect.train import train

ROOT = os.environ.get("RECOLLECT_DATA")
MARGIN = 0.03  # of the test nodes: after so few epochs two seeds alone are up to two points apart


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.skipif(not ROOT, reason="RECOLLECT_DATA is not set: no folder with raw files is known")
def test_histories_reach_what_the_whole_graph_does(tmp_path):
    accuracy = {}
    for training in ("full", "autoscale"):
        summary = train(
            [
                *("preset=cora_gcn", f"training={training}", f"data.root={ROOT}", f"run_dir={tmp_path / training}"),
                *("runs=1", "epochs=30", "optimizer.lr=0.05", "threads=1", "measure.enabled=false"),
            ]
        )
        accuracy[training] = summary["test_accuracy"]
    assert accuracy["full"] > 0.78
    assert abs(accuracy["autoscale"] - accuracy["full"]) <= MARGIN
    ages = summary["histories"]["ages"]
    assert ages == pytest.approx([1.5], abs=0.25)  # four steps an epoch
