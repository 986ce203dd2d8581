"""A system, which is one way to train a stack of layers, and one training step of it, measured and compared."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UnavailableError(Exception):
    """A system that cannot run here; the message says why."""


class System:
    """A stack of layers, and what can be learned of it after a step.

    Attributes:
        refills: it empties its input in forward, and in backward fills it with what it reconstructed.
    """

    def __init__(self, layers: Sequence[Callable[[Tensor], Tensor]], refills: bool = False) -> None:
        self.layers = layers
        self.refills = refills

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def last_drift(self) -> float | None:
        """What the system itself says of its drift."""
        return None

    def restored(self, given: Tensor, out: Tensor) -> tuple[Tensor | None, str]:
        """Return the reconstructed input, where it can be had, and how it was had.

        Args:
            given: the input of the step, after backward.
            out: the output of the step.
        """
        if self.refills:
            return given, "the input that was emptied in forward, as backward filled it again"
        return None, "none: the input of every layer is kept"


@dataclass(frozen=True)
class Result:
    """What one step leaves behind.

    Attributes:
        gradients: of the input and the parameters.
        given: the input that the system was given, after backward.
        out: the output, which some systems have emptied.
    """

    gradients: list[Tensor]
    given: Tensor
    out: Tensor


class Step:
    """Forward from a fresh copy of the input, loss, backward.

    The copy is because some systems empty their input. They fill it again in backward, so after the step it holds
    what they reconstructed.
    """

    def __init__(self, system: System, x: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self.system = system
        self.x = x  # a leaf that requires grad
        self.leaves = [x, *parameters]

    def zero_gradients(self) -> None:
        """Allocate the gradients, or zero them: with them there, a step's peak is what comes beyond them."""
        for leaf in self.leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            else:
                leaf.grad.zero_()

    def __call__(self) -> None:
        """Run the step as a training loop does, without holding the input: who would keep it pays for it."""
        self._backward(self.system(self.x.clone()))

    def result(self, seed: int) -> Result:
        """Run the step with random draws of its own."""
        self.zero_gradients()
        torch.manual_seed(seed)
        given = self.x.clone()
        out = self.system(given)
        self._backward(out)
        gradients = [leaf.grad.clone() for leaf in self.leaves if leaf.grad is not None]
        return Result(gradients, given.detach(), out.detach())

    @staticmethod
    def _backward(out: Tensor) -> None:
        F.mse_loss(out, torch.zeros((), dtype=out.dtype, device=out.device).expand_as(out)).backward()


def imported(name: str) -> ModuleType:
    """A peer's package.

    Raises:
        UnavailableError: it cannot be imported; the others are measured all the same.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peers decorate with names that torch has deprecated
            return importlib.import_module(name)
    except Exception as error:  # whatever it is
        raise UnavailableError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over norm of what is expected, all tensors together."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    norm = sum(float(b.double().square().sum()) for b in expected)
    return math.sqrt(error / norm)
