from __future__ import annotations

import csv
import io
import json
import re
import shlex
import sys

import pytest
import torch
import yaml
from rich.console import Console

from recollect.data import load
from recollect.train import InvalidRunError, NonFiniteLossError, TrainingError, UsageError, train
from recollect.train._config import parse, read
from recollect.train._folder import RunFolder, create
from recollect.train._metrics import score
from recollect.train.families import family_of

KEYS = {
    *("dataset", "model", "layers", "parameters", "test_accuracy", "val_accuracy", "epochs", "seconds", "peak_bytes"),
    *("peak_bytes_plain", "torch", "device", "metric"),
}


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [line["loss"] for line in csv.DictReader(file)]


def test_a_run_leaves_its_files(tiny, tmp_path):
    folder = tmp_path / "run"
    summary = train([*tiny, f"run_dir={folder}"])
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml", "checkpoint.ckpt", "metrics.csv", "tensorboard", "summary.json", "report.html",
    }  # fmt: skip
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary.keys() >= KEYS
    assert (summary["dataset"], summary["model"], summary["layers"], summary["epochs"]) == ("karate", "revgnn", 3, 4)
    assert (summary["device"], summary["torch"], summary["metric"]) == ("cpu", torch.__version__, "accuracy")
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["num_layers"] == 3
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() >= {"epoch", "loss", "train_accuracy", "val_accuracy", "drift", "seconds"}


def test_the_test_score_is_that_of_the_kept_parameters(tiny, tmp_path):
    unsteady = ("epochs=8", "seed=0", "optimizer.lr=0.2", "warmup_epochs=0")
    summary = train([*tiny, *unsteady, "measure.enabled=false", f"run_dir={tmp_path}"])
    assert summary["best_epoch"] < summary["epochs"]
    state = torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)
    graph = load("karate")
    model = family_of(read(tmp_path / "config.yaml")).build(graph, torch.device("cpu"))
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    model.load_state_dict(state["best_state"])
    logits = model.eval()(graph.data.x, graph.data.edge_index)
    model.load_state_dict(state["model"])
    last = model(graph.data.x, graph.data.edge_index)
    assert (summary["test_accuracy"], summary["val_accuracy"]) != (
        score(graph, last, "test"),
        score(graph, last, "val"),
    )
    assert summary["test_accuracy"] == score(graph, logits, "test")
    assert summary["val_accuracy"] == score(graph, logits, "val")
    assert state["best_epoch"] == summary["best_epoch"]


def test_the_seed_decides(tiny, tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train([*tiny, f"seed={seed}", "measure.enabled=false", f"run_dir={tmp_path / name}"])
        runs[name] = losses(tmp_path / name)
    assert runs["a"] == runs["b"] != runs["c"]


def test_recollecting_trains_as_keeping_everything_does(tiny, tmp_path):
    for name in ("false", "true"):
        train([*tiny, "measure.enabled=false", f"model.disable={name}", f"run_dir={tmp_path / name}"])
    reversible, plain = ([float(loss) for loss in losses(tmp_path / name)] for name in ("false", "true"))
    assert reversible == pytest.approx(plain, rel=1e-4)


def test_bfloat16_trains(tiny, tmp_path):
    summary = train([*tiny, "precision=bf16-mixed", "measure.enabled=false", f"run_dir={tmp_path}"])
    assert summary["precision"] == "bf16-mixed"
    assert summary["peak_bytes"] is None


def test_a_finished_run_says_so(tiny, tmp_path):
    summary = train([*tiny, "measure.enabled=false", f"run_dir={tmp_path}"])
    text = io.StringIO()
    assert train([f"resume={tmp_path}"], Console(file=text, width=200)) == summary
    assert f"the run {tmp_path} is finished" in text.getvalue()
    assert "test accuracy" in text.getvalue()


def test_the_terminal_shows_loss_accuracy_and_the_table(tiny, tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True, force_interactive=True)
    train([*tiny, f"run_dir={tmp_path}"], console)
    for part in ("training", "4/4", "loss", "validation accuracy", "left", "everything kept", "report.html"):
        assert part in text.getvalue()


def test_the_end_of_resume_is_as_the_unbroken_run_if_only_the_report_is_missing(tiny, tmp_path):
    summary = train([*tiny, "measure.enabled=false", f"run_dir={tmp_path}"])
    before = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "summary.json").unlink()
    (tmp_path / "report.html").unlink()
    assert train([f"resume={tmp_path}"]) == summary
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "metrics.csv").read_text() == before


def test_resume_takes_no_other_setting(tmp_path):
    train(["dataset=karate", "epochs=1", "model.num_layers=1", "measure.enabled=false", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UsageError, match=r"seed cannot change in a run that is there; what can: epochs, .*config="):
        train([f"resume={tmp_path / 'run'}", "seed=3"])
    with pytest.raises(UsageError, match=r"'epochs=2,3' has several values: train -m"):
        train([f"resume={tmp_path / 'run'}", "epochs=2,3"])


def test_a_finished_run_is_extended_as_if_it_had_been_longer(tiny, tmp_path):
    quiet = [*tiny[:-1], "measure.enabled=false", "patience=1", "optimizer.lr=0.2", "warmup_epochs=0"]
    whole = train([*quiet, "epochs=9", "patience=null", f"run_dir={tmp_path / 'whole'}"])
    first = train([*quiet, "epochs=9", f"run_dir={tmp_path / 'run'}"])
    assert first["epochs"] < 9  # it was patience that ended it
    more = train([f"resume={tmp_path / 'run'}", "epochs=9"])
    assert (more["epochs"], more["test_accuracy"]) == (9, whole["test_accuracy"])
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert read(tmp_path / "run" / "config.yaml").epochs == 9
    assert train([f"resume={tmp_path / 'run'}"]) == more
    with pytest.raises(UsageError, match=r"epochs=3: the run in .* has 9 already; give more"):
        train([f"resume={tmp_path / 'run'}", "epochs=3"])
    assert train([f"resume={tmp_path / 'run'}"]) == more


def test_a_network_of_ones_own_is_found_from_elsewhere(tiny, tmp_path, monkeypatch):
    (tmp_path / "net_of_this_test.py").write_text(
        "from torch import nn\n\nclass Net(nn.Linear):\n    def __init__(self, in_channels, out_channels):\n"
        "        super().__init__(in_channels, out_channels)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["dataset=karate", "model=import", "model.target=net_of_this_test:Net", "measure.enabled=false"]
    train([*words, "epochs=1", "run_dir=run"])
    sys.modules.pop("net_of_this_test")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    monkeypatch.chdir("/")
    again = RunFolder(tmp_path / "run").again
    assert again == f"recollect train resume={tmp_path / 'run'} model.target={words[2][13:]} model.folder={tmp_path}"
    more = train([*shlex.split(again)[2:], "epochs=2"])
    assert (more["epochs"], more["model"]) == (2, "Net")
    assert train(shlex.split(again)[2:])["epochs"] == 2  # it is finished
    sys.modules.pop("net_of_this_test")


CODE = r"code that would run, model.target=os:system, and a file may be anybody's: if you trust it, {} model.target=os"


@pytest.fixture
def evil(tmp_path):
    """The folder of a run whose settings somebody changed, so that they name another program."""
    folder = create(parse(["dataset=karate", "model=import", "model.target=os:system", f"run_dir={tmp_path / 'evil'}"]))
    changed = folder.config.read_text().replace("kwargs: {}", f"kwargs: {{command: touch {tmp_path / 'ran'}}}")
    folder.config.write_text(changed)
    assert "touch" in changed
    return folder


@pytest.mark.parametrize(
    ("words", "do"),
    [
        (["resume={}"], "go on with"),
        (["resume={}", "model.target=os:getcwd"], "go on with"),
        (["resume={}", "epochs=99"], "go on with"),
        (["config={}/config.yaml"], "add"),
        (["config={}/config.yaml", "model.folder=."], "add"),
    ],
)
def test_no_file_of_settings_decides_which_code_runs(evil, tmp_path, words, do):
    with pytest.raises(UsageError, match=CODE.format(do)):
        train([word.format(evil.path) for word in words])
    assert [path.name for path in tmp_path.iterdir()] == ["evil"]


def test_the_folder_of_a_module_comes_from_the_command_line(evil, tmp_path, monkeypatch):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "net_of_nobody.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    text = evil.config.read_text().replace("os:system", "net_of_nobody:Net")
    evil.config.write_text(re.sub("folder: .*", f"folder: {tmp_path / 'bad'}", text))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for word in (f"resume={evil.path}", f"config={evil.config}"):
        with pytest.raises(UsageError, match="No module named 'net_of_nobody'"):
            train([word, "model.target=net_of_nobody:Net"])
    assert not (tmp_path / "ran").exists()


def test_several_runs_are_extended_and_become_more(tiny, tmp_path):
    quiet = [*tiny[:-1], "measure.enabled=false", "runs=2"]
    train([*quiet, "epochs=2", f"run_dir={tmp_path}"])
    more = train([f"resume={tmp_path}", "epochs=3", "runs=3"])
    assert [(run["seed"], run["epochs"]) for run in more["results"]] == [(0, 3), (1, 3), (2, 3)]


def test_resume_of_no_run_is_refused(tmp_path):
    with pytest.raises(InvalidRunError, match="not the folder of a run"):
        train([f"resume={tmp_path}"])


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_summary_is_refused(tiny, tmp_path, text):
    train([*tiny, "measure.enabled=false", f"run_dir={tmp_path}"])
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(InvalidRunError, match=r"summary.json"):
        train([f"resume={tmp_path}"])


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match=r"ind.cora"):
        train(["dataset=cora", f"data.root={tmp_path}"])
    with pytest.raises(UsageError, match="not divisible"):
        train(["dataset=karate", "model.hidden_channels=9"])
    assert list(tmp_path.iterdir()) == []


def test_histories_without_room_stop_a_run_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recollect.train._room.available_bytes", lambda device: 2**17)
    monkeypatch.setattr("recollect.autoscale.histories._history.memory_table", None)
    for runs in (1, 2):
        with pytest.raises(TrainingError, match=r"the histories need 664.1 KiB on cpu, and 128.0 KiB are free: try"):
            train(["dataset=sbm", "model=gcn", "training=autoscale", f"runs={runs}", "training.partition=random"])
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_explodes_stops_the_run_and_keeps_a_good_checkpoint(tiny, tmp_path):
    overrides = [*tiny, "optimizer=sgd", "optimizer.lr=9e5", "model.norm=null", "epochs=30", f"run_dir={tmp_path}"]
    with pytest.raises(NonFiniteLossError, match=r"^epoch \d+: ") as error:
        train(overrides)
    assert not (tmp_path / "summary.json").exists()
    state = torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)
    assert len(state["history"]) == error.value.epoch - 1
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_drift_above_the_threshold_is_told_once(tmp_path):
    text = io.StringIO()
    overrides = ["dataset=karate", "model.num_layers=60", "model.norm=null", "model.hidden_channels=32", "epochs=3"]
    overrides += ["threads=1", "measure.enabled=false", "optimizer.lr=1e-6", f"run_dir={tmp_path}"]
    train(overrides, Console(file=text, width=500))
    assert text.getvalue().count("anchor_every=s") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(tiny):
    with pytest.raises(UsageError, match="device=cpu"):
        train([*tiny, "device=cuda"])


def test_half_precision_on_the_cpu_is_refused(tiny):
    with pytest.raises(UsageError, match="bf16-mixed"):
        train([*tiny, "device=cpu", "precision=16-mixed"])


def test_threads_are_set_for_the_run_alone(tiny, tmp_path):
    before = torch.get_num_threads()
    summary = train([*tiny, "threads=3", "measure.enabled=false", f"run_dir={tmp_path}"])
    assert summary["threads"] == 3
    assert torch.get_num_threads() == before


def test_a_small_graph_is_trained_by_one_thread(tmp_path):
    overrides = ["dataset=karate", "epochs=1", "measure.enabled=false", "model.num_layers=1"]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert train([*overrides, f"run_dir={tmp_path / 'small'}"])["threads"] == 1
        wide = [*overrides, "model.hidden_channels=4096", f"run_dir={tmp_path / 'large'}"]
        assert train(wide)["threads"] == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_gpu_trains_and_is_measured(tiny, tmp_path, precision):
    summary = train([*tiny, "device=cuda", "model.num_layers=16", f"precision={precision}", f"run_dir={tmp_path}"])
    assert summary["device"] == "cuda"
    assert 0 < summary["peak_bytes"] < summary["peak_bytes_plain"]
