"""The benchmark of small regions with few calls: its numbers are there, and all systems compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import regions
from bench._report import OTHER_DEVICE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("results")
    regions.main(["--quick", "--repeats", "2", "--calls", "2", "--output", str(folder)])
    text = (folder / "regions-quick-cpu.json").read_text()
    assert str(folder) not in text
    assert str(Path.cwd()) not in text
    return json.loads(text)


def test_every_system_has_a_number(report: dict[str, Any]) -> None:
    assert set(report["regions"]) == set(regions.NOTES)
    assert report["settings"] == {"repeats": 2, "calls": 2, "device": "cpu", "threads": 1}
    for row in report["regions"].values():
        assert set(row["microseconds"]) == set(regions.SYSTEMS)
        for name, values in row["all_microseconds"].items():
            assert len(values) == 2
            assert row["microseconds"][name] == pytest.approx(sum(values) / 2)
            assert row["microseconds"][name] > 1


def test_targets_compare_with_torch(report: dict[str, Any]) -> None:
    found = {target["name"]: target for target in report["targets"]}
    assert len(found) == len(regions.NOTES)
    times = report["regions"]["norm"]["microseconds"]
    target = found["forward and backward of a small region, norm, recollect / checkpoint"]
    assert target["value"] == pytest.approx(times["recollect"] / times["checkpoint"])
    assert target["reached"] == (target["value"] <= 1)


def test_other_devices_are_not_held_to_it() -> None:
    rows = {name: {"microseconds": dict.fromkeys(regions.SYSTEMS, 1.0)} for name in regions.NOTES}
    assert {target.why_not_measured for target in regions.targets(rows, torch.device("meta"))} == {OTHER_DEVICE}
    assert all(target.reached for target in regions.targets(rows, CPU))


@pytest.mark.parametrize("region", regions.NOTES)
def test_all_systems_compute_the_same(region: str) -> None:
    results = []
    for name in regions.SYSTEMS:
        function, x = regions.build(region, name, CPU), regions.example(region, CPU)
        torch.manual_seed(2)
        out = function(x * 1)
        out.square().sum().backward()
        results.append((out, x.grad))
    for out, gradient in results[1:]:
        torch.testing.assert_close(out, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])
