from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap

import pytest
import torch

import recollect
from recollect import cli
from recollect.cli import main

# What torch brings with it, and so may be imported where nothing else is installed.
_WITH_TORCH = {
    *("torch", "torchgen", "functorch", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec"),
    *(
        "filelock",
        "typing_extensions",
        "setuptools",
        "_distutils_hack",
        "pkg_resources",
        "triton",
        "nvidia",
        "recollect",
    ),
}

_ALONE = """
import importlib.abc, importlib.machinery, sys

class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in {allowed!r} or top.startswith("_"):
            return None
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Only())
from recollect.cli import main
print([main(arguments) for arguments in {commands!r}])
"""


def alone(*commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the commands as if torch alone were installed, and print their exit codes."""
    script = textwrap.dedent(_ALONE).format(allowed=_WITH_TORCH, commands=list(commands))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "usage: recollect" in text
    assert "train    train a deep reversible graph network" in text
    assert "bench    measure time and memory" in text
    assert "info     show versions" in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"recollect {recollect.__version__}\n"


@pytest.mark.parametrize("arguments", [["trian"], ["--verbose"], ["info", "extra"], ["bench"], ["bench", "dept"]])
def test_a_wrong_command_is_wrong_usage(capsys, arguments):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: recollect" in captured.err


def test_info_says_what_is_there_and_how_to_get_what_is_not(capsys, monkeypatch):
    version = importlib.metadata.version

    def without_rich(name: str) -> str:
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_rich)
    assert main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["recollect", recollect.__version__] in lines
    assert ["train", "hydra-core", version("hydra-core")] in lines
    assert ["graph", "torch-geometric", version("torch-geometric")] in lines
    assert ["train", "rich", "not", "installed"] in lines
    assert sum("torch-recollect[train]" in " ".join(line) for line in lines) == 1


def test_torch_alone_is_enough_for_all_but_training():
    result = alone(["info"], ["--help"], ["--version"], [], ["train"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[0, 0, 0, 0, 1]"
    assert f"torch      {torch.__version__}" in result.stdout
    assert 'pip install "torch-recollect[train]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_train_help_lists_groups_options_and_keys(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "dataset=" in text
    assert "roman-empire" in text
    assert "revgnn_deep" in text
    assert "model.num_layers=64" in text


@pytest.mark.parametrize(
    ("argument", "right"),
    [
        ("dataset=coraa", "cora"),
        ("model.num_layer=3", "model.num_layers"),
        ("model.norm=instance", "layer, batch"),
        ("--verbose", "key=value"),
    ],
)
def test_a_wrong_name_lists_the_right_ones(capsys, argument, right):
    assert main(["train", argument]) == 2
    captured = capsys.readouterr()
    assert right in captured.err
    assert "recollect train --help" in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_missing_files_are_told_without_traceback(capsys, tmp_path):
    assert main(["train", "dataset=cora", f"data.root={tmp_path}"]) == 1
    assert "ind.cora.allx" in capsys.readouterr().err


def test_a_run_that_diverges_fails(capsys, tmp_path):
    arguments = ["dataset=karate", "model.num_layers=2", "optimizer=sgd", "optimizer.lr=9e5", "model.norm=null"]
    assert main(["train", *arguments, f"run_dir={tmp_path}", "epochs=50", "patience=null"]) == 1
    assert "recollect train: epoch " in capsys.readouterr().err
    assert (tmp_path / "checkpoint.ckpt").exists()


def test_bench_runs_a_benchmark_of_the_repository(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "depth", "--help"]) == 0
    assert "usage: depth.py" in capfd.readouterr().out


def test_bench_passes_options_on_and_the_exit_code_back(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command, **options: calls.append((command, options)) or 7)
    assert main(["bench", "graph", "--quick", "--output", "here"]) == 7
    ((command, options),) = calls
    assert command == [sys.executable, "-m", "bench.graph", "--quick", "--output", "here"]
    assert set(options) == {"env"}  # "here" is where the command was given


def test_info_tells_another_project_of_the_same_name(capsys, monkeypatch):
    known = importlib.metadata.metadata

    def with_another(name: str) -> object:
        return {"Summary": "Something else", "Version": "9.9"} if name == "recollect" else known(name)

    monkeypatch.setattr(importlib.metadata, "metadata", with_another)
    assert main(["info"]) == 0
    assert "another project's package recollect 9.9" in capsys.readouterr().out
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: known("torch-recollect"))
    assert main(["info"]) == 0
    assert "another project" not in capsys.readouterr().out


def test_bench_help_names_what_there_is(capsys):
    assert main(["bench", "--help"]) == 0
    assert (
        "{axes,budget,depth,distributed,drift,gpu,graph,invertible,objectives,outofcore,regions}"
        in capsys.readouterr().out
    )


def test_bench_without_the_repository_says_where_it_is(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lib" / "recollect" / "cli.py"))
    assert main(["bench", "depth"]) == 1
    captured = capsys.readouterr()
    assert "make bench" in captured.err
    assert "Traceback" not in captured.err


_WITHOUT_TORCH = """
import sys
from recollect.cli import main
code = main({arguments!r})
print("torch" in sys.modules, code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["train", "--help"], 0),
        (["info", "--help"], 0),
        (["train", "optimizer.learning_rate=3"], 2),
        (["train", "preset=cora_gnc"], 2),
        (["train", "seed=a"], 2),
        (["train", "training=wholegraph", "objective=iwrm"], 2),
        (["train", "resume=nowhere"], 2),
        (["train", "-m", "model.num_layers=2,many"], 2),
    ],
)
def test_what_needs_no_torch_does_not_import_it(arguments, code, tmp_path):
    script = _WITHOUT_TORCH.format(arguments=arguments)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout.split()[-2:] == ["False", str(code)], result.stderr
    assert list(tmp_path.iterdir()) == []
