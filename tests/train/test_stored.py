"""What a run left behind and somebody changed: each change is refused by name, before anything is used."""

from __future__ import annotations

import copy
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recollect.data import InvalidFileError, from_file
from recollect.train import InvalidRunError, train
from recollect.train._command import command
from recollect.train._config import parse, read, write
from recollect.train._files import write_text
from recollect.train._folder import RunFolder, _epochs, create
from recollect.train._logs import Logs
from recollect.train._stored import check_summary
from recollect.train._stored_checkpoint import check_checkpoint

RUN = [
    "dataset=karate",
    "model.num_layers=2",
    "model.hidden_channels=8",
    "epochs=2",
    "threads=1",
    "measure.enabled=false",
]
LETTERS = "abcdefghijklmnopqrst"
LAUGHS = "a: &a [1,2]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in pairwise(LETTERS))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def row(epoch: int) -> dict[str, float]:
    names = ("loss", "train_accuracy", "val_accuracy", "val_loss", "learning_rate", "seconds", "drift")
    return {"epoch": epoch, **dict.fromkeys(names, 0.5)}


class Stored:
    """A checkpoint as a trainer saves it, and what it is compared with."""

    def __init__(self) -> None:
        self.network = network()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.5, total_iters=2)
        self.network(torch.randn(5, 3)).sum().backward()
        self.optimizer.step()
        self.state: dict[str, Any] = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "precision": {},
            "history": [row(1), row(2)],
            "best_epoch": 1,
            "best_state": self.network.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": []},
        }

    def check(self, state: Any) -> None:
        others = {"scheduler": self.scheduler.state_dict(), "precision": {}}
        check_checkpoint(state, self.network, self.optimizer, others, Path("c.ckpt"))


def test_a_checkpoint_as_it_was_saved_is_taken() -> None:
    stored = Stored()
    stored.check(stored.state)
    fresh = Stored()
    fresh.optimizer = torch.optim.AdamW(fresh.network.parameters(), lr=0.1)  # that has made no step
    fresh.check(stored.state)


# The path to a field, what it becomes ("gone": it is not there), and what is said of it.
CHANGES: list[tuple[str, Any, str]] = [
    *((name, "gone", f"field '{name}' is missing") for name in ("model", "optimizer", "scheduler", "precision")),
    *((name, "gone", f"field '{name}' is missing") for name in ("history", "best_epoch", "best_state", "random")),
    *((name, 3.5, f"field '{name}' is missing") for name in ("model", "history", "best_epoch", "random", "optimizer")),
    ("model/0.weight", "gone", "model has other parameters"),
    ("model/evil", torch.ones(1), "model has other parameters"),
    ("model/0.weight", torch.ones(4, 2), r"'0.weight' has the shape \[4, 2\], and this model's \[4, 3\]"),
    ("model/0.weight", torch.ones(4, 3).int(), "'0.weight' has the shape"),
    ("model/0.weight", "text", "'0.weight' is a str"),
    ("best_state/2.bias", torch.ones(7), "best_state: '2.bias' has the shape"),
    ("best_state/2.bias", [1, 2], "best_state: '2.bias' is a list"),
    ("best_state", {}, "best_state has other parameters"),
    ("best_epoch", 3, "best_epoch is 3, of 2 epochs"),
    ("best_epoch", 0, "best_epoch is 0"),
    ("best_epoch", -1, "best_epoch is -1"),
    ("history", ["abc"], "epoch 1 is no row of numbers"),
    ("history", [], "best_epoch is 1, of 0 epochs"),
    ("history/0/loss", "gone", "epoch 1 lacks a number"),
    ("history/1/val_accuracy", "good", "epoch 2 lacks a number"),
    ("history/1/val_loss", [1.0], "epoch 2 lacks a number"),
    ("history/1/seconds", None, "epoch 2 lacks a number"),
    ("history/1/drift", {}, "epoch 2 lacks a number"),
    ("history/1/epoch", 5, "epoch 2 is numbered 5"),
    ("history/1", {1: 2}, "epoch 2 is no row"),
    ("optimizer/param_groups", [], "other groups of parameters"),
    ("optimizer/param_groups", "x", "other groups of parameters"),
    ("optimizer/param_groups/0/lr", "fast", "optimizer: lr is 'fast'"),
    ("optimizer/param_groups/0/lr", math.inf, "optimizer: lr is 'inf'"),
    ("optimizer/param_groups/0/lr", math.nan, "optimizer: lr is 'nan'"),
    ("optimizer/param_groups/0/betas", 0.5, "optimizer: betas is '0.5'"),
    ("optimizer/param_groups/0/betas", (0.5,), "optimizer: betas"),
    ("optimizer/param_groups/0/eps", None, "optimizer: eps"),
    ("optimizer/param_groups/0/maximize", 1, "optimizer: maximize is '1'"),
    ("optimizer/param_groups/0/foreach", "yes", "optimizer: foreach is 'yes'"),
    ("optimizer/param_groups/0/weight_decay", "gone", "lacks a setting"),
    ("optimizer/param_groups/0/params", [0], "other parameters"),
    ("optimizer/state", [1], "other groups of parameters"),
    ("optimizer/state/0", "x", "a state of no parameter"),
    ("optimizer/state/99", {}, "a state of no parameter"),
    ("optimizer/state/0/exp_avg", torch.ones(9), r"exp_avg has the shape \[9\]"),
    ("optimizer/state/0/exp_avg", "x", "exp_avg is a str"),
    ("optimizer/state/0/exp_avg", 1.0, "exp_avg is a float"),
    ("optimizer/state/0/exp_avg_sq", "gone", "the state of a parameter lacks exp_avg_sq"),
    ("scheduler/last_epoch", "x", "scheduler is not of this run"),
    ("scheduler/step", 5, "scheduler is not of this run"),
    ("scheduler/base_lrs", [], "scheduler is not of this run"),
    ("scheduler/_last_lr", ["x"], "scheduler is not of this run"),
    ("precision/scale", 5, "precision is not of this run"),
    ("random/cpu", "gone", "no states of generators"),
    ("random/cpu", 5, "no states of generators"),
    ("random/cuda", [5], "no states of generators"),
    ("random/cuda", "gone", "no states of generators"),
]


@pytest.mark.parametrize(("path", "value", "message"), CHANGES)
def test_a_changed_field_of_a_checkpoint_is_named(path: str, value: Any, message: str) -> None:
    stored = Stored()
    state = copy.deepcopy(stored.state)
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
    place: Any = state
    for part in parents:
        place = place[part]
    if isinstance(value, str) and value == "gone":
        del place[last]
    else:
        place[last] = value
    with pytest.raises(InvalidRunError, match=rf"c.ckpt cannot be read \(.*{message}.*start the run anew"):
        stored.check(state)


@pytest.mark.parametrize("state", [None, [], 5, "x", torch.ones(2), {}])
def test_what_is_no_checkpoint_is_refused(state: Any) -> None:
    with pytest.raises(InvalidRunError, match="cannot be read"):
        Stored().check(state)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is finished."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train([*RUN, f"run_dir={folder}"])
    return folder


SUMMARIES = ["", "{}", "[]", "null", "3", "{", '{"seed": 1}', '"x"', "NaN", "[" * 100_000, "\0", '{"metric": []}']


@pytest.mark.parametrize("text", SUMMARIES)
def test_a_summary_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRunError, match=r"s.json (is not|cannot be read)"):
        check_summary(text, Path("s.json"))


def test_a_summary_that_lacks_a_key_is_refused_and_the_whole_one_taken(run: Path) -> None:
    whole = json.loads((run / "summary.json").read_text())
    assert check_summary(json.dumps(whole), Path("s.json")) == whole
    for key in ("seed", "metric", "test_accuracy", "modes", "histories", "parameters", "device", "peak_bytes"):
        less = {name: value for name, value in whole.items() if name != key}
        with pytest.raises(InvalidRunError, match=f"not the whole summary of a run .*{key}"):
            check_summary(json.dumps(less), Path("s.json"))
    for key, value in (("metric", "beauty"), ("test_accuracy", "good"), ("parameters", "x"), ("modes", 3)):
        with pytest.raises(InvalidRunError, match="not the whole summary"):
            check_summary(json.dumps({**whole, key: value}), Path("s.json"))


SETTINGS = {
    "laughs": (LAUGHS, "line 1: has an anchor or alias"),
    "one alias": ("a: &x 1\nb: *x\n", "line 1: has an anchor"),
    "a tag": ("a: !!python/object/apply:os.system ['true']\n", "line 1: has a tag"),
    "a set": ("a: !!set {b}\n", "has a tag"),
    "deep": ("[" * 3000, "has more than 12 levels"),
    "deep below": ("a:\n" + "".join(" " * k + "b:\n" for k in range(1, 40)), "has more than 12 levels|cannot be read"),
    "a tab": ("a:\n\t- b", "cannot be read"),
    "open": ("a: [1", "cannot be read"),
    "control characters": ("a: \x01", "cannot be read"),
    "nothing": ("", "cannot be read|holds no settings"),
    "a list": ("- 1", "holds no settings|cannot be read"),
    "a number": ("5", "holds no settings"),
    "a word": ("hello", "holds no settings|cannot be read"),
    "two documents": ("a: 1\n---\nb: 2\n", "cannot be read"),
    "an interpolation": ("seed: ${epochs}\nepochs: ${seed}\n", "cannot be read"),
    "an unknown key": ("colour: red\n", "cannot be read"),
    "an unknown resolver": ("seed: ${os.system:true}\n", "cannot be read"),
    "a date": ("seed: 2020-01-01\n", "cannot be read"),
    "a huge number": ("seed: " + "9" * 5000 + "\n", "cannot be read"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_none_are_refused_at_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = SETTINGS[name]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InvalidRunError, match=message):
        read(tmp_path / "config.yaml")
    assert command([f"resume={tmp_path}"]) == 1
    assert "config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        *("seed: x", "seed: -1", "epochs: 0", "epochs: null", "runs: 1.5", "device: tpu", "precision: high"),
        *("threads: none", "optimizer: null", "model: 3", "dataset: []", "training: {name: evil}", "data: {root: [1]}"),
    ],
)
def test_settings_with_a_wrong_value_are_refused(change: str, tmp_path: Path) -> None:
    key = change.partition(":")[0]
    lines = write(parse(["dataset=karate"])).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(f"{key}:"))
    end = next((k for k in range(start + 1, len(lines)) if not lines[k].startswith(" ")), len(lines))
    (tmp_path / "config.yaml").write_text("\n".join([*lines[:start], change, *lines[end:]]))
    with pytest.raises(InvalidRunError, match="cannot be read as the settings of a run"):
        read(tmp_path / "config.yaml")


@pytest.mark.parametrize("name", ["../../out", "/etc/x", "a/b", "..", "a\nb", "\x1b[31m", "ü" * 200, "a" * 5000, " "])
def test_a_name_stays_in_its_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = parse(["dataset=karate"])
    object.__setattr__(settings.model, "name", name)
    folder = create(settings)
    assert folder.path.parent == Path("runs")
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("config.yaml", "edges.csv", "labels.csv"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(InvalidRunError, match=r"config\.yaml is no file"):
        read(tmp_path / "config.yaml")
    os.mkfifo(tmp_path / "summary.json")
    with pytest.raises(InvalidRunError, match=r"summary\.json is no file"):
        _epochs(RunFolder(tmp_path))
    with pytest.raises(InvalidFileError, match=r"has no edges\.csv"):
        from_file(tmp_path)


def test_links_in_the_place_of_files_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("report.html", ".report.html.partial", "metrics.csv"):
        (folder / name).symlink_to(tmp_path / "mine" / "thesis.tex")
    (folder / "tensorboard").symlink_to(tmp_path / "mine")
    write_text(folder / "report.html", "new")
    logs = Logs(folder, [row(1)])
    logs.close()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "mine"
    assert (folder / "report.html").read_text() == "new"
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_folder_in_the_place_of_the_metrics_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").unlink()
    (run / "metrics.csv").unlink()
    (run / "metrics.csv").mkdir()
    assert command([f"resume={run}"]) == 1
    assert "metrics.csv" in capsys.readouterr().err


# What is wrong with each of these is in one word of the command line.
WORDS = [
    *("", "=", "=1", "seed", "seed=", "seed=x", "seed=-1", "seed=1.5", f"seed={2**40}", "seed=[1]", "seed={a:1}"),
    *("seed=" + "9" * 5000, "seed=1,2", "seed=nan", "seed=${oc.env:HOME}", "seed=null", "seed=true"),
    *("epochs=0", "epochs=-1", "epochs=inf", "runs=0", "runs=x", "patience=0", "clip_norm=0", "clip_norm=nan"),
    *(
        "device=tpu",
        "precision=8",
        "threads=0",
        "threads=1000000",
        "devices=1000000",
        "model.num_layers=1000000000",
        "model.hidden_channels=1000000000",
        "model.options.theta=nan",
        "optimizer.options.eps=inf",
        "model=evil",
        "model=../x",
        "dataset=/etc/passwd",
        "dataset=..",
        "a.b=1",
    ),
    *("model.num_layers=0", "model.hidden_channels=-5", "model.dropout=2", "model.conv=evil", "optimizer.lr=-1"),
    *("optimizer.lr=fast", "optimizer.options.betas=3", "dataset.options.k=x", "dataset.path=x", "dataset.name=cora"),
    *("+seed=1", "~seed", "++a=1", "seed@b=1", "dataset@x=cora", "hydra.run.dir=x", "_target_=os.system", "--evil"),
    *("resume=", "resume=/nowhere", "resume=/etc/passwd", "data.root=/etc/passwd", "run_dir=/etc/passwd", "key='"),
    *("x=" + "[" * 5000, "seed=" + "(" * 2000, "seed='" + "a" * 10000, "\x00=1", "se\x00ed=1", "seed=\x00", "ü=1"),
    *(
        "seed=choice(1,2)",
        "seed=range(1,5)",
        "seed=glob(*)",
        "dataset=file",
        "epochs=int(x)",
        "$(id)=1",
        "`id`",
        "seed: 1",
    ),
]


@pytest.mark.parametrize("word", WORDS)
def test_a_wrong_word_is_an_error_and_no_traceback(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command([word]) in (1, 2)
    assert capsys.readouterr().err.startswith("recollect train: ")
    assert list(tmp_path.iterdir()) == []
