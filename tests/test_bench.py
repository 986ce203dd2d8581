"""The benchmark at sizes that say nothing of speed: what it writes is there, is right, and is held against targets."""

from __future__ import annotations

import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

with warnings.catch_warnings():  # torch_geometric warns on its own import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    from bench import depth

from bench import _harness as harness
from bench import _tolokers
from bench._exactness import gradient_errors
from bench._measure import expected_bytes, measure
from bench._report import OTHER_DEVICE, OTHER_PART, OTHER_SIZE, Target, finish, write_json
from bench._step import relative_error
from bench._systems import ON_CSR, ON_EDGES, SYSTEMS, Workload
from bench._targets import CSR_WORKLOAD, WORKLOAD, csr_targets, depth_targets

CPU = torch.device("cpu")
QUICK = ["--quick", "--timed", "4", "--csr-timed", "8", "--repeats", "2"]
LONG = ["--long", "--long-depths", "4", "12", "--long-nodes", "60", "--long-edges", "200"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON files of the quick form with the long part."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "gradient_errors", functools.partial(gradient_errors, layers=12))
        depth.main([*QUICK, *LONG, "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "depth-quick-cpu.json").read_text())


@pytest.fixture(scope="module")
def long(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "depth-long-quick-cpu.json").read_text())


@pytest.fixture(scope="module")
def csr(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "depth-csr-quick-cpu.json").read_text())


def test_the_peers_on_a_csr_adjacency(csr: dict[str, Any]) -> None:
    """All compute the same network, and the reversible ones have a flat peak."""
    for row in csr["rows"]:
        assert set(row["peak_bytes"]) == set(ON_CSR)
        assert row["peak_bytes"]["recollect"] < min(row["peak_bytes"]["pyg"], row["peak_bytes"]["checkpoint"])
    ours = [row["peak_bytes"]["recollect"] for row in csr["rows"]]
    assert max(ours) <= 1.05 * min(ours)
    assert [set(row.get("seconds", ())) for row in csr["rows"]] == [set(), set(ON_CSR), set()]
    for case, by_system in csr["gradient_errors"].items():
        exact = by_system if "no dropout" in case else {"recollect": by_system["recollect"]}
        assert max(exact.values()) <= (1e-10 if "float64" in case else 1e-5)


def test_reports_say_where_they_come_from(folder: Path, table: dict[str, Any], long: dict[str, Any]) -> None:
    for report in (table, long):
        assert report["machine"]["device"] == "cpu"
        assert report["versions"]["torch"] == torch.__version__
        assert report["settings"]["channels"] == 32
        assert report["date"]
    for file in folder.iterdir():
        assert str(folder) not in file.read_text()
        assert str(Path.cwd()) not in file.read_text()


def test_every_system_has_numbers_or_a_reason(table: dict[str, Any], long: dict[str, Any]) -> None:
    for row in table["rows"] + long["rows"]:
        assert {"plain", "checkpoint", "pyg", "recollect"} <= set(row["peak_bytes"])
        for name in ON_EDGES:
            assert (name in row["peak_bytes"]) != (name in row["skipped"])
            assert row["peak_bytes"].get(name, 1) > 0
            assert row["skipped"].get(name, "a reason")
    for errors in table["gradient_errors"].values():
        assert set(errors) == set(ON_EDGES) - {"plain"}


def test_times_are_medians_of_the_timed_depth(table: dict[str, Any]) -> None:
    timed, *others = table["rows"]
    assert timed["depth"] == 4
    for name, times in timed["all_seconds"].items():
        assert len(times) == 2
        assert timed["seconds"][name] == pytest.approx(sum(times) / 2)
        assert timed["allocator_bytes"][name] == pytest.approx(timed["peak_bytes"][name], rel=0.1)  # a second opinion
    assert all("seconds" not in row for row in others)


def test_memory_is_flat_where_it_should_be(table: dict[str, Any]) -> None:
    peaks = [row["peak_bytes"] for row in table["rows"]]
    ours = [peak["recollect"] for peak in peaks]
    assert max(ours) <= 1.05 * min(ours)
    assert peaks[2]["plain"] > 2 * peaks[0]["plain"]  # which shows that growth would be seen
    assert all(peak["recollect"] < peak["pyg"] for peak in peaks)


def test_gradients_are_exact(table: dict[str, Any]) -> None:
    for case, by_system in table["gradient_errors"].items():
        assert by_system["recollect"] <= (1e-10 if "float64" in case else 1e-5)
    names = {target["name"]: target for target in table["targets"]}
    error = table["gradient_errors"]["float64, dropout"]["recollect"]
    assert names["gradient error at 64 layers, float64, dropout"] == {
        "name": "gradient error at 64 layers, float64, dropout",
        "value": error,
        "limit": 1e-10,
        "strict": False,
        "reached": True,
    }


def test_long_part_compares_the_reconstructed_input(long: dict[str, Any]) -> None:
    for row in long["rows"]:
        assert row["restored_input"]["plain"] == {"error": None, "how": "none: the input of every layer is kept"}
        for name in ("pyg", "recollect"):
            assert 0 < row["restored_input"][name]["error"] < 1e-4
            assert row["gradient_error"][name] < 1e-4
        # The system's own word is of a sample of the same error.
        assert row["drift"]["recollect"] == pytest.approx(row["restored_input"]["recollect"]["error"], rel=0.9)
        assert all(len(times) == 1 for times in row["all_seconds"].values())


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        (Target("a", 0.9, 1.0), True),
        (Target("a", 1.0, 1.0), True),
        (Target("a", 1.1, 1.0), False),
        (Target("a", 1.0, 1.0, strict=True), False),
        (Target("a", math.nan, 1.0), False),
        (Target("a", None, 1.0, why_not_measured="no time"), None),
    ],
)
def test_target(target: Target, reached: bool | None) -> None:
    assert target.reached is reached
    assert target.as_dict()["reached"] is reached
    word = {True: "reached", False: "NOT REACHED", None: "not measured"}[reached]
    assert target.line().strip().startswith(word)
    assert ("no time" in target.line()) == (reached is None)


def test_only_numbers_that_were_asked_for_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [Target("near", 1.0, 1.0), Target("lost", None, 1.0, why_not_measured="RuntimeError: no")]
    others = [Target(why, None, 1.0, why_not_measured=why) for why in (OTHER_PART, OTHER_SIZE, OTHER_DEVICE)]
    report = finish({}, [*targets, *others], tmp_path / "some.json")
    printed = capsys.readouterr().out.strip().splitlines()
    assert [line.split(":")[0].split()[-1] for line in printed[1:3]] == ["near", "lost"]
    assert printed[3:] == ["  3 of other parts, sizes or devices: listed in some.json"]
    assert [target["name"] for target in report["targets"]][2:] == [OTHER_PART, OTHER_SIZE, OTHER_DEVICE]


def rows_of(seconds: float, deep: int, pyg: int) -> list[dict[str, Any]]:
    peaks = [{"recollect": 100, "pyg": 120}, {"recollect": 100, "pyg": 120}, {"recollect": deep, "pyg": pyg}]
    times = {"recollect": seconds, "pyg": 5.0, "plain": 2.5, "checkpoint": 4.0}
    rows: list[dict[str, Any]] = [{"depth": d, "peak_bytes": p} for d, p in zip((8, 16, 256), peaks, strict=True)]
    rows[1]["seconds"] = times
    return rows


def errors_of(double: float | str, single: float) -> dict[str, dict[str, float | str]]:
    return {"float64, dropout": {"recollect": double}, "float32, dropout": {"recollect": single}}


def test_targets_are_computed_from_the_rows() -> None:
    reached = depth_targets(WORKLOAD, rows_of(3.0, 104, 120), errors_of(1e-12, 1e-6))
    assert [target.value for target in reached] == pytest.approx([0.6, 1.2, 0.75, 1.04, 104 / 120, 1e-12, 1e-6])
    assert all(target.reached for target in reached)
    missed = depth_targets(WORKLOAD, rows_of(4.5, 106, 106), errors_of(1e-9, 1e-4))
    assert [target.value for target in missed] == pytest.approx([0.9, 1.8, 1.125, 1.06, 1.0, 1e-9, 1e-4])
    assert [target.reached for target in missed] == [False] * 7


def test_targets_against_a_csr_adjacency() -> None:
    rows = rows_of(3.0, 104, 120)
    for row, checkpoint in zip(rows, (200, 110, 1000), strict=True):
        row["peak_bytes"] |= {"checkpoint": checkpoint, "uncertified": 100}
    rows[1]["all_seconds"] = {"recollect": [3.0, 9.0, 3.1], "uncertified": [3.0, 8.8, 3.0]}
    found = csr_targets(CSR_WORKLOAD, rows, errors_of(1e-12, 1e-6))
    values = [1.2, 0.6, 0.75, 9 / 8.8, 1.04, 104 / 120, 100 / 110, 1.04, 1e-12, 1e-6]
    assert [target.value for target in found] == pytest.approx(values)
    assert [target.reached for target in found] == [True] * 7 + [False] + [True] * 2  # the certificate adds to the peak
    missed = csr_targets(CSR_WORKLOAD, rows_of(4.1, 106, 106), errors_of(1e-9, 1e-4))
    assert [target.reached for target in missed] == [*[False] * 3, None, False, False, None, None, False, False]


def test_depths_that_a_peer_cannot_reach_are_not_lost() -> None:
    rows = rows_of(3.0, 104, 120)
    del rows[2]["peak_bytes"]["pyg"]
    (peak,) = (target for target in depth_targets(WORKLOAD, rows, errors_of(0, 0)) if "worst" in target.name)
    assert (peak.value, peak.why_not_measured) == (None, "not measured at every depth")
    rows[2]["skipped"] = {"pyg": "would need about 7.0 GB, more than --max-plain-gb 6"}
    (peak,) = (target for target in depth_targets(WORKLOAD, rows, errors_of(0, 0)) if "worst" in target.name)
    assert peak.value == 100 / 120


def test_targets_without_a_measurement_say_why() -> None:
    small = Workload(100, 400, 16, "bare")
    rows = [{"depth": 16, "peak_bytes": {"recollect": 100}, "seconds": {"recollect": 1.0, "pyg": 2.0}}]
    found = depth_targets(small, rows, errors_of("RuntimeError: no", 1e-6))
    assert [target.reached for target in found] == [None] * 6 + [True]
    assert [target.why_not_measured for target in found[:6]] == [
        *[OTHER_SIZE] * 3,
        OTHER_PART,
        "not measured at every depth",
        "RuntimeError: no",
    ]


def test_a_system_that_would_need_too_much_is_skipped() -> None:
    earlier = [
        {"depth": depth, "peak_bytes": {"plain": depth * 10**9, "recollect": 10**6}, "skipped": {}} for depth in (1, 2)
    ]
    assert expected_bytes(earlier, "plain", 5) == 5e9
    assert expected_bytes(earlier, "recollect", 5) == 1e6
    assert expected_bytes(earlier[:1], "plain", 5) is None
    work = Workload(20, 40, 8, "layer")
    row = measure(work, 5, earlier, repeats=0, max_gb=4.9, compare=False, device=CPU)
    assert row["skipped"]["plain"] == "would need about 5.0 GB, more than --max-plain-gb 4.9"
    assert {"checkpoint", "pyg", "recollect"} <= set(row["peak_bytes"])
    assert "plain" not in row["peak_bytes"]


def test_a_system_that_is_wrong_or_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("cannot")

    monkeypatch.setitem(SYSTEMS, "pyg", lambda blocks, graph: SYSTEMS["plain"](blocks[:-1], graph))
    monkeypatch.setitem(SYSTEMS, "checkpoint", fails)
    for errors in gradient_errors(Workload(20, 40, 8, "layer"), CPU, layers=3).values():
        assert errors["pyg"] > 1e-2
        assert errors["checkpoint"] == "RuntimeError: cannot"


def test_relative_error() -> None:
    expected = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    assert relative_error(expected, expected) == 0
    assert relative_error([torch.tensor([3.5]), torch.tensor([0.0, 4.0])], expected) == pytest.approx(0.1)


def test_json_has_no_bare_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"a": math.nan, "b": [1.5, {"c": -math.inf}]})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": "nan", "b": [1.5, {"c": "-inf"}]}


@pytest.fixture
def tolokers(tmp_path: Path) -> Path:
    """A graph of 30 nodes in the file layout of the real one."""
    rng = np.random.default_rng(0)
    part = np.stack([rng.permutation(np.arange(30) % 3) for _ in range(10)])
    file = tmp_path / "data" / _tolokers.RAW_FILE
    file.parent.mkdir(parents=True)
    np.savez_compressed(
        file,
        node_features=rng.normal(size=(30, 4)).astype(np.float32),
        node_labels=np.arange(30) % 2,
        edges=np.unique(np.sort(rng.integers(0, 30, (60, 2)), axis=1), axis=0),
        train_masks=part == 0,
        val_masks=part == 1,
        test_masks=part == 2,
    )
    return tmp_path / "data"


def test_step_on_tolokers(tolokers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", str(tolokers))
    depth.main(["--no-table", "--tolokers", "--tolokers-layers", "2", "--output", str(tmp_path / "results")])
    text = (tmp_path / "results" / "tolokers-try-cpu.json").read_text()
    assert str(tmp_path) not in text
    report = json.loads(text)
    step = report["step"]
    assert (step["nodes"], step["layers"], step["channels"]) == (30, 2, 80)
    # Parameters, their gradients and Adam's two moments are four times the parameters; features come on top.
    assert step["tensor_bytes"] > 4 * step["parameter_bytes"]
    assert step["resident_bytes"] > step["tensor_bytes"]
    assert step["seconds"] > 0
    assert math.isfinite(step["loss"])
    assert [target["reached"] for target in report["targets"]] == [None, None]
    assert [file.name for file in tolokers.rglob("*") if file.is_file()] == ["tolokers.npz"]  # nothing written beside


@pytest.mark.parametrize(("gigabytes", "reached"), [(1.9, True), (2.0, False)])
def test_targets_of_tolokers(gigabytes: float, reached: bool) -> None:
    found = {"layers": 1001, "channels": 80, "tensor_bytes": int(gigabytes * 1e9), "resident_bytes": None}
    tensors, resident = _tolokers.targets(found)
    assert tensors.reached is reached
    assert (resident.reached, resident.why_not_measured) == (None, "not known on this system")


@pytest.mark.parametrize("arguments", [["--tolokers"], ["--tolokers", "nowhere"]])
def test_missing_data_is_said_at_once(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RECOLLECT_DATA", raising=False)
    with pytest.raises(SystemExit, match="2"):
        depth.main(arguments)
    assert "--tolokers" in capsys.readouterr().err.splitlines()[-1]


def test_settings_are_put_back() -> None:
    before, filters = torch.get_num_threads(), list(warnings.filters)
    with harness.settings(threads=before + 1):
        assert torch.get_num_threads() == before + 1
        warnings.warn("not seen", UserWarning, stacklevel=1)
    assert torch.get_num_threads() == before
    assert list(warnings.filters) == filters
