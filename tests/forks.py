"""Runs scripts in processes that are forked from one that has imported what they need, which takes most of their time.

As a script, ``python forks.py MODULE...``, it is that process: see ``Forks``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class Forks:
    """Runs scripts as ``python SCRIPT ARGUMENT...`` does, until ``stop``.

    Args:
        modules: what is imported before.
        options: of Python.
        environment: variables that are set.
    """

    def __init__(self, modules: Sequence[str], options: Sequence[str] = (), **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *options, __file__, *modules],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, commands: Sequence[Sequence[str]], folder: Path, timeout: float) -> tuple[list[int | None], str]:
        """Run scripts side by side in a folder, and return their exit codes and what they wrote.

        The code of a process that takes longer than ``timeout`` seconds, and is ended, is ``None``.
        """
        self._process.stdin.write(json.dumps([commands, str(folder), timeout]) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return codes, "\n".join((folder / f"{number}.log").read_text() for number in range(len(commands)))

    def stop(self) -> None:
        self._process.communicate()


def _run(commands: list[list[str]], folder: str, timeout: float) -> list[int | None]:
    processes = []
    for number, command in enumerate(commands):
        processes.append(os.fork())
        if not processes[-1]:
            os.chdir(folder)
            _redirect(f"{number}.log")
            sys.argv, sys.path[0] = command, os.path.dirname(command[0])
            runpy.run_path(command[0], run_name="__main__")
            sys.exit()
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(processes) and time.monotonic() < end:
        for process in set(processes) - codes.keys():
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for process in set(processes) - codes.keys():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return [codes.get(process) for process in processes]


def _redirect(log: str) -> None:
    """Let this process read nothing, and write to a file what it has to say."""
    for file, flags, numbers in ((os.devnull, os.O_RDONLY, [0]), (log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, [1, 2])):
        opened = os.open(file, flags)
        for number in numbers:
            os.dup2(opened, number)
        os.close(opened)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that gc.collect() need not go through it again in each process
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(*json.loads(line))) + "\n")
        sys.stdout.flush()
