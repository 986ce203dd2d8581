"""The benchmark of invertible stacks at sizes that say nothing of speed: its numbers are there and are right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import invertible
from bench._exactness import gradient_errors
from bench._harness import settings
from bench._invertible_systems import SYSTEMS, Stack
from bench._invertible_targets import RIGHT, WORKLOADS, ratios, targets, verdicts

CPU = torch.device("cpu")
TINY = ["--quick", "--depths", "3", "9", "--timed", "9", "--repeats", "2", "--exact-depth", "4"]
SMALL = ["--batch", "64", "--channels", "16", "--conv-batch", "2", "--conv-channels", "8"]
ALWAYS = {"plain", "checkpoint", "recollect"}  # those that need no peer


@pytest.fixture
def quiet() -> Iterator[None]:
    """Peers use what torch has deprecated."""
    with settings(threads=None):
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the JSON file says of both kinds of blocks."""
    folder = tmp_path_factory.mktemp("results")
    invertible.main([*TINY, *SMALL, "--output", str(folder)])
    text = (folder / "invertible-quick-cpu.json").read_text()
    assert str(folder) not in text
    assert str(Path.cwd()) not in text
    report = json.loads(text)
    assert set(report["systems"]) == set(SYSTEMS)
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["dropout"] == 0.3
    assert len(report["targets"]) == 10
    return report["parts"]


@pytest.fixture(params=["mlp", "conv"])
def part(request: pytest.FixtureRequest, parts: dict[str, Any]) -> dict[str, Any]:
    return parts[request.param]


def test_every_system_has_numbers_or_a_reason(part: dict[str, Any]) -> None:
    assert [row["depth"] for row in part["rows"]] == [3, 9]
    for row in part["rows"]:
        assert set(row["peak_bytes"]) >= ALWAYS
        for name in SYSTEMS:
            assert (name in row["peak_bytes"]) != (name in row["skipped"])
            assert row["peak_bytes"].get(name, 1) > 0
            assert row["skipped"].get(name, "a reason")
    untimed, timed = part["rows"]
    assert "seconds" not in untimed
    assert set(timed["seconds"]) == set(timed["allocator_bytes"]) == set(timed["peak_bytes"])
    assert all(len(times) == 2 for times in timed["all_seconds"].values())
    for errors in (*part["gradient_errors"].values(), part["right_with_dropout"]):
        assert set(errors) == set(SYSTEMS) - {"plain"}
        assert all(error != "" for error in errors.values())


def test_memory_is_flat_where_it_should_be(part: dict[str, Any]) -> None:
    shallow, deep = (row["peak_bytes"] for row in part["rows"])
    assert deep["recollect"] <= 1.05 * shallow["recollect"]
    assert deep["plain"] > 2 * shallow["plain"]  # which shows that growth would be seen


def test_gradients_are_right_with_dropout(part: dict[str, Any]) -> None:
    errors = part["gradient_errors"]
    assert set(errors) == {f"float{bits}, {word}dropout" for bits in (32, 64) for word in ("", "no ")}
    for case, by_system in errors.items():
        assert by_system["recollect"] <= (1e-10 if "float64" in case else 1e-5)
        assert by_system["checkpoint"] <= (1e-10 if "float64" in case else 1e-5)
    assert part["right_with_dropout"]["recollect"] == part["right_with_dropout"]["checkpoint"] == "yes"


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("blocks", ["mlp", "conv"])
def test_all_systems_compute_the_same(blocks: str) -> None:
    """Without dropout whoever runs agrees with plain autograd, so that times and peaks are of the same work."""
    errors = gradient_errors(Stack(blocks, 4, 8, 4), CPU, layers=4)["float64, no dropout"]
    measured = {name: error for name, error in errors.items() if isinstance(error, float)}
    assert set(measured) >= ALWAYS - {"plain"}
    assert max(measured.values()) < 1e-12


@pytest.mark.usefixtures("quiet")
def test_a_system_that_is_wrong_or_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("cannot")

    monkeypatch.setitem(SYSTEMS, "memcnn", lambda pairs: SYSTEMS["plain"](pairs[:-1]))
    monkeypatch.setitem(SYSTEMS, "checkpoint", fails)
    errors = gradient_errors(Stack("mlp", 4, 8), CPU, layers=3)
    for by_system in errors.values():
        assert by_system["memcnn"] > 1e-2
        assert by_system["checkpoint"] == "RuntimeError: cannot"
    assert verdicts(errors)["memcnn"] == "no"
    assert verdicts(errors)["checkpoint"] == "RuntimeError: cannot"


def rows_of(seconds: dict[str, float], peaks: dict[str, int]) -> list[dict[str, Any]]:
    return [{"depth": 8, "peak_bytes": {"recollect": 1}}, {"depth": 64, "seconds": seconds, "peak_bytes": peaks}]


def test_targets_are_computed_from_the_rows() -> None:
    work = WORKLOADS["mlp"]
    rows = rows_of({"recollect": 3.0, "invtorch": 5.0, "memcnn": 3.75}, {"recollect": 10, "invtorch": 10, "memcnn": 8})
    found = targets(work, rows, {"float64, dropout": {"recollect": 1e-12}})
    assert [target.value for target in found] == pytest.approx([0.6, 0.8, 1.0, 1.25, 1e-12])
    assert [target.reached for target in found] == [True, False, True, False, True]
    assert ratios(rows, "seconds", 8) == dict.fromkeys(set(SYSTEMS) - {"recollect"})


def test_targets_without_a_measurement_say_why() -> None:
    times = {"recollect": 3.0, "invtorch": 5.0}
    found = targets(
        WORKLOADS["conv"], rows_of(times, {"recollect": 1}), {"float64, dropout": {"recollect": "Error: x"}}
    )
    assert [target.value for target in found] == [0.6, None, None, None, None]
    assert [target.why_not_measured for target in found[1:]] == [*["not measured"] * 3, "Error: x"]
    small = targets(Stack("mlp", 4, 8), rows_of(times, {}), {"float64, dropout": {"recollect": 10 * RIGHT}})
    assert [target.value for target in small] == [None] * 4 + [10 * RIGHT]
    assert {target.why_not_measured for target in small[:4]} == {"set for another size"}
