"""`make matrix`: which interpreters and versions it takes, what it makes of each step, and the table."""

import importlib.util
import re
import stat
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "tools" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_interpreters_are_those_that_start(matrix, tmp_path, monkeypatch):
    script(tmp_path / "bin" / "python3.11", "echo 3.11.9")
    script(tmp_path / "bin" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    versions = tmp_path / "pyenv" / "versions"
    for version in ("3.12.9", "3.12.10"):
        script(versions / version / "bin" / "python3", f"echo {version}")
    script(versions / "3.13.0" / "bin" / "python3", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(matrix.shutil, "which", which_below(tmp_path, matrix.shutil.which))
    found = {python.version: python for python in matrix.find_pythons()}
    assert set(found) == {"3.11.9", "3.12.10", "3.13", "3.14"}
    assert found["3.12.10"].path == str(versions / "3.12.10" / "bin" / "python3")
    assert found["3.13"].missing == f"no python3.13, neither on the PATH nor in {versions}"


def which_below(folder, which):
    """Programs outside of a folder are not there."""
    return lambda name: (found := which(name)) and (found if Path(found).is_relative_to(folder) else None)


def test_versions_of_torch_are_the_oldest_the_locked_and_the_newest(matrix):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, locked, newest = matrix.default_torch()
    assert oldest.removesuffix(".*").replace("==", ">=") in project["dependencies"]
    assert locked in (ROOT / "constraints.txt").read_text().splitlines()
    assert newest == "torch"


@pytest.fixture
def look(matrix, tmp_path, monkeypatch):
    """Look at an environment whose programs are scripts: of python, which is pip too, recollect and mypy."""
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    hint = 'pip install "torch-recollect[train]"'

    def looked(**changed: str) -> object:
        programs = {
            "python": 'case "$*" in *metadata*) echo 2.9.1+cpu;; esac',
            "recollect": f"""case "$1 $2" in
                --version*) echo recollect {matrix.PROJECT["version"]};;
                bench*) echo make bench >&2; exit 1;;
                "train ") echo '{hint}' >&2; exit 1;;
                train*) mkdir run; touch run/report.html;; esac""",
            "mypy": "grep -q RevGNN user.py",
            **changed,
        }
        lines = "\n".join(
            f"cat > $3/bin/{name} <<'END'\n#!/bin/sh\n{text}\nEND\nchmod +x $3/bin/{name}"
            for name, text in programs.items()
        )
        python = script(tmp_path / "python3", f"mkdir -p $3/bin\n{lines}")
        row = matrix._look(matrix.Python("3.12.1", str(python)), "torch==2.9.*", None, Path("a.whl"), tmp_path / "new")
        assert not (tmp_path / "new").exists()
        return row

    return looked


def test_an_environment_in_which_all_is_well(matrix, look):
    row = look()
    assert row.columns == dict.fromkeys(matrix.COLUMNS, "ok")
    assert (row.torch, row.why, row.available, row.failed) == ("2.9.1+cpu", "", True, False)


@pytest.mark.parametrize(
    ("changed", "columns", "why"),
    [
        ({"recollect": "echo recollect 0.0.1"}, {"alone": "FAILED"}, "'recollect 0"),
        ({"mypy": "echo user.py:3: wrong; exit 1"}, {"bench": "ok", "types": "FAILED"}, "mypy --strict user.py: exit"),
        (
            {"python": 'case "$*" in *metadata*) echo 2.9;; *train*) echo "ERROR: none" >&2; exit 1;; esac'},
            {"alone": "ok", "train": "FAILED"},
            "exit code 1, ERROR: none",
        ),
    ],
)
def test_what_fails_is_told(matrix, look, changed, columns, why):
    row = look(**changed)
    assert {name: row.columns[name] for name in columns} == columns
    assert list(row.columns)[-1] == list(columns)[-1]
    assert row.failed
    assert why in row.why


def test_torch_that_cannot_be_had_is_no_failure(matrix, look):
    row = look(python='echo "ERROR: No matching distribution found for torch==2.9.*" >&2; exit 1')
    assert (row.available, row.failed, row.columns) == (False, False, {})
    assert re.search(r"not available: .*No matching distribution", row.why)


def test_the_exit_code_and_the_table(matrix, monkeypatch, capsys):
    failed, missing = matrix.Row("3.11.9", "2.9.1", {"alone": "ok", "train": "FAILED"}, "no report"), "no python3.14"
    monkeypatch.setattr(matrix, "find_pythons", lambda: [matrix.Python("3.14", missing=missing)])
    assert matrix.main(["--wheel", "a.whl"]) == 0
    assert matrix.main(["--wheel", "a.whl", "--required"]) == 1
    monkeypatch.setattr(matrix, "find_pythons", lambda: [matrix.Python("3.11.9", "python3")])
    monkeypatch.setattr(matrix, "_look", lambda *_: failed)
    capsys.readouterr()
    assert matrix.main(["--wheel", "a.whl", "--torch", "torch"]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert rows == [
        ["python", "torch", *matrix.COLUMNS],
        ["3.11.9", "2.9.1", "ok", "FAILED", "-", "-"],
        ["no", "report"],
    ]
