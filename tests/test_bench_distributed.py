"""The benchmark of several processes on a small graph: what it measures is there, and means what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import distributed as dist

pytest.importorskip("torch_geometric.data")
from bench import distributed


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_bytes_are_those_of_the_halos(tmp_path: Path) -> None:
    distributed.main(["--quick", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "distributed-quick-cpu.json").read_text())
    assert [row["ranks"] for row in report["runs"]] == [1, 2]
    assert report["runs"][0]["wire_bytes"] == report["runs"][0]["predicted_bytes"] == 0
    two = report["runs"][1]
    assert two["wire_bytes"] == two["predicted_bytes"] > 0
    assert sum(two["nodes_of_ranks"]) == 2000
    assert min(*two["seconds"].values()) > 0
