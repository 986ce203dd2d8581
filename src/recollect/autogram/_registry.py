"""Which rule belongs to which layer: one explicit table, that users can add to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from recollect.autogram._factors import Factor

__all__ = ["Entry", "Registry", "Rule", "Sharing", "check_factor"]


class Rule(Protocol):
    r"""What a layer's Jacobian is: ``rule(layer, inputs, grads) -> {parameter's name: factor}``, a pure function.

    Row i is the layer applied to row i of the inputs, with row i of the gradients as its cotangent.

    ``inputs`` are the layer's arguments in the order of its forward, keywords put in their places (trailing ones that
    were not given are missing). Each tensor among them has one axis more than the layer was called with, in front:
    [r, \*shape], where r is m, or 1 where all objectives share it. Where the layer's elements are independent along an
    axis (:class:`Sharing`), row i may be element i alone, as a batch of one.

    ``grads`` are the gradients of the output's tensors, flattened: each is [m, \*shape], or None where there is none.

    A rule that does not cover how the layer was called raises :class:`NotCovered` (the exact fallback takes the call),
    and never guesses. Names of parameters that need no gradient may be left out.

    Example:
        >>> import torch
        >>> from recollect.autogram import Rows
        >>> def rule(layer, inputs, grads):  # of a layer that returns x * layer.weight
        ...     return {"weight": Rows((inputs[0] * grads[0]).sum(1))}
        >>> weight, x = torch.ones(3, requires_grad=True), torch.randn(5, 3)
        >>> # Each of 5 losses has one element of the batch: rows of inputs and gradients are batches of one.
        >>> jacobian = rule(None, (x[:, None],), (torch.ones(5, 1, 3),))["weight"].values
        >>> torch.equal(jacobian[2], torch.autograd.grad((x[2] * weight).sum(), weight)[0])
        True
    """

    def __call__(
        self, layer: Any, inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...], /
    ) -> Mapping[str, Factor]:
        """Return the factor of each parameter, by its name in the layer."""


class Sharing(Protocol):
    """Along which axes a layer's elements are independent: ``sharing(layer, inputs, axes)``.

    ``axes`` has, for each of the output's tensors (flattened), an axis along which every loss has entries of its own;
    None where that tensor gets no gradient. ``inputs`` are the arguments, of whose tensors only the shapes are there.
    If the layer's elements are independent along these axes, it returns for each argument the axis of its tensors that
    has the same elements, or None for one that every row shares. If they are not, or it cannot tell, it returns None:
    then the rule gets inputs that all rows share, and for each row the output's gradient with zeros in place of the
    others' entries.

    Example:
        >>> from recollect.autogram import Sharing
        >>> def sharing(layer, inputs, axes):  # of a layer that mixes the last axis of [batch, .., features]
        ...     (axis,) = axes
        ...     return (axis,) if axis is not None and axis < inputs[0].dim() - 1 else None
        >>> import torch
        >>> x = torch.empty(5, 7, 3)
        >>> sharing(None, (x,), (1,)), sharing(None, (x,), (2,))
        ((1,), None)
    """

    def __call__(
        self, layer: Any, inputs: tuple[Any, ...], axes: tuple[int | None, ...], /
    ) -> tuple[int | None, ...] | None:
        """Return an axis for each argument, or None."""


def check_factor(layer: nn.Module, name: str, factor: Factor, rows: int, parameter: Tensor) -> None:
    """Raise if what a rule gives is no Jacobian of a parameter.

    Args:
        layer: whose rule it is.
        name: of the parameter.
        factor: what the rule gives for it.
        rows: the number of objectives.
        parameter: of the layer.

    Raises:
        TypeError: it is no factor.
        ValueError: it is of another shape.
    """
    rule = f"the rule of {type(layer).__name__} gives"
    if not isinstance(factor, Factor):
        raise TypeError(f"{rule} a {type(factor).__name__} for {name!r}; a rule gives Rows, Outer, Picked or Blocks")
    if factor.num_rows != rows or factor.shape != parameter.shape:
        raise ValueError(
            f"{rule} {factor.num_rows} rows of shape {list(factor.shape)} for {name!r}; its Jacobian has {rows} rows "
            f"of shape {list(parameter.shape)}, one for each objective"
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A layer's rule.

    Attributes:
        rule: see :class:`Rule`.
        sharing: see :class:`Sharing`; None: no axis is known of.
        constant: parameters whose Jacobian does not depend on the inputs' values, such as biases. Where no others are
            trained, the rule gets tensors of the inputs' forms, and their values are not kept.
        has_output: whether this first output of the layer is kept by autograd in any case; then the rule gets it as a
            fourth argument, with rows as the inputs have them, or None where it has no gradient. None: never.
    """

    rule: Rule
    sharing: Sharing | None = None
    constant: frozenset[str] = frozenset()
    has_output: Callable[[Tensor], bool] | None = None


class Registry:
    """The table of rules.

    Args:
        table: from a layer's type to its entry. A type of another library, which is not imported for this, is given by
            its full name ("package.module.Class").
    """

    def __init__(self, table: Mapping[type[nn.Module] | str, Entry]) -> None:
        self._table = dict(table)
        self._found: dict[type, tuple[Entry, Any] | None] = {}
        # What a rule is for: a forward that is put in its place later, for all, has none.
        self._forwards = {kind: _forward_of(kind) for kind in table if not isinstance(kind, str)}

    def register(self, layer_type: type[nn.Module] | str, entry: Entry) -> None:
        """Add the rule of one more type of layer.

        Raises:
            ValueError: the type has a rule.
        """
        name = _name(layer_type)
        if any(_name(known) == name for known in self._table):
            raise ValueError(
                f"{name} has a rule already; a type has one rule: write a subclass with a forward of its own and "
                "register that"
            )
        self._table[layer_type] = entry
        if not isinstance(layer_type, str):
            self._forwards[layer_type] = _forward_of(layer_type)
        self._found.clear()

    def find(self, layer_type: type) -> Entry | None:
        """Return the entry of a type of layer, or None.

        A subclass has its base's rule only as long as its ``forward`` is the base's own, and that the one which the
        base had when the rule was registered (by name: when it was first asked for).
        """
        if layer_type not in self._found:
            self._found[layer_type] = self._look_up(layer_type)
        found = self._found[layer_type]
        return found[0] if found is not None and found[1] is _forward_of(layer_type) else None

    def _look_up(self, layer_type: type) -> tuple[Entry, Any] | None:
        """Return the entry of the nearest base that has one, and the forward that it is for."""
        for base in layer_type.__mro__:
            entry = self._table.get(base) or self._table.get(_name(base))
            if entry is not None:
                return entry, self._forwards.setdefault(base, _forward_of(base))
        return None


def _forward_of(layer_type: type) -> Any:
    return getattr(layer_type, "forward", None)


def _name(layer_type: type | str) -> str:
    return layer_type if isinstance(layer_type, str) else f"{layer_type.__module__}.{layer_type.__qualname__}"
