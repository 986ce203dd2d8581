from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import replace

import pytest
from rich.console import Console

from recollect.train import TrainingError, UsageError, train
from recollect.train._config import parse
from recollect.train._several import _run_settings

RUN = [
    *("dataset=karate", "model=gcn", "training=autoscale", "training.num_parts=4", "training.parts_per_batch=1"),
    *("epochs=5", "threads=1", "measure.repeats=1", "optimizer.lr=0.01", "seed=3", "runs=3"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("runs") / "runs", io.StringIO()
    summary = train([*RUN, f"run_dir={folder}"], Console(file=text, width=200))
    return folder, summary, text.getvalue()


def own_summaries(folder):
    return [json.loads((folder / f"seed_{seed}" / "summary.json").read_text()) for seed in (3, 4, 5)]


def last_loss(path):
    with path.open(newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)][-1]


def test_scores_are_means_with_deviations(finished):
    folder, summary, _ = finished
    for key in ("test_accuracy", "val_accuracy"):
        values = [own[key] for own in own_summaries(folder)]
        assert summary[key] == pytest.approx(statistics.mean(values))
        assert summary[f"{key}_std"] == pytest.approx(statistics.stdev(values))
    assert [result["seed"] for result in summary["results"]] == [3, 4, 5]
    assert len({last_loss(folder / f"seed_{seed}" / "metrics.csv") for seed in (3, 4, 5)}) == 3
    assert summary["epochs"] == 15
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_each_run_is_the_one_that_its_seed_alone_gives(finished, tmp_path):
    folder, summary, _ = finished
    alone = train([*RUN[:-2], "seed=4", "measure.enabled=false", f"run_dir={tmp_path / 'alone'}"])
    assert alone["test_accuracy"] == summary["results"][1]["test_accuracy"]
    assert (tmp_path / "alone" / "metrics.csv").exists()
    assert {path.name for path in (folder / "seed_4").iterdir()} >= {"summary.json", "report.html", "metrics.csv"}


def test_the_terminal_has_a_line_for_each_run_and_the_mean(finished):
    _, summary, text = finished
    assert text.count("histories: 1 x 34 rows, float32: 2.3 KiB (cpu)") == 1
    assert text.index("histories: ") < text.index("run 1 of 3 (seed 3): test accuracy")
    assert "run 3 of 3 (seed 5): test accuracy" in text
    mean, deviation = (100 * summary[key] for key in ("test_accuracy", "test_accuracy_std"))
    assert f"{mean:.2f} ± {deviation:.2f} %" in text


def test_the_report_has_every_run_and_the_mean(finished):
    folder, summary, _ = finished
    page = (folder / "report.html").read_text()
    mean, deviation = (100 * summary[key] for key in ("test_accuracy", "test_accuracy_std"))
    assert f"{mean:.2f} ± {deviation:.2f} %" in page
    for result in summary["results"]:
        assert f"<td>{result['seed']}</td>" in page
        assert f"<td>{100 * result['test_accuracy']:.2f} %</td>" in page
    assert "3 runs" in page


def test_costs_are_measured_once(finished):
    folder, summary, _ = finished
    assert [own["peak_bytes"] is not None for own in own_summaries(folder)] == [True, False, False]
    assert summary["peak_bytes"] == own_summaries(folder)[0]["peak_bytes"]


def test_what_is_finished_is_taken_as_it_is_and_the_rest_is_run(finished, tmp_path):
    folder = tmp_path / "runs"
    summary = train([*RUN[:-1], "runs=2", "measure.enabled=false", f"run_dir={folder}"])
    for name in ("summary.json", "report.html", "seed_4/summary.json"):
        (folder / name).unlink()
    changed = json.loads((folder / "seed_3" / "summary.json").read_text()) | {"test_accuracy": 0.125}
    (folder / "seed_3" / "summary.json").write_text(json.dumps(changed))
    again = train([f"resume={folder}"])
    assert [own["test_accuracy"] for own in again["results"]] == [0.125, summary["results"][1]["test_accuracy"]]
    assert (folder / "report.html").exists()


def test_runs_share_a_folder_of_histories(tmp_path):
    overrides = [*RUN[:-1], "runs=2", "measure.enabled=false", f"training.history_path={tmp_path / 'histories'}"]
    on_disk = train([*overrides, f"run_dir={tmp_path / 'disk'}"])
    in_memory = train([*RUN[:-1], "runs=2", "measure.enabled=false", f"run_dir={tmp_path / 'memory'}"])
    assert [own["val_accuracy"] for own in on_disk["results"]] == [own["val_accuracy"] for own in in_memory["results"]]


def test_splits_go_round():
    settings = parse(["dataset=wikics", "model=gcn", "dataset.options.split=18", "runs=4", "seed=7"])
    runs = [_run_settings(settings, number, 20) for number in range(4)]
    assert [run.dataset.options["split"] for run in runs] == [18, 19, 0, 1]
    assert [run.seed for run in runs] == [7, 8, 9, 10]
    assert {run.runs for run in runs} == {1}
    assert [run.measure.enabled for run in runs] == [True, False, False, False]
    assert replace(runs[0], runs=4) == settings


def test_one_split_is_for_all_runs():
    settings = parse(["dataset=cora", "runs=2"])
    assert _run_settings(settings, 1, 1).dataset == settings.dataset


def test_runs_that_cannot_start_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match=r"Planetoid/PubMed/raw: ind\.pubmed\.x, [\s\S]*download=true"):
        train(["preset=pubmed_gcn", f"data.root={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_that_is_too_small_is_wrong_usage(tmp_path):
    overrides = [*RUN[:-1], "training.pool_size=2", "training.buffer_size=1", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UsageError, match=r"training.buffer_size=1 is too small: .*buffer_size=\d+"):
        train(overrides)
