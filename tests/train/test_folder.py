from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from recollect.train._config import parse
from recollect.train._errors import InvalidRunError, TrainingError, UsageError
from recollect.train._folder import RunFolder, create, reopen


def test_runs_are_named_by_time_dataset_and_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [create(parse(["dataset=karate"])).path for _ in range(3)]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"runs/\d{8}-\d{6}_karate_revgnn(_\d)?", str(name)) for name in names)


@pytest.mark.parametrize("name", ["../../../out", "a/b", "...", "x" * 300, "ü und <ö>"])
def test_a_name_stays_in_its_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = create(replace(settings := parse(["dataset=karate"]), model=replace(settings.model, name=name)))
    assert folder.path.parent == Path("runs")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_who_goes_on_with_a_run_is_told_how(tmp_path):
    given = create(parse(["model=import", f"run_dir={tmp_path / 'given'}"]))
    assert given.again == f"recollect.train.fit(model, data, resume={str(given.path)!r})"
    words = ["model=import", "model.target=a.b:c", f"model.folder={tmp_path}", f"run_dir={tmp_path / 'a b'}"]
    own = create(parse(words)).again
    assert own == f"recollect train 'resume={tmp_path / 'a b'}' model.target=a.b:c model.folder={tmp_path}"
    gone = RunFolder(tmp_path / "gone")
    assert gone.again == f"recollect train resume={gone.path}"


@pytest.mark.parametrize(
    ("path", "label"),
    [("graphs/my graph.npz", "my-graph"), ("graphs/mine", "mine"), ("graphs/../x/../..", "{}"), ("/", "file")],
)
def test_a_graph_of_ones_own_is_called_as_its_file(tmp_path, monkeypatch, path, label):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = create(parse(["dataset=file", f"dataset.path={path}"]))
    assert folder.path.name.endswith(f"_{label.format(tmp_path.name)}_revgnn")
    assert folder.path.parent == Path("runs")


def test_a_run_is_found_again_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = create(parse(["seed=9", "data.root=raw", f"run_dir={tmp_path}/a/b"]))
    monkeypatch.chdir("/")
    again, settings = reopen(str(folder.path))
    assert again.path == tmp_path / "a" / "b"
    assert settings.seed == 9
    assert Path(settings.data.root) == tmp_path / "raw"


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    create(parse([f"run_dir={tmp_path}"]))
    with pytest.raises(UsageError, match=f"go on with it by resume={tmp_path}"):
        create(parse([f"run_dir={tmp_path}"]))


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not an empty folder"):
        create(parse([f"run_dir={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match="cannot be made"):
        create(parse([f"run_dir={tmp_path}/file/run"]))


def test_what_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(InvalidRunError, match=r"has no config.yaml, so it is not the folder of a run"):
        reopen(str(tmp_path))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InvalidRunError, match=r"config.yaml is a file; give a folder"):
        reopen(str(tmp_path / "config.yaml"))
    with pytest.raises(InvalidRunError, match="does not exist") as error:
        reopen(str(tmp_path / "nowhere"))
    assert error.value.exit_code == 2  # a wrong value on the command line
