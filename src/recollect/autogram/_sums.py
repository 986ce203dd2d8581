"""What is summed up of the parameters' Jacobians: their whole square J Jᵀ, or its diagonal alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recollect.autogram._contract import add_gramian, with_bias
from recollect.autogram._factors import Blocks, Factor, Rows, as_rows, form_rows, held_elements, join, merge
from recollect.autogram._norms import squared_norms
from recollect.autogram._square import SquareSum, padded_zeros

__all__ = ["Gather", "Joined", "NormSum", "Sum", "WholeSum"]


# Rows wait for others, to be squared with them, up to this part of what the largest layer's Jacobian is formed from:
# less than the memory that is needed in any case.
_TOGETHER = 32


class Sum(ABC):
    """Takes each parameter's Jacobian, as passes bring rows of it.

    Args:
        parameters: by id.
        passes: the number of backward passes.
        rows: how many rows come in each.
        dtype: what is summed in.
        device: where.
    """

    def __init__(
        self, parameters: Mapping[int, Tensor], passes: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.parameters = parameters
        self.passes = passes
        self.rows = rows
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def take(self, parameter: int, turn: int, factors: Sequence[Factor]) -> None:
        """Take all factors of a parameter in one pass, the pass' number ``turn``; their sum is its Jacobian."""

    @abstractmethod
    def take_row(self, parameter: int, turn: int, grad: Tensor) -> None:
        """Take the gradient of a parameter in a pass that is for one loss."""

    @abstractmethod
    def total(self) -> Tensor:
        """Return the sum, after the last pass."""


class Joined(Sum):
    """A sum for which every row of a parameter meets every other: rows are held until the last pass."""

    def __init__(
        self, parameters: Mapping[int, Tensor], passes: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(parameters, passes, rows, dtype, device)
        self._held: dict[int, dict[int, Factor]] = {}
        self._dense: dict[int, Tensor] = {}

    @abstractmethod
    def add(self, parameter: int, factors: Sequence[Factor]) -> None:
        """Take the Jacobian of a parameter with the rows of all passes."""

    def take(self, parameter: int, turn: int, factors: Sequence[Factor]) -> None:
        """Take a pass' factors, and hold them unless it is the only one."""
        if self.passes == 1:
            self.add(parameter, factors)
            return
        shape = self.parameters[parameter].shape
        factors = merge(factors)
        large = held_elements(factors) > self.rows * shape.numel()
        if len(factors) > 1 or isinstance(factors[0], Blocks) or large:
            factors = [as_rows(factors, shape)]
        self._held.setdefault(parameter, {})[turn] = factors[0]

    def take_row(self, parameter: int, turn: int, grad: Tensor) -> None:
        """Hold a gradient in the row of its pass."""
        rows = self._dense.get(parameter)
        if rows is None:
            rows = self._dense[parameter] = padded_zeros(self.passes, grad.numel(), self.dtype, self.device)
        rows[turn] = (grad.to_dense() if grad.layout != torch.strided else grad).reshape(-1)

    def finish(self) -> None:
        """Hand on what had to wait for the last pass."""
        while self._dense:
            parameter, rows = self._dense.popitem()
            self.add(parameter, [Rows(rows.view(self.passes, *self.parameters[parameter].shape))])
        while self._held:
            parameter, held = self._held.popitem()
            shape = self.parameters[parameter].shape
            parts = list(held.values())
            if len(held) < self.passes:
                none = Rows(form_rows(parts[:1], slice(0, 1)).new_zeros(self.rows, *shape))
                parts = [held.get(turn, none) for turn in range(self.passes)]
            whole = join(parts)
            if whole is None:
                whole = join([as_rows([part], shape) for part in parts])
            assert whole is not None
            self.add(parameter, [whole])


class WholeSum(Joined):
    """The Gramian [m, m] of the rows of all passes, one behind the other.

    What is small waits: Jacobians of biases and scales are squared many at once, and that of a bias with the weight's
    which comes next, if both have the same gradient.
    """

    def __init__(
        self, parameters: Mapping[int, Tensor], passes: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(parameters, passes, rows, dtype, device)
        self._square = SquareSum(passes * rows, dtype, device)
        self._small: list[Rows] = []
        self._held_elements = self._largest = 0

    def add(self, parameter: int, factors: Sequence[Factor]) -> None:
        """Square a parameter's Jacobian, or let it wait."""
        self._largest = max(self._largest, held_elements(factors))
        match list(factors):
            case [Rows() as rows]:
                if (self._held_elements + rows.values.numel()) * _TOGETHER > self._largest:
                    self._add_small()
                self._small.append(rows)
                self._held_elements += rows.values.numel()
            case [weight] if self._small and (both := with_bias(weight, self._small[-1])) is not None:
                self._held_elements -= self._small.pop().values.numel()
                add_gramian(self._square, [both])
            case several:
                if self._held_elements * _TOGETHER > self._largest:
                    self._add_small()
                add_gramian(self._square, several)

    def total(self) -> Tensor:
        """Return the Gramian, symmetric."""
        self.finish()
        self._add_small()
        return self._square.total()

    def _add_small(self) -> None:
        small, self._small, self._held_elements = self._small, [], 0
        if len(small) == 1:
            add_gramian(self._square, small)
        elif small:
            self._square.add_product(torch.cat([form_rows([rows], slice(0, rows.num_rows)) for rows in small], 1))


class NormSum(Sum):
    """The diagonal of the Gramian [m], the rows' squared norms: each pass brings its own, and nothing is held."""

    def __init__(
        self, parameters: Mapping[int, Tensor], passes: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(parameters, passes, rows, dtype, device)
        self._squares = torch.zeros(passes, rows, dtype=dtype, device=device)

    def take(self, parameter: int, turn: int, factors: Sequence[Factor]) -> None:
        """Add the squared norms of a pass' rows."""
        self._squares[turn] += squared_norms(factors, self.dtype, self.device)

    def take_row(self, parameter: int, turn: int, grad: Tensor) -> None:
        """Add the squared norm of a gradient."""
        if grad.layout != torch.strided:
            grad = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad.to_dense()
        self._squares[turn] += torch.linalg.vector_norm(grad, dtype=self.dtype).square()

    def total(self) -> Tensor:
        """Return the squared norms."""
        return self._squares.flatten()


class Gather:
    """Factors on their way to what is summed up of them.

    Args:
        total: takes all factors of a parameter in a pass together.
        parameters: by id.
        events: how often each parameter is heard of in one pass.
        rows: how many rows come in each pass.
    """

    def __init__(self, total: Sum, parameters: Mapping[int, Tensor], events: Mapping[int, int], rows: int) -> None:
        self._total = total
        self._parameters = parameters
        self._events = events
        self._rows = rows
        self._pass = 0
        self._now: dict[int, list[Factor]] = {}
        self._waiting = dict(events)

    def add(self, parameter: int, factor: Factor | None) -> None:
        """Take a factor of this pass; None: a use of the parameter that contributes nothing."""
        if factor is not None:
            factors = self._now.setdefault(parameter, [])
            factors.append(factor)
            if len(factors) > 1 and held_elements(factors) > self._rows * self._parameters[parameter].numel():
                # No more is held of a parameter that is used again and again than its rows are.
                self._now[parameter] = [as_rows(factors, self._parameters[parameter].shape)]
        self._waiting[parameter] -= 1
        if self._waiting[parameter] == 0:
            self._close(parameter)

    def end_pass(self) -> None:
        """Take notice that this backward pass is over."""
        for parameter in list(self._now):
            self._close(parameter)
        self._waiting = dict(self._events)
        self._pass += 1

    def _close(self, parameter: int) -> None:
        factors = self._now.pop(parameter, None)
        if factors:
            self._total.take(parameter, self._pass, factors)
