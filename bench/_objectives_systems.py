"""The systems that `bench.objectives` compares: forward, and the Gramian of all losses' gradients, several ways."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench._harness import synchronize
from bench._objectives_works import Work
from bench._step import imported
from recollect.autogram import Engine

Gramian = Callable[[Tensor], Tensor | None]


class GramianStep:
    """A forward pass and what follows it.

    Attributes:
        gramian: that of the last call, [m, m]; None for plain, which has none.
        seconds: that each call spent after its forward pass.
    """

    def __init__(self, losses: Callable[[], Tensor], after: Gramian, device: torch.device) -> None:
        self._losses = losses
        self._after = after
        self._device = device
        self.gramian: Tensor | None = None
        self.seconds: list[float] = []

    def forget(self) -> None:
        """Forget earlier calls."""
        self.gramian = None
        self.seconds = []

    def __call__(self) -> None:
        self.gramian = None
        losses = self._losses()
        synchronize(self._device)
        start = time.perf_counter()
        self.gramian = self._after(losses)
        synchronize(self._device)
        self.seconds.append(time.perf_counter() - start)


def _product(jacobians: Sequence[Tensor | None]) -> Tensor:
    rows = [jacobian.flatten(1) for jacobian in jacobians if jacobian is not None]
    return torch.stack([row @ row.T for row in rows]).sum(0)


def _plain(model: nn.Module, batch_dim: int | None) -> Gramian:
    """An ordinary training step's backward pass, into gradients that are there already."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def backward(losses: Tensor) -> None:
        losses.mean().backward()

    return backward


def _recollect(model: nn.Module, batch_dim: int | None) -> Gramian:
    return Engine(model).compute_gramian


def _freed(model: nn.Module, batch_dim: int | None) -> Gramian:
    return partial(Engine(model).compute_gramian, retain_graph=False)


def _told(model: nn.Module, batch_dim: int | None) -> Gramian:
    return partial(Engine(model, batch_dim=batch_dim).compute_gramian, retain_graph=False)


def _torchjd(model: nn.Module, batch_dim: int | None) -> Gramian:
    gramian: Gramian = imported("torchjd.autogram").Engine(model, batch_dim=batch_dim).compute_gramian
    return gramian


def _autojac(model: nn.Module, batch_dim: int | None) -> Gramian:
    jac = imported("torchjd.autojac").jac
    return lambda losses: _product(jac(losses, list(model.parameters())))


def _batched(model: nn.Module, batch_dim: int | None) -> Gramian:
    def rows(losses: Tensor) -> Tensor:
        one_hot = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
        return _product(torch.autograd.grad(losses, list(model.parameters()), one_hot, is_grads_batched=True))

    return rows


SYSTEMS: dict[str, Callable[[nn.Module, int | None], Gramian]] = {
    "plain": _plain,
    "recollect": _recollect,
    "freed": _freed,
    "told": _told,
    "torchjd": _torchjd,
    "autojac": _autojac,
    "batched": _batched,
}
NOTES = {
    "plain": "forward and the backward pass of the mean loss: no Gramian",
    "recollect": "recollect.autogram.Engine, not told of a batch; the graph stays for a backward pass with weights",
    "freed": "the same with retain_graph=False: what the graph saved is freed on the way, as by plain's backward pass",
    "told": "freed, with batch_dim",
    "torchjd": "torchjd.autogram.Engine, with batch_dim",
    "autojac": "torchjd.autojac.jac, and the product of the Jacobian with itself",
    "batched": "torch.autograd.grad with is_grads_batched, and the same product",
}
HOLDS_THE_JACOBIAN = ("autojac", "batched")  # and takes every row back through the whole batch: memory grows with rows


def make_step(name: str, work: Work, device: torch.device, rows: int | None = None) -> GramianStep:
    """A step of one of `SYSTEMS` on a copy of the work's model.

    Args:
        rows: how many of the losses; None: all.

    Raises:
        UnavailableError: it cannot run here.
    """
    model = copy.deepcopy(work.model)
    after = SYSTEMS[name](model, work.batch_dim)
    return GramianStep(lambda: work.losses(model)[:rows], after, device)
