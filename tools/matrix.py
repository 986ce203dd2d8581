"""Whether the wheel installs and runs in clean environments: for each Python found here, and several versions of torch.

    python tools/matrix.py                                # the oldest torch that is allowed, the locked one, the newest
    python tools/matrix.py --python python3.12 --torch torch==2.10.*
    python tools/matrix.py --index https://download.pytorch.org/whl/cpu    # where torch comes from: builds for the CPU

Each environment is made, used and deleted, one after the other. What is looked at in it:

- alone: with torch and nothing else, a region is rebuilt, and ``recollect train`` says what it needs
- train: with the extra, ``recollect train`` trains two layers for an epoch
- bench: ``recollect bench`` says that it needs the repository; from there, ``python -m bench.depth --quick`` runs
- types: ``mypy --strict`` passes on a user's file, and finds its mistakes

The table says for each what passed, failed, or could not be had, and why. The exit code is 1 if something failed; with
``--required`` also if something could not be had. On Linux, torch of the package index brings the libraries of CUDA,
several GB for each environment; ``--index`` goes without.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COLUMNS = ("alone", "train", "bench", "types")
LIMIT = 1800  # seconds for one command

ALONE = """
import torch, recollect
x, w = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
f = lambda x: (x @ w).relu() @ w
kept = torch.autograd.grad(f(x).sum(), (x, w))
rebuilt = torch.autograd.grad(recollect.checkpoint(f, x).sum(), (x, w))
assert all(torch.equal(a, b) for a, b in zip(kept, rebuilt)), "other gradients than without a checkpoint"
"""

# `warn_unused_ignores` of strict mode makes an error of a comment whose line is right: that of a package without types.
USER = """
import torch
from torch import Tensor, nn

from recollect.aggregation import UPGradWeighting
from recollect.autogram import Engine
from recollect.models import RevGNN
from recollect.reversible import GroupAddRev


def gradients(model: RevGNN, x: Tensor, edge_index: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    loss = model.loss(model(x, edge_index), y)
    return torch.autograd.grad(loss, list(model.parameters()))


def weigh(model: nn.Module, losses: Tensor) -> None:
    Engine(model).backward(losses, UPGradWeighting())


GroupAddRev(nn.Linear(4, 4), num_groups=2)
GroupAddRev(nn.Linear(4, 4), num_groups="two")  # type: ignore[arg-type]
"""


@dataclass(frozen=True)
class Python:
    """An interpreter, or why there is none: one of ``path`` and ``missing`` is empty."""

    version: str
    path: str = ""
    missing: str = ""


@dataclass
class Row:
    """An environment: each column is ``ok``, ``FAILED``, or empty where it was not come to."""

    python: str
    torch: str
    columns: dict[str, str] = field(default_factory=dict)
    why: str = ""
    available: bool = True

    @property
    def failed(self) -> bool:
        """Whether something that could be had does not work."""
        return "FAILED" in self.columns.values()


class StepError(Exception):
    """A command that did not do what it should."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", metavar="PATH", help="interpreters; default: those that are found")
    parser.add_argument("--torch", nargs="+", metavar="SPEC", help="default: oldest, locked and newest")
    parser.add_argument("--index", metavar="URL", help="index of torch; default: that of pip")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="default: one that is built from here")
    parser.add_argument("--required", action="store_true", help="what cannot be had is a failure")
    given = parser.parse_args(arguments)
    pythons = [_python(path) for path in given.python] if given.python else find_pythons()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="recollect-matrix-") as folder:
        wheel = (given.wheel or _build(Path(folder))).resolve()
        for python in pythons:
            if python.missing:
                rows.append(Row(python.version, "", why=python.missing, available=False))
                continue
            for spec in given.torch or default_torch():
                rows.append(_look(python, spec, given.index, wheel, Path(folder, "environment")))
                print(table(rows[-1:], titles=False), flush=True)
    print(f"\n{table(rows)}")
    return int(any(row.failed or (given.required and not row.available) for row in rows))


def find_pythons() -> list[Python]:
    """For each version among the classifiers: on the PATH, or the newest that pyenv has."""
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = []
    for version in versions:
        installed = sorted(home.glob(f"{version}.*/bin/python3"), key=lambda path: _numbers(path.parts[-3]))
        candidates = [f"python{version}", *map(str, reversed(installed))]
        working = (_python(path) for path in candidates if shutil.which(path))
        nothing = Python(version, missing=f"no python{version}, neither on the PATH nor in {home}")
        found.append(next((python for python in working if not python.missing), nothing))
    return found


def _python(path: str) -> Python:
    program = "import platform; print(platform.python_version())"
    done = subprocess.run([path, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:  # such as pyenv's stand-in for a version that is not chosen
        return Python(path, missing=f"{path} does not start: {_last(done.stderr)}")
    return Python(done.stdout.strip(), path=path)


def default_torch() -> list[str]:
    """What `pyproject.toml` allows at least, what `constraints.txt` has, and the newest."""
    (bound,) = re.findall(r"^torch>=([\d.]+)$", "\n".join(PROJECT["dependencies"]), re.MULTILINE)
    (locked,) = re.findall(r"^torch==.+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return [f"torch=={bound}.*", locked, "torch"]


def _build(folder: Path) -> Path:
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder / "dist"), str(ROOT)], folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def _look(python: Python, spec: str, index: str | None, wheel: Path, folder: Path) -> Row:
    """Make an environment, look at what runs in it, and delete it."""
    row = Row(python.version, spec)
    try:
        (folder / "work").mkdir(parents=True)
        environment = Environment(folder, wheel)
        try:
            _run([python.path, "-m", "venv", str(folder / "venv")], folder)
            environment.pip(spec, *(["--index-url", index] if index else []))
        except StepError as error:
            row.why, row.available = f"not available: {error}", False
            return row
        program = "from importlib.metadata import version; print(version('torch'))"
        row.torch = environment.run("python", "-c", program).strip()
        for column in COLUMNS:
            row.columns[column] = "FAILED"
            getattr(environment, column)()
            row.columns[column] = "ok"
    except StepError as error:
        row.why = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


@dataclass(frozen=True)
class Environment:
    """A clean environment with torch, and what is done in it."""

    folder: Path
    wheel: Path

    def pip(self, *what: str) -> None:
        """Install into it."""
        self.run("python", "-m", "pip", "install", "-q", *what)

    def run(self, program: str, *arguments: str, code: int = 0, cwd: Path | None = None) -> str:
        """Run a program of the environment in its working folder; return what it prints."""
        return _run([str(self.folder / "venv" / "bin" / program), *arguments], cwd or self.folder / "work", code)

    def alone(self) -> None:
        """Torch and nothing else."""
        self.pip(str(self.wheel))
        _expect(self.run("recollect", "--version"), f"recollect {PROJECT['version']}")
        self.run("python", "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", ALONE)
        _expect(self.run("recollect", "train", code=1), 'pip install "torch-recollect[train]"')

    def train(self) -> None:
        """With the extra, the training application."""
        self.pip(f"{self.wheel}[train]")
        self.run("recollect", "train", "dataset=karate", "model.num_layers=2", "epochs=1", "device=cpu", "run_dir=run")
        if not (self.folder / "work" / "run" / "report.html").is_file():
            raise StepError("recollect train wrote no report")

    def bench(self) -> None:
        """The command says where benchmarks are; there, they run with what is installed."""
        _expect(self.run("recollect", "bench", "depth", "--quick", code=1), "make bench")
        self.run("python", "-m", "bench.depth", "--quick", "--output", str(self.folder / "work"), cwd=ROOT)

    def types(self) -> None:
        """What a type checker says of a user's file."""
        self.pip("mypy")
        (self.folder / "work" / "user.py").write_text(USER, encoding="utf-8")
        self.run("mypy", "--strict", "user.py")


def _run(command: Sequence[str], cwd: Path, code: int = 0) -> str:
    """Run a command without what this process' environment says of Python; return what it prints."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    name = " ".join(Path(part).name if part.startswith("/") else part for part in command[:5]).partition("\n")[0]
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StepError(f"{name}: no end after {LIMIT} s") from error
    if done.returncode != code:
        sys.stderr.write(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        raise StepError(f"{name}: exit code {done.returncode}, {_last(done.stderr) or _last(done.stdout)}")
    return done.stdout + done.stderr


def _expect(text: str, part: str) -> None:
    if part not in text:
        raise StepError(f"{part!r} is not in {text!r}")


def _last(text: str) -> str:
    """The last line that says something; of pip the one that names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [""])[-1][:300]


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def table(rows: Sequence[Row], titles: bool = True) -> str:
    """The table, and below each row why it has no more."""
    return "\n".join(_lines(rows, titles))


def _lines(rows: Sequence[Row], titles: bool) -> Iterator[str]:
    if titles:
        yield "  ".join([f"{'python':<8}", f"{'torch':<14}", *(f"{name:<6}" for name in COLUMNS)]).rstrip()
    for row in rows:
        cells = [f"{row.columns.get(name, '-'):<6}" for name in COLUMNS]
        yield "  ".join([f"{row.python:<8}", f"{row.torch or '-':<14}", *cells]).rstrip()
        if row.why:
            yield f"          {row.why}"


if __name__ == "__main__":
    sys.exit(main())
