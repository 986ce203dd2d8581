"""Training in several processes (gloo) on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import distributed as dist

from recollect.train import TrainingError, UsageError, train
from recollect.train._config import parse
from recollect.train._logs import read_history
from recollect.train._team import Team, joined, team

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")

GRAPH = ["dataset=sbm", "dataset.options.num_nodes=300", "dataset.options.num_features=8", "training=autoscale"]
PARTS = [*GRAPH, "model=gcn", "model.hidden_channels=8", "training.layerwise=true", "training.partition=contiguous"]
SHORT = [*PARTS, "training.num_parts=2", "training.parts_per_batch=1", "model.dropout=0", "measure.enabled=false"]


def test_two_processes_train_and_one_writes(tmp_path):
    both, one = tmp_path / "both", tmp_path / "one"
    found = train([*SHORT, "devices=2", "epochs=3", f"run_dir={both}"])
    assert len(found["peak_bytes_of_ranks"]) == 2
    assert min(found["peak_bytes_of_ranks"]) > 0
    assert (both / "report.html").exists()
    assert found == json.loads((both / "summary.json").read_text())
    train([*SHORT, "epochs=1", "training.parts_per_batch=2", f"run_dir={one}"])
    rows, expected = read_history(both), read_history(one)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    # Histories are exact when an epoch begins: so the losses of the first are those of the whole graph.
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"]

    extended = train([f"resume={both}", "epochs=4", "devices=1"])  # another number of processes goes on
    assert extended["epochs"] == 4
    assert read_history(both)[:3] == rows


def test_two_processes_correct_histories(tmp_path):
    """Refreshed before each step, they give the gradient of the whole graph."""
    words, folders = [*SHORT, "epochs=3", "training.compensate=cut"], [tmp_path / "both", tmp_path / "one"]
    train([*words, "training.refresh_every=1", "devices=2", f"run_dir={folders[0]}"])
    train([*words, "training.parts_per_batch=2", f"run_dir={folders[1]}"])
    losses = [[row["loss"] for row in read_history(folder)] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_two_processes_train_a_reversible_network(tmp_path):
    """With exact histories their losses are those of the whole graph, and of one process."""
    words = ["model=revgnn", "model.hidden_channels=8", "model.num_layers=3", "epochs=2"]
    words = [*(word for word in SHORT if not word.startswith("model")), *words, "model.dropout=0"]
    words.append("training.errors_every=1")
    both, one = tmp_path / "both", tmp_path / "one"
    found = train([*words, "devices=2", f"run_dir={both}"])
    assert len(found["peak_bytes_of_ranks"]) == 2
    assert [len(found["histories"][name]) for name in ("ages", "errors")] == [3, 3]
    train([*words, "training.parts_per_batch=2", f"run_dir={one}"])
    rows, expected = read_history(both), read_history(one)
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert max(row["drift"] for row in rows) < 1e-3
    extended = train([f"resume={one}", "epochs=3", "devices=2"])  # more processes go on
    assert extended["epochs"] == 3
    assert read_history(one)[:2] == expected


def test_two_processes_take_the_steps_of_one_over_a_whole_graph(tmp_path):
    words = [word for word in SHORT if not word.startswith(("model", "training"))]
    words += ["model=revgnn", "model.hidden_channels=8", "model.num_layers=3", "model.dropout=0.3"]
    words += ["training=wholegraph", "training.partition=contiguous", "training.num_parts=4", "epochs=3"]
    both, one = tmp_path / "both", tmp_path / "one"
    found = train([*words, "devices=2", f"run_dir={both}"])
    assert len(found["peak_bytes_of_ranks"]) == 2
    train([*words, f"run_dir={one}"])
    rows, expected = read_history(both), read_history(one)
    for name in ("loss", "val_loss", "val_accuracy"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=1e-4)


def on_the_page(program):
    """The command of docs/machines.md for this machine that begins with these words, without them."""
    page = Path(__file__).parents[2] / "docs" / "machines.md"
    (line,) = [line for line in page.read_text().splitlines() if line.startswith(program)]
    return line.removeprefix(program).split()


def test_both_commands_of_the_page_do_the_same(tmp_path):
    small = ["dataset.options.num_nodes=300", "dataset.options.num_features=8", "training.partition=contiguous"]
    small += ["model.hidden_channels=8", "epochs=2", "measure.enabled=false"]
    ways = {
        "one": ["-m", "recollect", *on_the_page(".venv/bin/recollect ")],
        "other": ["-m", "torch.distributed.run", *on_the_page("torchrun --standalone ")],
    }
    ways["other"].insert(2, "--standalone")
    for name, words in ways.items():
        run = [sys.executable, *words, *small, f"run_dir={tmp_path / name}"]
        subprocess.run(run, check=True, timeout=120, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    losses = [[row["loss"] for row in read_history(tmp_path / name)] for name in ways]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_more_processes_than_parts_are_told_on_each(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "recollect"]
    words = [*(word for word in SHORT if "num_parts" not in word), "training.num_parts=1"]
    found = subprocess.run(
        [*run, "train", *words, f"run_dir={tmp_path / 'run'}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 1
    assert (found.stdout + found.stderr).count("devices=2: each needs a part, and training.num_parts=1") >= 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training=full"], "need training=autoscale"),
        (["training.layerwise=false"], "need training.layerwise=true"),
        (["objective=iwrm"], "need objective=mean"),
        (["runs=2"], "need runs=1"),
        (["devices=5"], "each needs a part, and training.num_parts=2"),
        (["model=revgnn", "training=full"], "need training=autoscale"),
        (["model=revgnn", "training=wholegraph", "training.num_parts=3"], "num_parts=3 is not divisible"),
        (["model=revgnn", "training=wholegraph", "training.store=somewhere"], "need training.store=null"),
    ],
)
def test_what_several_processes_cannot_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        parse([*(word for word in SHORT if word.partition("=")[0] not in {w.partition("=")[0] for w in words}), *(
            [] if "devices=5" in words else ["devices=2"]), *words])  # fmt: skip


def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    words = [*SHORT, "devices=2", "epochs=100000", "patience=null", "checkpoint_every=1", f"run_dir={folder}"]
    run = subprocess.Popen([sys.executable, "-m", "recollect", "train", *words], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint.ckpt").exists():
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.2)
        os.kill(_workers(folder)[-1], signal.SIGKILL)
        assert run.wait(timeout=120) == 1
    finally:
        run.kill()
    epochs = len(read_history(folder))
    assert epochs >= 1
    found = train([f"resume={folder}", f"epochs={epochs + 20}", "devices=1"])
    assert found["epochs"] == epochs + 20


def _workers(folder):
    """The processes that train in a folder, apart from those that start others."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            words = Path("/proc", entry, "cmdline").read_text().split("\0") if entry.isdigit() else []
        except OSError:
            continue
        if any(word == f"resume={folder}" for word in words) and "torch.distributed.run" not in words:
            found.append(int(entry))
    return sorted(found)


def test_processes_that_fail_are_told(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TrainingError, match="the 2 processes ended with code 1"):
        train([*SHORT, "devices=2", f"training.history_path={tmp_path / 'file'}", f"run_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()  # what cannot start leaves no folder behind


def test_one_process_needs_no_others():
    with joined() as alone:
        assert alone == team() == Team(0, 1)
        assert alone.is_first
        assert alone.share("what it has") == "what it has"
    assert not dist.is_initialized()
