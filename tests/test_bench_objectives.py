"""The benchmark of objectives at sizes that say nothing of speed: its numbers are there and are right."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():  # torch_geometric warns on its own import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    from bench._objectives_networks import gpt, lstm, resnet, vit
    from bench._objectives_works import Work, cnn, gnn, mlp, transformer

from bench import _objectives_certificate as certificate
from bench import _objectives_systems as systems
from bench import objectives
from bench._harness import alternating, peak_bytes, settings
from bench._objectives_measure import foretold_bytes, measure
from bench._objectives_systems import HOLDS_THE_JACOBIAN, SYSTEMS, make_step
from bench._objectives_targets import (
    CNN,
    DEEP,
    GNN,
    GPT,
    LIMITS,
    LSTM,
    MLP,
    RESNET,
    TRANSFORMER,
    VIT,
    certificate_targets,
    name_of,
    ratios,
    targets,
    weight_targets,
)
from bench._step import UnavailableError, relative_error

from recollect.autogram import Engine

CPU = torch.device("cpu")
PEERS = {"torchjd", "autojac"}
ALWAYS = set(SYSTEMS) - PEERS
DEEP_ONES = ("resnet", "vit", "gpt", "lstm")
WORKS = {
    "mlp": lambda: mlp(5, 6, CPU, inputs=7),
    "cnn": lambda: cnn(3, 2, CPU),
    "transformer": lambda: transformer(5, 8, 1, 3, CPU),
    "gnn": lambda: gnn(11, 30, 4, 2, 5, CPU),
    "resnet": lambda: resnet(3, 8, CPU),
    "vit": lambda: vit(3, 8, 1, CPU, patch=16),
    "gpt": lambda: gpt(3, 8, 1, 4, CPU, vocabulary=11),
    "lstm": lambda: lstm(3, 8, 4, CPU),
}


@pytest.fixture(params=WORKS)
def work(request: pytest.FixtureRequest) -> Work:
    torch.manual_seed(0)
    return WORKS[request.param]()


@pytest.fixture(autouse=True)
def quiet():
    """Peers use what torch has deprecated."""
    with settings(threads=None):
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the JSON file says."""
    folder = tmp_path_factory.mktemp("results")
    objectives.main(["--quick", "--repeats", "2", "--output", str(folder)])
    text = (folder / "objectives-quick-cpu.json").read_text()
    assert str(folder) not in text
    assert str(Path.cwd()) not in text
    return json.loads(text)


def test_every_work_and_system_has_numbers_or_a_reason(report: dict[str, Any]) -> None:
    assert report["versions"]["torch"] == torch.__version__
    assert "torchjd" in report["versions"]
    assert set(report["systems"]) == set(SYSTEMS)
    assert [row["kind"] for row in report["rows"]] == list(WORKS)
    for row in report["rows"]:
        assert set(row["seconds"]) >= ALWAYS - set(HOLDS_THE_JACOBIAN if row["kind"] in DEEP_ONES else ())
        for name in SYSTEMS:
            assert (name in row["seconds"]) != (name in row["skipped"])
            assert row["skipped"].get(name, "a reason")
        for key in ("peak_bytes", "gramian_seconds", "seconds"):
            assert set(row[key]) == set(row["seconds"])
            assert all(value > 0 for value in row[key].values())
        assert all(len(times) == 2 for times in row["all_seconds"].values())
        assert all(row["gramian_seconds"][name] < max(row["all_seconds"][name]) for name in row["seconds"])


def test_all_systems_have_the_same_gramian(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert set(row["difference"]) == set(row["seconds"]) - {"plain", "recollect"}
        assert all(value < 1e-5 for value in row["difference"].values())


def test_weights_have_numbers(report: dict[str, Any]) -> None:
    assert [row["objectives"] for row in report["weights"]] == [8, 16]
    for row in report["weights"]:
        for found in (row, *row["kinds"].values()):
            assert found["seconds"]["recollect"] > 0
            assert found["residual"] < 1e-6
            assert ("torchjd" in found["seconds"]) != ("why_not_measured" in found)
            if "torchjd" in found["seconds"]:
                assert abs(found["objective_difference"]) < 1e-6


def test_numbers_to_reach_are_all_listed(report: dict[str, Any]) -> None:
    names = [target["name"] for target in report["targets"]]
    assert len(names) == len(set(names)) == len(LIMITS) + 10
    assert {target["reached"] for target in report["targets"]} == {None}  # these sizes are none of the targets'
    assert all(target["why_not_measured"] == "not part of this run" for target in report["targets"])


def test_a_works_gramian_is_that_of_its_jacobian(work: Work) -> None:
    model = work.model
    losses = work.losses(model)
    assert losses.shape == (work.objectives,)
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    for name in ("recollect", "told", *(["batched"] if work.by_rows else [])):
        step = make_step(name, work, CPU)
        step()
        assert relative_error([step.gramian], [jacobian @ jacobian.T]) < 1e-5


def test_the_sizes_that_targets_are_set_for() -> None:
    """They are those of the options' defaults."""
    options = objectives._parse([])
    options.mlp_batches, options.cnn_batches, options.transformer_batches = [64], [64], [32]
    names = [str(make()) for make in objectives._makers(options, CPU)]
    deep = [RESNET.format(32), RESNET.format(128), VIT, GPT, LSTM]
    assert names == [MLP.format(64), CNN.format(64), TRANSFORMER.format(32), GNN, *deep]
    assert list(DEEP) == deep


def test_foretold_bytes_are_those_of_all_rows(work: Work) -> None:
    if not work.by_rows:
        pytest.skip("these systems are not measured on it")
    for name in ("autojac", "batched"):
        try:
            step = make_step(name, work, CPU)
        except UnavailableError:
            continue
        foretold = foretold_bytes(name, work, CPU)
        if work.objectives <= 4:
            assert foretold is None
        else:
            assert foretold == pytest.approx(peak_bytes(step, CPU), rel=0.2)
    assert foretold_bytes("recollect", work, CPU) is None


def test_a_system_that_fails_needs_too_much_or_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any, batch_dim: Any) -> Any:
        raise UnavailableError("not here")

    monkeypatch.setitem(systems.SYSTEMS, "torchjd", fails)
    row = measure(WORKS["mlp"](), repeats=3, patience=0.0, max_gb=1e-6, device=CPU)
    assert row["skipped"]["torchjd"] == "UnavailableError: not here"
    assert "more than --max-gb 1e-06" in row["skipped"]["batched"]
    assert {len(times) for times in row["all_seconds"].values()} == {2}  # nobody is as fast as patience asks
    found = next(target for target in targets([row]) if target.name.startswith("mlp"))
    assert found.why_not_measured == "not part of this run"


def test_turns_by_name() -> None:
    calls = []
    times = alternating({name: lambda name=name: calls.append(name) for name in "abc"}, {"a": 3, "b": 1, "c": 2}, CPU)
    assert calls == ["a", "b", "c", "c", "a", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 1, "c": 2}
    assert alternating({}, 3, CPU) == {}


def row_of(work: str, ours: float, peer: float) -> dict[str, Any]:
    kind, size = work.split(", ", 1)
    both = {"recollect": ours, "freed": ours / 2, "plain": peer / 2, "told": peer / 2, "torchjd": peer}
    return {"kind": kind, "size": size, "skipped": {}, "seconds": both, "gramian_seconds": both, "peak_bytes": both}


@pytest.mark.parametrize(("ours", "reached"), [(1.0, True), (300.0, False)])
def test_targets_are_computed_from_the_rows(ours: float, reached: bool) -> None:
    rows = [row_of(work, ours, 100.0) for work in {work for work, *_ in LIMITS}]
    found = targets(rows)
    assert [target.value for target in found] == pytest.approx([ours / 100] * len(LIMITS))
    assert [target.reached for target in found] == [reached] * len(LIMITS)
    assert ratios(rows[0], "seconds") == {"freed": 2, "plain": ours / 50, "told": ours / 50, "torchjd": ours / 100}
    assert name_of(rows[0]) in {work for work, *_ in LIMITS}


def test_limits_are_those_that_were_set() -> None:
    by_work = {(work, key, peer): limit for work, key, _, peer, limit in LIMITS}
    assert by_work[MLP.format(64), "gramian_seconds", "torchjd"] == 1 / 25
    assert by_work[MLP.format(256), "gramian_seconds", "torchjd"] == 1 / 50
    assert by_work[MLP.format(256), "peak_bytes", "torchjd"] == 1 / 5
    assert sum(limit == 1.35 for limit in by_work.values()) == 6
    assert sum(limit == 1.3 for (_, key, _), limit in by_work.items() if key == "peak_bytes") == 6 + len(DEEP)
    deep = {(work, limit) for work, key, _, peer, limit in LIMITS if key == "seconds" and work in DEEP}
    assert deep == {(RESNET.format(32), 1.5), (RESNET.format(128), 1.5), (VIT, 1.4), (GPT, 1.4), (LSTM, 2.0)}
    assert {by_work[MLP.format(b), key, "told"] for b in (64, 256) for key in ("seconds", "peak_bytes")} == {1.15}
    assert by_work[GNN, "seconds", "torchjd"] == 1 / 3
    assert by_work[GNN, "peak_bytes", "torchjd"] == 1 / 2
    assert {(ours, peer) for *_, ours, peer, _ in LIMITS} == {
        ("recollect", "torchjd"),
        ("freed", "plain"),
        ("freed", "told"),
    }


def test_a_target_without_a_measurement_says_why() -> None:
    row = row_of(MLP.format(64), 1.0, 100.0)
    del row["gramian_seconds"]["torchjd"]
    row["skipped"] = {"torchjd": "UnavailableError: torchjd cannot be imported", "autojac": "another reason"}
    first, other, *_ = targets([row])
    assert (first.reached, first.why_not_measured) == (None, "torchjd: UnavailableError: torchjd cannot be imported")
    assert (other.reached, other.why_not_measured) == (None, "not part of this run")


def test_the_certificate_is_what_makes_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    certify = Engine._certify
    monkeypatch.setattr(Engine, "_certify", lambda *given: compared.append(given[-1]) or certify(*given))
    work = WORKS["mlp"]()
    steps, gradients = certificate.steps(work), []
    for name, count in (("uncertified", 0), ("certified", 1), ("uncertified", 1)):
        work.model.zero_grad()
        steps[name]()
        gradients.append([parameter.grad for parameter in work.model.parameters()])
        assert len(compared) == count
    assert compared[0] > 0
    for found in gradients[1:]:
        assert all(map(torch.equal, found, gradients[0]))


def test_targets_of_the_certificate(report: dict[str, Any]) -> None:
    (row,) = report["certificates"]
    assert len(row["all_seconds"]["certified"]) == len(row["all_seconds"]["uncertified"]) == 2 * certificate.HOW_OFTEN
    assert abs(row["share"]) < 1
    rows = [{"kind": "mlp", "size": MLP.format(b).removeprefix("mlp, "), "share": b / 6400} for b in (64, 256)]
    assert [target.reached for target in certificate_targets(rows)] == [True, False]
    assert [target.why_not_measured for target in certificate_targets([])] == ["not part of this run"] * 2


def test_targets_of_weights() -> None:
    rows = [
        {"objectives": 64, "seconds": {"recollect": 1.0, "torchjd": 5.0}, "objective_difference": -1e-7},
        {"objectives": 112, "seconds": {"recollect": 1.0, "torchjd": 39.0}, "objective_difference": 1e-5},
    ]
    found = weight_targets(rows)
    assert [target.reached for target in found] == [True, True, False, False, None, None]
    assert [target.limit for target in found] == [1 / 4, 1e-6, 1 / 40, 1e-6, 1 / 40, 1e-6]
