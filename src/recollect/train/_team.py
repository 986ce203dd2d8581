"""Several processes that train one network on parts of one graph."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from recollect.distributed import Shares
from recollect.train._settings import SEEDS

__all__ = ["Team", "joined", "launch", "team"]

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for another before all of them end with an error."""

_ENDING = 60.0
"""Seconds that processes have to end after Ctrl-C."""


@dataclass(frozen=True)
class Team:
    """The processes of a run, which may be one.

    Attributes:
        rank: of this one; 0 writes the run's files.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def draw_apart(self, seed: int, epoch: int) -> None:
        """Let each process but the first draw numbers of its own, such as masks of dropout."""
        if not self.is_first:
            torch.manual_seed(seed + self.rank * SEEDS + epoch)

    def add_up(self, value: float | Tensor) -> Tensor:
        """Return the sum of a number over all processes, float64."""
        total = torch.as_tensor(value, dtype=torch.float64).detach().clone()
        distributed.all_reduce(total)
        return total

    def add_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Give each parameter the sum of its gradients in all processes; one that none has stays without."""
        for group in _by_dtype(parameters).values():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            used = grads[0].new_tensor([p.grad is not None for p in group])
            flat = torch.cat([used, *(grad.flatten() for grad in grads)])
            distributed.all_reduce(flat)
            used, *parts = torch.split(flat, [len(group), *(p.numel() for p in group)])
            for parameter, anywhere, part in zip(group, used.tolist(), parts, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part.view_as(parameter))
                elif anywhere:
                    parameter.grad = part.view_as(parameter).clone()

    def gather_rows(self, own: Tensor, shares: Shares) -> Tensor:
        """Return the rows of all nodes [N, ...] in each process, of those of its own nodes."""
        first = shares.ptr[shares.bounds].tolist()
        rows = own.new_empty(first[-1], *own.shape[1:])
        for rank in range(self.size):
            part = rows[first[rank] : first[rank + 1]]
            if rank == self.rank:
                part.copy_(own)
            distributed.broadcast(part, rank)
        return rows

    def share(self, value: Any) -> Any:
        """Return what the first process has, in each of them."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return what each process has, in the first one; nothing in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        distributed.gather_object(value, values)
        return values or []

    def collect(self, value: Any) -> list[Any]:
        """Return what each process has, in each of them."""
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


def _by_dtype(parameters: Iterable[Parameter]) -> dict[torch.dtype, list[Parameter]]:
    groups: dict[torch.dtype, list[Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault(parameter.dtype, []).append(parameter)
    return groups


def team() -> Team:
    """The processes of this run."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Team(0, 1)
    return Team(distributed.get_rank(), distributed.get_world_size())


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """Meet the other processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ or distributed.is_initialized():
        yield team()
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield team()
    finally:
        distributed.destroy_process_group()


def launch(words: Sequence[str], number: int) -> int:
    """Start so many processes of the command by torchrun, on this machine; return the exit code.

    Args:
        words: of the command line.
        number: of processes.
    """
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "-m", "recollect", "train"]
    threads = str(max(1, (os.cpu_count() or 1) // number))
    child = subprocess.Popen([sys.executable, *run, *words], env={"OMP_NUM_THREADS": threads, **os.environ})
    try:
        return child.wait()
    except KeyboardInterrupt:  # the child had it too, and ends its processes
        try:
            child.wait(timeout=_ENDING)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        raise
