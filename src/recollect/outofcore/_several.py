"""Several losses whose Gramian is computed, a block of them at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from recollect._devices import widened, widest
from recollect.outofcore._objectives import Criterion, Pulled, as_vector, gradients_of

__all__ = ["SeveralLosses"]


class SeveralLosses:
    """The Gramian of several losses' gradients.

    Each parameter's m rows are squared, and given up, after the last pass that brings some of them; those of parameters
    that are reached in other passes too, at the end.

    Args:
        criterion: the losses [m] of a part.
        uses: how many passes bring gradients of each parameter.
        fit: how many losses go together, at the most.

    Attributes:
        gramian: of what was finished so far [m, m] float64, where there is such.
    """

    def __init__(self, criterion: Criterion, uses: Counter[nn.Parameter], fit: int) -> None:
        self._criterion = criterion
        self._fit = fit
        self._left = Counter(uses)
        self._held: dict[nn.Parameter, None] = {}
        self._squared: set[nn.Parameter] = set()
        self._number: int | None = None
        self.gramian: Tensor | None = None

    @property
    def number(self) -> int:
        """How many losses there are; known when the first part's are."""
        assert self._number is not None
        return self._number

    def losses_of(self, logits: Tensor, y: Tensor) -> Tensor:
        """See :class:`Objectives`: [m]."""
        losses = as_vector(self._criterion(logits, y), self._number)
        if self._number is None:
            self._number = losses.numel()
            self.gramian = torch.zeros(self._number, self._number, dtype=widest(losses.device), device=losses.device)
        return losses

    @property
    def blocks(self) -> list[range]:
        """See :class:`Objectives`."""
        return [range(k, min(k + self._fit, self.number)) for k in range(0, self.number, self._fit)]

    def width(self, width: int, block: range) -> int:
        """See :class:`Objectives`."""
        return width * len(block)

    def table(self, name: str, block: range) -> str:
        """See :class:`Objectives`."""
        return f"{name}x{len(block)}.{block.start}"

    def start(self, losses: Tensor, rows: Sequence[Tensor], parameters: Sequence[nn.Parameter], block: range) -> Pulled:
        """See :class:`Objectives`."""

        def seed(loss: int) -> list[Tensor]:
            one = torch.zeros_like(losses)
            one[loss] = 1
            return [one]

        return self._pull([losses], seed, rows, parameters, block)

    def pull(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        rows: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        block: range,
    ) -> Pulled:
        """See :class:`Objectives`."""
        flat = [g.view(g.size(0), len(block), -1) for g in gradients]

        def seed(loss: int) -> list[Tensor]:
            place = loss - block.start
            return [g[:, place].reshape(o.shape).to(o.dtype) for g, o in zip(flat, outputs, strict=True)]

        return self._pull(outputs, seed, rows, parameters, block)

    def _pull(
        self,
        outputs: Sequence[Tensor],
        seed: Callable[[int], list[Tensor]],
        rows: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        block: range,
    ) -> Pulled:
        # One loss after the other: on a CPU batched gradients are no faster, and not every function has them.
        inputs = [*rows, *parameters]
        found: list[Tensor | None] = [None] * len(inputs)
        for loss in block:
            gradients = gradients_of(outputs, rows, parameters, seed(loss), loss < self.number - 1)
            for k, (gradient, value) in enumerate(zip(gradients, inputs, strict=True)):
                if gradient is None:
                    continue
                dim = 1 if k < len(rows) else 0
                if found[k] is None:
                    shape = list(value.shape)
                    shape.insert(dim, len(block))
                    found[k] = value.new_zeros(shape, requires_grad=False)
                found[k].select(dim, loss - block.start).copy_(gradient)  # type: ignore[union-attr]
        return Pulled(found[: len(rows)], found[len(rows) :])

    def add(
        self, gradients: dict[nn.Parameter, Tensor], parameter: nn.Parameter, gradient: Tensor, block: range
    ) -> None:
        """See :class:`Objectives`."""
        if parameter not in gradients:
            gradients[parameter] = gradient.new_zeros(self.number, *gradient.shape[1:])
        gradients[parameter][block.start : block.stop] += gradient

    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """See :class:`Objectives`."""
        self._held.update(dict.fromkeys(parameters))

    def finish(self, parameters: Iterable[nn.Parameter], gradients: dict[nn.Parameter, Tensor]) -> None:
        """See :class:`Objectives`."""
        for parameter in parameters:
            self._left[parameter] -= 1
            if self._left[parameter] <= 0 and parameter in gradients and parameter not in self._held:
                self._square(parameter, gradients)

    def close(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """See :class:`Objectives`; what is left after this was squared too early."""
        for parameter in [each for each in gradients if each not in self._squared]:
            self._square(parameter, gradients)

    def _square(self, parameter: nn.Parameter, gradients: dict[nn.Parameter, Tensor]) -> None:
        rows = gradients.pop(parameter).reshape(self.number, -1)
        assert self.gramian is not None
        self.gramian += widened(rows @ rows.T)
        self._squared.add(parameter)
