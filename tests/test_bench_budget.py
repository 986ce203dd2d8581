"""The benchmark of memory budgets on small networks: what it measures is there, and means what it says."""

from __future__ import annotations

import json
from pathlib import Path

from bench import budget


def test_plans_stay_within_their_budgets(tmp_path: Path) -> None:
    budget.main(["--quick", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "budget-quick-cpu.json").read_text())
    assert set(report["networks"]) == {"GPT", "ViT", "ResNet", "MLP", "GCN", "RevGNN"}
    for row in report["networks"].values():
        assert row["budgets"] == sorted(row["budgets"])
        assert row["ways"]["each block"]["peak_bytes"] < row["ways"]["plain"]["peak_bytes"]
        assert all(way["seconds"] > 0 for way in row["ways"].values())
        peaks = [row["ways"][f"plan {number}"]["peak_bytes"] for number in range(3)]
        assert all(peak <= 1.01 * limit for peak, limit in zip(peaks, row["budgets"], strict=True))
        assert set(row["strategies"][-1]) == {"store"}
    assert report["networks"]["RevGNN"]["ways"]["inverse"]["peak_bytes"] > 0
    assert (tmp_path / "budget-quick-cpu.svg").read_text().startswith("<?xml")
