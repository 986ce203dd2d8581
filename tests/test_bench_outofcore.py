"""The benchmark of whole graphs out of core on a small graph: what it measures is there, and means what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch_geometric.data")
from bench import outofcore


def test_memory_and_times(tmp_path: Path) -> None:
    arguments = ["--quick", "--nodes", "600", "--depths", "2", "4", "--part", "200", "--threads", "1"]
    outofcore.main([*arguments, "--output", str(tmp_path)])
    text = (tmp_path / "outofcore-quick-cpu.json").read_text()
    assert str(tmp_path) not in text
    report = json.loads(text)
    assert set(report["seconds"]) == {"plain", "reversible", "tables in memory", "tables in files"}
    assert [(row["nodes"], row["depth"]) for row in report["resident"]] == [(600, 2), (600, 4)]
    for row in report["resident"]:
        assert row["resident_bytes"] > 0
        assert 12 * 600 * 16 <= row["table_bytes"] <= 12 * 600 * 16 + 60_000  # with a header and ages for each table
