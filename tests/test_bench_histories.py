"""The benchmark of histories at sizes that say nothing of speed: what it measures, and holds against targets."""

import warnings

import pytest
import torch

with warnings.catch_warnings():  # torch_geometric warns on its own import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    from bench import _graph_histories as histories
    from bench import _graph_resident as resident
    from bench._graph_works import Work

CPU = torch.device("cpu")
SMALL = Work(300, block=30, layers=3, channels=8, part=30, parts_in_batch=2, method="random")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_every_place_has_a_time_and_the_same_losses():
    row = histories.measure_steps(SMALL, CPU, repeats=2, steps=2)
    assert list(row["seconds"]) == ["memory", "memory, pool", "file", "file, pool"]
    assert row["same_losses"]
    assert row["ratio"]["memory"] == 1
    for times in row["all_seconds"].values():
        assert len(times) == 2
    assert len(row["batch_nodes"]) == len(row["halo_nodes"]) == 2
    on_cpu, on_card = histories.steps_targets(row)
    assert on_cpu.value == row["ratio"]["file, pool"]
    assert on_card.value is None
    assert "file, pool" in histories.steps_table(row)


def test_other_losses_are_seen(monkeypatch):
    places = histories.places

    def other_places(*arguments):
        found = places(*arguments)
        found["memory"]["history_dtype"] = torch.int8
        return found

    monkeypatch.setattr(histories, "places", other_places)
    assert not histories.measure_steps(SMALL, CPU, repeats=1, steps=2)["same_losses"]


def test_the_resident_part_of_a_file_in_a_process_of_its_own():
    (row,) = resident.measure_resident((4000,), channels=64, batch=100, halo=300)
    assert 4000 * 64 * 4 < row["file_bytes"] < 4000 * 64 * 4 * 1.1
    assert "4,000" in resident.resident_table([row])
    (target,) = resident.resident_targets([{**row, "resident_peak_bytes": 10}, {**row, "resident_peak_bytes": 11}])
    assert target.value == 1.1
    (target,) = resident.resident_targets([{**row, "resident_peak_bytes": None}] * 2)
    assert target.value is None


def test_what_fails_there_is_told_here():
    with pytest.raises(RuntimeError, match="num_embeddings must be at least 1"):
        resident.measure_resident((0,))
