from __future__ import annotations

import csv
import json
import subprocess
import sys


def test_recollect_train_with_no_argument(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "recollect.cli", "train"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no warnings of the libraries below either
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["dataset"], summary["model"], summary["metric"]) == ("digits", "revgnn", "accuracy")
    assert summary["layers"] >= 64
    assert summary["test_accuracy"] > 0.95
    assert summary["largest_drift"] < 1e-3
    # 64 layers of which all are kept, against one: far below half even if something else needed as much again.
    assert summary["peak_bytes"] < 0.1 * summary["peak_bytes_plain"]
    by_depth = {point["layers"]: point for point in summary["memory_against_depth"]}
    assert by_depth[64]["peak"] <= 1.05 * by_depth[8]["peak"]
    assert by_depth[64]["peak_plain"] > 6 * by_depth[8]["peak_plain"]
    with (folder / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == summary["epochs"]
    for text in ("test accuracy", f"{100 * summary['test_accuracy']:.2f} %", "everything kept", "report.html"):
        assert text in result.stdout
