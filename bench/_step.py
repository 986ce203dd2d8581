"""One training step of a system, for measuring and for comparing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench._systems import SYSTEMS, Blocks, System


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


def make_step(name: str, blocks: Blocks, x: Tensor, graph: Tensor) -> Step:
    """A step of one of `SYSTEMS` over blocks that it shares with the others.

    Raises:
        UnavailableError: it cannot run here.
    """
    return Step(SYSTEMS[name](blocks, graph), x, [p for stack in blocks for p in stack.parameters()])


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over norm of what is expected, all tensors together."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    norm = sum(float(b.double().square().sum()) for b in expected)
    return (error / norm) ** 0.5
