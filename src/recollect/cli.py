"""The command `recollect`: train, bench, info.

Each subcommand is imported when it is called, so that `recollect info` works where torch alone is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from recollect import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; by default those of the process.

    Returns:
        The exit code: 0 if all is well, 1 if something failed, 2 for wrong usage.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in _COMMANDS:
        return _COMMANDS[given[0]][0](given[1:])
    parser = argparse.ArgumentParser(
        prog="recollect",
        description="Train networks whose depth, graph or number of objectives has outgrown memory.",
        epilog="\n".join(f"  {name:<8} {text}" for name, (_, text) in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"recollect {__version__}")
    parser.add_argument("command", nargs="?", choices=_COMMANDS, help="one of the commands below; each has --help")
    try:
        parser.parse_args(given)
    except SystemExit as end:
        return int(end.code or 0)
    parser.print_help()
    return 0


def _train(arguments: Sequence[str]) -> int:
    try:
        from recollect.train import command
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("recollect"):
            raise
        sys.stderr.write(
            f"recollect train needs the package of the module {error.name!r}, which is not installed. Run:\n"
            f'  pip install "torch-recollect[train]"\n'
        )
        return 1
    return command(arguments)


def _bench(arguments: Sequence[str]) -> int:
    root = Path(__file__).parents[2]
    benches = sorted(p.stem for p in (root / "bench").glob("*.py") if not p.stem.startswith("_"))
    if not benches or not (root / "pyproject.toml").is_file():  # installed, and not as `make` and `pip -e` do it
        sys.stderr.write(
            f"recollect bench: the benchmarks are in the repository, and not in the package that is installed in "
            f"{Path(__file__).parent}. In a clone of the repository run: make bench\n"
        )
        return 1
    parser = argparse.ArgumentParser(
        prog="recollect bench",
        usage="recollect bench [-h] NAME [OPTION ...]",
        description="Measure side by side with the peers. What is not installed of them is left out: pip install "
        '"torch-recollect[bench]", or make bench.',
    )
    parser.add_argument("name", choices=benches, help="what to measure; each has options of its own, and --help")
    try:
        given = parser.parse_args(arguments[:1])
    except SystemExit as end:
        return int(end.code or 0)
    # In a process of its own, from the folder where the command was given: options name paths.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"bench.{given.name}", *arguments[1:]]
    return subprocess.call(command, env={**os.environ, "PYTHONPATH": path})


def _info(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="recollect info", description="Show versions, devices, and which optional packages are installed."
    )
    try:
        parser.parse_args(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    sys.stdout.write("\n".join(_info_lines()) + "\n")
    return 0


def _info_lines() -> Iterator[str]:
    import torch

    yield f"recollect  {__version__}"
    yield f"python     {platform.python_version()} ({sys.executable})"
    yield f"torch      {torch.__version__}"
    yield f"system     {platform.platform()}"
    foreign = _foreign_version()
    if foreign is not None:
        yield f"another project's package recollect {foreign} is installed, whose files take the place of these: run"
        yield "  pip uninstall recollect && pip install --force-reinstall --no-deps torch-recollect"
    yield ""
    yield "devices"
    yield f"  cpu      {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        yield f"  cuda:{index}   {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield "  cuda     none"
    yield ""
    yield "optional packages"
    for extra, packages in _extras().items():
        missing = []
        for package in packages:
            version = _version(package)
            missing += [package] if version is None else []
            yield f"  {extra:<8} {package:<18} {version or 'not installed'}"
        if missing:
            yield f'  {"":<8} to install what is missing: pip install "torch-recollect[{extra}]"'


def _extras() -> dict[str, list[str]]:
    """Extra -> its packages, as recollect's own metadata says; each package under the smallest extra that brings it."""
    try:
        requirements = importlib.metadata.requires("torch-recollect") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        requirements = []
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*;.*\bextra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if match and match[1] != "torch-recollect" and match[2] != "dev":
            extras.setdefault(match[2], []).append(match[1])
    shown: set[str] = set()
    for extra, packages in sorted(extras.items(), key=lambda item: len(item[1])):
        extras[extra] = [package for package in packages if package not in shown]
        shown.update(packages)
    return extras


def _foreign_version() -> str | None:
    """Return the version of the other project of the package index whose name is recollect, if it is installed."""
    try:
        other, own = importlib.metadata.metadata("recollect"), importlib.metadata.metadata("torch-recollect")
    except importlib.metadata.PackageNotFoundError:
        return None
    # An installation of this project from before its name changed has the same summary.
    return None if other["Summary"] == own["Summary"] else other["Version"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "train a deep reversible graph network, and measure what its depth costs"),
    "bench": (_bench, "measure time and memory side by side with the peers"),
    "info": (_info, "show versions, devices, and which optional packages are installed"),
}

if __name__ == "__main__":
    sys.exit(main())
