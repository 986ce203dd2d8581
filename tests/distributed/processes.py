"""Runs cases in processes of their own, which meet through a file; nothing here waits for ever.

As a script, ``python processes.py RANK WORLD_SIZE FOLDER MODULE HOW [CASE...]``, one of these processes: it runs the
cases of ``MODULE`` one after another, each in a process group of its own, and saves for each what it raised.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # frames would import it in each rank, when the first of them runs
import torch.distributed.nn  # behind init_process_group it would keep the group, and the process end by a signal
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import recollect

sys.path.insert(0, str(Path(__file__).parents[1]))  # for forks.py, where this is imported by a program of its own

from forks import Forks

PATIENCE = 30.0  # seconds that a process waits for another
TIMEOUT = 240.0  # seconds for all cases of a module
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}

Wrap = Callable[..., Any]

# How a checkpoint is made. The tests use recollect's; the others show that a case is sound.
HOW: dict[str, Wrap] = {
    "recollect": recollect.checkpoint,
    "torch": lambda function, *args, **kwargs: torch_checkpoint(function, *args, use_reentrant=False, **kwargs),
    "plain": lambda function, *args, **kwargs: function(*args, **kwargs),
}


def starter() -> Forks:
    """Return what starts processes; it has imported all cases."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    modules = sorted(path.stem for path in here.glob("*_cases.py"))
    return Forks(modules, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=paths)


def run(
    forks: Forks, module: str, world: int, folder: Path, how: str = "recollect", cases: Sequence[str] = ()
) -> list[Any]:
    """Return for each process a dictionary from the cases of a module to what they raised (a text), or ``None``."""
    arguments = [str(world), str(folder), module, how, *cases]
    codes, logs = forks.run([[__file__, str(rank), *arguments] for rank in range(world)], folder, TIMEOUT)
    assert codes == [0] * world, f"exit codes {codes}:\n{logs}"
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def registering(cases: dict[str, Callable[[Wrap, int, int], None]]) -> Callable[..., Callable[..., None]]:
    """Return what adds a function of rank, world and settings to the cases of a module, by its name or another."""

    def case(function: Callable[..., None], name: str = "", **settings: Any) -> Callable[..., None]:
        def run(wrap: Wrap, rank: int, world: int) -> None:
            function(rank, world, **settings)

        cases[name or function.__name__] = run
        return function

    return case


def full(tensor: Tensor | None) -> Tensor | None:
    """Return a DTensor's elements from all ranks, and any other tensor as it is."""
    if tensor is None:
        return None
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name.removeprefix("module."): full(p.grad) for name, p in net.named_parameters()}


def average(net: nn.Module) -> None:
    """Average over the ranks the gradients of the parameters that nobody shards."""
    for parameter in net.parameters():
        if parameter.grad is not None and not hasattr(parameter, "full_tensor"):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def parameters(net: nn.Module) -> dict[str, Tensor | None]:
    return {name.removeprefix("module."): full(p) for name, p in net.named_parameters()}


def assert_close(found: Any, expected: Any, tolerance: float, name: str = "value") -> None:
    """Compare tensors, or dictionaries of tensors, by the relative error of each."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), f"{name}: {list(found)} for {list(expected)}"
        for key in expected:
            assert_close(found[key], expected[key], tolerance, f"{name} of {key}")
        return
    assert (found is None) == (expected is None), f"{name}: {found} for {expected}"
    if expected is None:
        return
    assert found.shape == expected.shape, f"{name}: {found.shape} for {expected.shape}"
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))
    assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def _main(rank: int, world: int, folder: Path, module: str, how: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", recollect.frames.DriftWarning)
    cases: dict[str, Callable[[Wrap, int, int], None]] = importlib.import_module(module).CASES
    results: dict[str, str | None] = {}
    for number, name in enumerate(names or cases):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / f'store{number}'}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=PATIENCE),
        )
        torch.manual_seed(0)
        results[name] = None
        try:
            cases[name](HOW[how], rank, world)
        except BaseException:  # what pytest raises for a failure is no Exception
            results[name] = traceback.format_exc()
        finally:
            dist.destroy_process_group()
            sys.excepthook = sys.__excepthook__  # each group puts one more before it
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5], sys.argv[6:])
