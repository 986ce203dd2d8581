"""One loss, or several whose Gramian is computed: what a step takes back through a part, and adds up over parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from recollect._devices import widened
from recollect.autogram import Certificate
from recollect.outofcore._leaves import without_hooks

__all__ = [
    "Criterion",
    "Objectives",
    "OneLoss",
    "Pulled",
    "Weighed",
    "Weighting",
    "as_vector",
    "certify",
    "gradients_of",
    "weigh",
]

Criterion = Callable[[Tensor, Tensor], Tensor]
Weighting = Callable[..., Tensor]

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}  # of the two sides of a certificate, as for engines
_NOISE = 30  # units of rounding that gradients which cancel leave, of losses of size 1


@dataclass(frozen=True)
class Pulled:
    """Gradients that came back through a part.

    Attributes:
        rows: of each input with rows [rows, width], or [rows, m, width] of m losses; ``None``: it was not used.
        parameters: of each parameter, of its shape, or [m, ...]; ``None``: it was not used.
    """

    rows: list[Tensor | None]
    parameters: list[Tensor | None]


class Objectives(Protocol):
    """What a step computes gradients of."""

    def losses_of(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the losses of a part, from its training nodes' logits and labels."""

    @property
    def blocks(self) -> list[range]:
        """Which losses go together: the gradients of others are not held meanwhile."""

    def width(self, width: int, block: range) -> int:
        """Return the entries of a row of a block's gradients, for rows of so many entries."""

    def table(self, name: str, block: range) -> str:
        """Return the name of a table of a block's gradients."""

    def start(self, losses: Tensor, rows: Sequence[Tensor], parameters: Sequence[nn.Parameter], block: range) -> Pulled:
        """Return the gradients of a block of a part's losses; blocks come in their order."""

    def pull(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        rows: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        block: range,
    ) -> Pulled:
        """Return the gradients of what the outputs, whose gradients are given as they lie in tables, depend on.

        Blocks come in their order; the graph of the outputs is freed with the last one.
        """

    def add(
        self, gradients: dict[nn.Parameter, Tensor], parameter: nn.Parameter, gradient: Tensor, block: range
    ) -> None:
        """Add a block's gradient of a parameter to those that are known."""

    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take notice of parameters whose gradients come in passes that were not counted."""

    def finish(self, parameters: Iterable[nn.Parameter], gradients: dict[nn.Parameter, Tensor]) -> None:
        """Take notice that a pass over all parts is over, which brought these parameters' gradients."""

    def close(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Take notice that all passes are over."""


def gradients_of(
    outputs: Sequence[Tensor],
    rows: Sequence[Tensor],
    parameters: Sequence[Tensor],
    seeds: Sequence[Tensor],
    keep: bool,
) -> list[Tensor]:
    # What does not depend on any input has no gradient to give.
    pairs = [pair for pair in zip(outputs, seeds, strict=True) if pair[0].requires_grad]
    inputs = [*rows, *parameters]
    if not pairs or not inputs:
        return [None] * len(inputs)  # type: ignore[list-item]
    outs, grads = zip(*pairs, strict=True)
    with without_hooks(parameters):
        return list(torch.autograd.grad(outs, inputs, grads, retain_graph=keep, allow_unused=True))


class OneLoss:
    """The gradient of one loss, a sum over parts.

    Args:
        criterion: the loss of a part.
        weights: [m], where the criterion returns m losses: the loss is their weighted sum.
    """

    def __init__(self, criterion: Criterion, weights: Tensor | None = None) -> None:
        self._criterion = criterion
        self._weights = weights

    def losses_of(self, logits: Tensor, y: Tensor) -> Tensor:
        """See :class:`Objectives`: a scalar."""
        loss = self._criterion(logits, y)
        if self._weights is not None:
            return as_vector(loss, self._weights.numel()) @ self._weights.to(loss)
        if not isinstance(loss, Tensor) or loss.dim():
            raise ValueError(
                f"criterion(logits, y) must return a scalar, the sum over a part's nodes (got {_described(loss)}); a "
                "vector of several losses goes with step(criterion, weighting)"
            )
        return loss

    @property
    def blocks(self) -> list[range]:
        """See :class:`Objectives`."""
        return [range(1)]

    def width(self, width: int, block: range) -> int:
        """See :class:`Objectives`."""
        return width

    def table(self, name: str, block: range) -> str:
        """See :class:`Objectives`."""
        return name

    def start(self, losses: Tensor, rows: Sequence[Tensor], parameters: Sequence[nn.Parameter], block: range) -> Pulled:
        """See :class:`Objectives`."""
        return self.pull([losses], [torch.ones_like(losses)], rows, parameters, block)

    def pull(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        rows: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        block: range,
    ) -> Pulled:
        """See :class:`Objectives`."""
        seeds = [
            gradient.reshape(output.shape).to(output.dtype) for gradient, output in zip(gradients, outputs, strict=True)
        ]
        found = gradients_of(outputs, rows, parameters, seeds, False)
        return Pulled(list(found[: len(rows)]), list(found[len(rows) :]))

    def add(
        self, gradients: dict[nn.Parameter, Tensor], parameter: nn.Parameter, gradient: Tensor, block: range
    ) -> None:
        """See :class:`Objectives`; what a journal may be about to write is not changed in place."""
        known = gradients.get(parameter)
        gradients[parameter] = gradient.clone() if known is None else known + gradient

    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """See :class:`Objectives`."""

    def finish(self, parameters: Iterable[nn.Parameter], gradients: dict[nn.Parameter, Tensor]) -> None:
        """See :class:`Objectives`: gradients stay until the step's end."""

    def close(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """See :class:`Objectives`."""


@dataclass(frozen=True)
class Weighed:
    """What was found of several losses, before their weighted gradient is computed.

    Attributes:
        losses: [m].
        gramian: [m, m].
        weights: [m].
        random: torch's state behind it.
    """

    losses: Tensor
    gramian: Tensor
    weights: Tensor
    random: Tensor


def weigh(weighting: Weighting, losses: Tensor, gramian: Tensor) -> Tensor:
    """Return the weights [m] that a weighting makes of a Gramian, and of the losses where it takes them.

    Raises:
        TypeError: it returns no tensor.
        ValueError: it returns another shape.
    """
    weights = weighting(gramian, *((losses,) if getattr(weighting, "takes_residuals", False) else ()))
    if not isinstance(weights, Tensor):
        raise TypeError(f"the weighting must return a tensor of one weight for each loss (got {_described(weights)})")
    if weights.shape != losses.shape:
        raise ValueError(
            f"the weighting must return one weight for each loss, {list(losses.shape)} (got {_described(weights)})"
        )
    return weights.detach().to(losses)


def certify(certificate: Certificate, found: Weighed, gradients: Iterable[Tensor]) -> None:
    """Compare wᵀ G w with the squared norm of the weighted gradient.

    Raises:
        GramianError: they differ by more than rounding.
    """
    gradients = list(gradients)
    dtype = found.losses.dtype
    tolerance, eps = _TOLERANCES.get(dtype, 5e-2), torch.finfo(dtype).eps
    gramian, w = widened(found.gramian), widened(found.weights)
    squared = sum((widened(g).square().sum() for g in gradients), gramian.new_zeros(()))
    norm = w.abs() @ gramian.diagonal().clamp(min=0).sqrt()
    noise = _NOISE * eps * (w.abs() @ widened(found.losses).abs().clamp(min=1))
    bound = norm.square() + (2 * norm * noise + noise.square()) / tolerance
    names = ("wᵀ G w", "‖Jᵀ w‖²", "(Σ |w_i| √G_ii)²")
    certificate.compare((w @ gramian @ w, squared, bound, norm.square()), tolerance, names, advice=_ADVICE)


_ADVICE = (
    "Both come from sweeps over the same parts, so that something computes other numbers each time, or has a backward "
    "that is not linear: look at the criterion, and at functions and hooks of your own. No gradient was accumulated"
)


def as_vector(losses: object, number: int | None) -> Tensor:
    """Return the losses of a part, or say that they are no vector."""
    if not isinstance(losses, Tensor) or losses.dim() != 1 or losses.numel() != (number or losses.numel() or 1):
        raise ValueError(
            f"criterion(logits, y) must return a vector of {number or 'm'} losses with a weighting, each a sum over a "
            f"part's nodes (got {_described(losses)})"
        )
    return losses


def _described(found: object) -> str:
    return f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
