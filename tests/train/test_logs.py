from __future__ import annotations

import csv

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recollect.train._logs import Logs


def row(epoch: int, drift: float = 1e-5) -> dict[str, float]:
    return {"epoch": epoch, "loss": 1 / epoch, "drift": drift, "val_accuracy": 0.5}


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


def test_rows_are_there_at_once_and_only_once(tmp_path):
    logs = Logs(tmp_path, [])
    for epoch in (1, 2, 3):
        logs.add(row(epoch))
        with (tmp_path / "metrics.csv").open() as file:
            assert [int(line["epoch"]) for line in csv.DictReader(file)] == list(range(1, epoch + 1))
    logs.close()
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 0.5), (3, 0.333333)]


def test_what_the_checkpoint_does_not_know_is_replaced(tmp_path):
    logs = Logs(tmp_path, [])
    for epoch in (1, 2, 3):
        logs.add(row(epoch))
    logs.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,0.2")  # half a row
    logs = Logs(tmp_path, [row(1), row(2)])
    logs.add(row(3, drift=1e-3))
    logs.close()
    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["epoch"], line["drift"]) for line in lines] == [("1", "1e-05"), ("2", "1e-05"), ("3", "0.001")]
    assert [step for step, _ in scalars(tmp_path, "loss")] == [1, 2, 3]


def test_a_drift_that_was_not_measured_is_nan(tmp_path):
    logs = Logs(tmp_path, [])
    logs.add(row(1, drift=float("nan")))
    logs.close()
    with (tmp_path / "metrics.csv").open() as file:
        assert next(csv.DictReader(file))["drift"] == "nan"
