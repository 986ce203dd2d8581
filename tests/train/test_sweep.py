from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from recollect.train import InvalidRunError, UsageError, train
from recollect.train import _run as run_module
from recollect.train._errors import Interrupted, NonFiniteLossError
from recollect.train._folder import RunFolder
from recollect.train._sweep import sweep
from recollect.train._sweep_report import gather

TINY = ["dataset=karate", "model.hidden_channels=8", "epochs=2", "threads=1", "measure.enabled=false"]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("sweep") / "a b", io.StringIO()
    words = [*TINY, "seed=1,2", "model.num_layers=2,3", "model.conv_kwargs.normalize=true", f"run_dir={folder}"]
    return folder, sweep(words, Console(file=text, width=120)), text.getvalue()


def test_each_combination_has_a_run_of_its_own(swept):
    folder, found, _ = swept
    assert found["swept"] == ["seed", "model.num_layers"]
    combinations = [tuple(run["values"].values()) for run in found["runs"]]
    assert combinations == [("1", "2"), ("1", "3"), ("2", "2"), ("2", "3")]
    summaries = [json.loads((folder / run["name"] / "summary.json").read_text()) for run in found["runs"]]
    assert [(str(s["seed"]), str(s["layers"])) for s in summaries] == combinations
    assert [run["test_accuracy"] for run in found["runs"]] == [s["test_accuracy"] for s in summaries]
    assert json.loads((folder / "sweep.json").read_text()) == found


def test_a_run_of_a_sweep_is_the_one_that_its_words_alone_give(swept, tmp_path):
    _, found, _ = swept
    alone = train([*TINY, "seed=2", "model.num_layers=3", "model.conv_kwargs.normalize=true", f"run_dir={tmp_path}"])
    assert alone["test_accuracy"] == found["runs"][3]["test_accuracy"]


def test_the_page_and_the_terminal_have_one_table_of_all(swept):
    folder, found, text = swept
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2
    for run in found["runs"]:
        score = f"{100 * run['test_accuracy']:.2f} %"
        assert f"<td>{score}</td>" in page
        assert score in text
    assert "<th>seed</th><th>model.num_layers</th><th>run</th>" in page
    assert "num_layers" in text


def test_a_wrong_word_in_one_combination_stops_all_before_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["optimizer.lr=0.1,high"], "optimizer.lr=high: must be a number"),
        (["model=gcn,gnc"], "there is no model 'gnc'"),
        (["layers=2,3"], r"did you mean model.num_layers\?"),
        (["resume=x,y"], "leave out -m"),
        (["seed=range(1,1000000000000)"], r"these are more than 10,000 runs: leave some values of 'seed="),
        (
            ["seed=range(0,1000)", "epochs=range(1,50)"],
            r"these are more than 10,000 runs: leave some values of 'epochs=",
        ),
        (["seed=shuffle(range(1,1000000000000))"], r"these are more than 10,000 runs"),  # is no list of them all
        (["seed=range(0,10,0)"], r"'seed=range\(0,10,0\)' cannot be swept over: write its values out"),
        (["seed=range(3,3)"], r"'seed=range\(3,3\)' has no value to sweep over"),
        (["model=glob(gc*)"], r"'model=glob\(gc\*\)' cannot be swept over: write its values out"),
    ):
        with pytest.raises(UsageError, match=message):
            sweep([*TINY, *words], QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_is_noted_and_the_others_are_made(tmp_path):
    words = ["optimizer=sgd", "optimizer.lr=9e5,0.01", "model.norm=null", "epochs=30", "model.num_layers=3"]
    found = sweep([*TINY, *words, f"run_dir={tmp_path / 'sweep'}"], QUIET)
    assert [bool(run["failed"]) for run in found["runs"]] == [True, False]
    assert "so training stopped" in found["runs"][0]["failed"]
    assert "failed: run 0" in (tmp_path / "sweep" / "report.html").read_text()


def test_a_sweep_that_was_interrupted_goes_on_where_it_was(tmp_path, monkeypatch):
    begun, single = [], run_module.start

    def start(words, console, folder):
        begun.append(folder.path.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return single(words, console, folder)

    monkeypatch.setattr(run_module, "start", start)
    folder = tmp_path / "sweep"
    with pytest.raises(Interrupted) as interrupt:
        sweep([*TINY, "seed=1,2,3", "model.num_layers=2", f"run_dir={folder}"], QUIET)
    assert interrupt.value.again == f"recollect train resume={folder}"
    found = train([f"resume={folder}"])
    assert begun == ["0", "1", "1", "2"]
    assert [run["failed"] for run in found["runs"]] == [None, None, None]
    with pytest.raises(UsageError, match="goes on as it is: leave out epochs=3"):
        train([f"resume={folder}", "epochs=3"])
    for text in ("{", "[]", '{"words": 5}', '{"words": [5]}', '{"runs": []}', "[" * 10000):
        (folder / "sweep.json").write_text(text)
        with pytest.raises(InvalidRunError, match=r"sweep.json cannot be read"):
            train([f"resume={folder}"])


@pytest.mark.parametrize("word", ["hydra.sweeper._target_=os.system", "hydra/launcher=evil", "model.target=os:system"])
def test_no_file_of_a_sweep_decides_which_code_runs(tmp_path, word):
    words = json.dumps({"words": ["seed=1,2", word], "runs": []})
    (tmp_path / "sweep.json").write_text(words)
    with pytest.raises(UsageError, match=f"has code that would run, .* if you trust it, go on with {word}"):
        train([f"resume={tmp_path}"])
    with pytest.raises(UsageError, match=r"leave out hydra.run.dir=x"):
        train([f"resume={tmp_path}", word, "hydra.run.dir=x"])
    assert (tmp_path / "sweep.json").read_text() == words


def test_a_record_of_words_that_stand_for_more_is_refused(tmp_path):
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("- &a [x, x]\n- &b [*a, *a]\n- [*b, *b]\n")
    with pytest.raises(InvalidRunError, match="has an anchor or alias"):
        gather(RunFolder(tmp_path), ["seed=1,2"])


def test_groups_and_presets_are_swept(tmp_path):
    words = [*TINY, "model=gcn,import", "model.kwargs.heads=1", "epochs=1"]
    with pytest.raises(UsageError, match=r"there is no key 'model.kwargs.heads'"):
        sweep([*words, f"run_dir={tmp_path / 'one'}"], QUIET)
    assert not (tmp_path / "one").exists()
    words = ["dataset=karate", "model=gcn,appnp", "model.num_layers=2", "epochs=1", "measure.enabled=false"]
    found = sweep([*words, f"run_dir={tmp_path / 'two'}"], QUIET)
    assert [run["values"] for run in found["runs"]] == [{"model": "gcn"}, {"model": "appnp"}]


def test_nothing_finite_is_an_error_of_one_run_alone(tmp_path):
    words = ["optimizer=sgd", "optimizer.lr=9e5", "model.norm=null", "epochs=30", "model.num_layers=3"]
    with pytest.raises(NonFiniteLossError):
        train([*TINY, *words, f"run_dir={tmp_path / 'run'}"])


def test_hydra_is_left_as_it_was(tmp_path):
    from hydra import compose, initialize
    from hydra.core.global_hydra import GlobalHydra

    with initialize(config_path=None, version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        found = sweep([*TINY, "model.num_layers=2", "seed=1", f"run_dir={tmp_path / 'sweep'}"], QUIET)
        assert [run["failed"] for run in found["runs"]] == [None]
        assert GlobalHydra.instance().hydra is outer
        assert compose(overrides=["+seed=1"]).seed == 1
    assert not GlobalHydra.instance().is_initialized()
