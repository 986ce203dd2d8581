"""The benchmark for cards on an emulated one: every part runs, and what is counted is counted right."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():  # torch_geometric warns on its own import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    from bench import _gpu_parts as parts
    from bench import gpu
from bench._gpu_measure import compare, comparison, host_waits, profiled_waits, ratios, synchronizations

from recollect.frames import settle

sys.path.append(str(Path(__file__).parent))

from device import emulation

emulation.install()
OTHER = torch.device(emulation.NAME)


@pytest.fixture(autouse=True, scope="module")
def card() -> Iterator[None]:
    emulation.device.present = True
    yield
    settle()
    emulation.device.catch_up()
    emulation.device.present = False


@pytest.fixture(scope="module")
def report(card: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("results")
    gpu.main(["--quick", "--device", "other", "--output", str(folder)])
    text = (folder / "gpu-quick-other.json").read_text()
    assert str(folder) not in text
    assert str(Path.cwd()) not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_every_part_runs(report: dict[str, Any]) -> None:
    assert report["skipped"] == {}
    assert list(report["parts"]) == list(parts.PARTS) == list(report["part_seconds"])
    assert report["machine"]["device"] == "other"


def test_forms_and_their_waits(report: dict[str, Any]) -> None:
    forms = report["parts"]["forms"]
    for row in forms.values():
        assert row["skipped"] == {}
        assert all(len(times) == parts.QUICK.repeats for times in row["all_seconds"].values())
    assert forms["row pointers"]["waits"] == {"index_add": 0, "bincount": 1, "sort and search": 0}
    assert set(forms["product"]["waits"].values()) == {0}


def test_steps_have_plain_gradients_and_no_waits(report: dict[str, Any]) -> None:
    edges, csr = report["parts"]["depth"]["rows"]
    assert (edges["work"]["csr"], csr["work"]["csr"]) == (False, True)
    for row in (edges, csr):
        assert {"plain", "checkpoint", "recollect"} <= set(row["seconds"])
        # The emulation cannot give back a storage's memory, which torch_geometric does to its input.
        assert "resize" in row["skipped"]["pyg"]
        assert row["difference"]["recollect"] < 1e-5
        assert set(row["waits"].values()) == {0}
        assert row["ratios"]["seconds"]["plain"] == 1


def test_bits(report: dict[str, Any]) -> None:
    for name in ("default", "deterministic"):
        assert report["parts"]["bits"][name] == {"gradients": True, "restored": True, "certified": True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_histories_in_all_places(report: dict[str, Any]) -> None:
    row = report["parts"]["histories"]
    assert list(row["seconds"]) == ["device", "memory", "memory, pool", "file", "file, pool"]
    assert row["same_losses"]
    assert row["overlap"]["memory"] == row["seconds"]["memory"] / row["seconds"]["memory, pool"]


def test_gramians_are_torchjds(report: dict[str, Any]) -> None:
    rows = report["parts"]["gramians"]["rows"]
    assert [row["kind"] for row in rows] == ["mlp", "cnn", "transformer"]
    for row in rows:
        if "torchjd" in row["seconds"]:
            assert row["difference"] < 1e-5
        else:
            assert "torchjd" in row["skipped"]["torchjd"]
        assert {"plain", "freed", "told"} <= set(row["seconds"])


def test_what_is_not_measured_has_a_reason(report: dict[str, Any]) -> None:
    reasons = {target.get("why_not_measured") for target in report["targets"] if target["value"] is None}
    assert reasons
    assert all(isinstance(why, str) and len(why) > 10 for why in reasons)
    waits = [target for target in report["targets"] if target["name"].startswith("waits")]
    assert [target["reached"] for target in waits] == [True, True]


def test_waits_are_counted() -> None:
    x = torch.randn(4, device=OTHER)
    assert host_waits(lambda: (x + 1).sum(), OTHER) == 0
    assert host_waits(lambda: [x.sum().item(), x.nonzero(), x.cpu()], OTHER) == 3
    assert emulation.device.sync_debug_mode == "default"
    with pytest.raises(ZeroDivisionError):
        host_waits(lambda: 1 // 0, OTHER)
    assert emulation.device.sync_debug_mode == "default"
    assert host_waits(lambda: None, torch.device("cpu")) is None


def test_waits_of_a_profile() -> None:
    def event(name: str, start: float, end: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))

    events = [
        event("cudaDeviceSynchronize", 0, 1),  # the profiler's own, before and behind
        event("what is measured", 2, 9),
        event("aten::item", 3, 4),
        event("cudaMemcpyAsync", 3, 3.1),
        event("cudaStreamSynchronize", 3.2, 4),
        event("hipEventSynchronize", 5, 6),
        event("cudaDeviceSynchronize", 10, 11),
    ]
    assert synchronizations(events) == 2
    assert synchronizations(None) == 0
    assert profiled_waits(lambda: None, OTHER) is None


def test_who_fails_is_told_and_the_others_are_measured() -> None:
    def broken() -> Any:
        raise RuntimeError("no kernel")

    row = compare({"one": lambda: lambda: None, "broken": broken, "late": lambda: broken}, 2, OTHER)
    assert list(row["seconds"]) == ["one"]
    assert row["skipped"] == dict.fromkeys(("broken", "late"), "RuntimeError: no kernel")
    assert ratios(row, "seconds", "one") == {"one": 1}
    assert "broken: RuntimeError: no kernel" in comparison("title", row)


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "cuda"]])
def test_without_a_card_it_says_what_it_needs(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"needs a card.*bench\.depth, bench\.graph and bench\.objectives"):
        gpu.main([*arguments, "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_parts_that_fail_or_come_too_late_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(sizes: parts.Sizes, device: torch.device) -> parts.Found:
        raise KeyError("lost")

    arguments = ["--quick", "--device", "other", "--output", str(tmp_path), "--only", "forms", "bits"]
    monkeypatch.setitem(parts.PARTS, "forms", fails)
    assert gpu.main([*arguments, "--minutes", "1"])["skipped"] == {"forms": "KeyError: 'lost'"}
    assert set(gpu.main([*arguments, "--minutes", "-1"])["skipped"]) == {"forms", "bits"}
