"""How a layer's gradient by the rows of a mini-batch is found from what nodes outside get of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recollect._util._tree import Tree
from recollect.autoscale._network import LayeredGNN, State
from recollect.autoscale.loader._outward import Outward
from recollect.messages import multiplied, shifted, sparse_csr

__all__ = [
    "Blank",
    "Edges",
    "Form",
    "Moved",
    "Way",
    "drawn_like",
    "one_more_edge",
    "same",
    "through_near",
    "through_sources",
    "transposed",
    "way_of",
]

Blank = Callable[[int], State]
"""Makes a layer's state for so many targets."""


class Form(Enum):
    """What a layer z = f(x, A) is, as a function of its sources j for a target i; the first are the fastest.

    All but the last send Σ_i (∂z_i / ∂x_j)ᵀ v_i back without what the target's other sources hold, and all but the last
    two without the edges from these.
    """

    SUM = "z_i = Σ a_ij g(x_j)"
    SUM_AND_OWN = "z_i = Σ a_ij g(x_j) + s(x_i)"
    EDGES = "z_i = Σ g(x_j, a_ij) + s(x_i)"
    ALL_EDGES = "z_i = Σ w_ij g(x_j) + s(x_i), with w_ij by all edges into i"
    ANY = "z_i = f(x_j for all j)"


@dataclass(frozen=True)
class Way:
    """How a layer's gradient is sent back.

    Attributes:
        form: the layer's.
        products: whether the results of its products count, and not only the graph behind them. They do not where the
            layer is linear from its products on.
        written: whether what the network itself says of a sum of g(x_j) was seen to be right.
    """

    form: Form
    products: bool = True
    written: bool = False


class _WithoutProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of matrices give zeros. Autograd, which is above this, gets the same graph as ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            left, right = args[-2:] if func is not _REDUCED else args[:2]
            zeros = torch.zeros(left.size(0), right.size(1), dtype=right.dtype, device=right.device)
            return (zeros, zeros.new_empty(0, dtype=torch.int64)) if func is _REDUCED else zeros
        return func(*args, **(kwargs or {}))


_REDUCED = torch.ops.aten._sparse_mm_reduce_impl.default
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, _REDUCED)


class Edges:
    """A mini-batch's outward edges in the ways that layers need them, each made when it is first asked for.

    Args:
        outward: the edges, not ``complete``.
    """

    def __init__(self, outward: Outward) -> None:
        self._outward = outward
        self._one_each: dict[tuple[int, int], Tensor] = {}

    @property
    def num_targets(self) -> int:
        """T."""
        return self._outward.num_targets

    @cached_property
    def by_target(self) -> Outward:
        """See :meth:`Outward.by_target`."""
        return self._outward.by_target()

    @cached_property
    def adj_t(self) -> Tensor:
        """See :meth:`Outward.adj_t`."""
        return self.by_target.adj_t()

    @property
    def near(self) -> Tensor | None:
        """See :class:`Outward`."""
        return self._outward.near

    @cached_property
    def all(self) -> Tensor:
        """See :meth:`Outward.adj`."""
        return self._outward.adj()

    @cached_property
    def adj(self) -> Tensor:
        """The edges of these rows as sparse CSR matrix [R, T]; of all rows if ``near`` is ``None``."""
        return self.all if self.near is None else self._outward._replace(rowptr=self._near_rowptr).adj()

    def to_nodes(self, num_nodes: int, near: bool) -> Tensor:
        """Return the edges as sparse CSR matrix to all nodes of the graph [B, N], or those of ``near`` rows [R, N]."""
        rowptr = self._near_rowptr if near and self.near is not None else self._outward.rowptr
        return sparse_csr(rowptr, self._node, self._outward.value, (rowptr.numel() - 1, num_nodes))

    @cached_property
    def _node(self) -> Tensor:
        """The other end of each edge, among all nodes of the graph [E']."""
        return self._outward.n_id[self._outward.col]

    @cached_property
    def _near_rowptr(self) -> Tensor:
        assert self.near is not None
        return torch.cat([self._outward.rowptr[self.near], self._outward.rowptr[-1:]])

    def one_each(self, size: int, before: int = 0) -> Tensor:
        """Return an adjacency [size, before + size] with an edge of weight 1 into each, from the row so far behind."""
        if (size, before) not in self._one_each:
            self._one_each[size, before] = shifted(size, before, self._outward.value)
        return self._one_each[size, before]


def transposed(
    model: LayeredGNN | Moved, layer: int, way: Way, own: Tensor, given: Tensor, edges: Edges, blank: Blank
) -> Tensor | None:
    """Return Σ_i (∂z_i / ∂x_j)ᵀ v_i over the nodes i outside, for each j in the batch [B, channels], or ``None`` for 0.

    Args:
        model: gives the layer.
        layer: its number.
        way: the layer's, of a form but ``ANY``.
        own: x_j [B, channels].
        given: v_i [T, out_channels].
        edges: to the nodes i.
        blank: makes the layer's state.
    """
    if way.form == Form.EDGES:
        return _by_targets(model, layer, way, own, given, edges, blank)
    return through_near(model, layer, way, own, multiplied(edges.adj, given), edges, blank)


def through_near(
    model: LayeredGNN | Moved, layer: int, way: Way, own: Tensor, given: Tensor, edges: Edges, blank: Blank
) -> Tensor | None:
    """Return what :func:`transposed` does, of a layer that is no sum by ``EDGES``.

    Args:
        model: see there.
        layer: see there.
        way: see there.
        own: see there.
        given: Σ a_ij v_i over the nodes i outside, for the rows j that have such edges [R, out_channels].
        edges: see there.
        blank: see there.
    """
    near = edges.near
    rows = own if near is None else own[near]
    found = through_sources(model, layer, way, rows, given, edges, blank)
    if near is None or found is None:
        return found
    return found.new_zeros(own.shape).index_copy_(0, near, found)


def through_sources(
    model: LayeredGNN | Moved, layer: int, way: Way, own: Tensor, given: Tensor, edges: Edges, blank: Blank
) -> Tensor | None:
    """Return (∂g(x_j) / ∂x_j)ᵀ v_j for each row j of a layer's input [R, channels], or ``None`` for 0.

    Args:
        model: gives the layer.
        layer: its number.
        way: the layer's, which is a sum of a_ij g(x_j).
        own: x_j [R, channels].
        given: v_j [R, out_channels].
        edges: of the mini-batch.
        blank: makes the layer's state.
    """
    if way.written and not torch.is_autocast_enabled(own.device.type):
        with torch.no_grad():
            found = model.send_back(layer, own, given.to(own))
        if found is not None:
            return found
    before = 0 if way.form == Form.SUM else own.size(0)  # rows of the targets, which are others than those of sources
    adj_t = edges.one_each(own.size(0), before)
    with torch.enable_grad():
        own = own.detach().requires_grad_()
        x = torch.cat([own.new_zeros(before, own.size(1)), own]) if before else own
        with nullcontext() if way.products else _WithoutProducts():  # type: ignore[no-untyped-call]
            out = model.run_layer(layer, x, adj_t, blank(own.size(0)))
        return torch.autograd.grad(out, own, given.to(out), allow_unused=True)[0] if out.requires_grad else None


def _by_targets(
    model: LayeredGNN | Moved, layer: int, way: Way, own: Tensor, given: Tensor, edges: Edges, blank: Blank
) -> Tensor | None:
    """Return what :func:`transposed` does, by the edges."""
    with torch.enable_grad():
        own = own.detach().requires_grad_()
        x = torch.cat([own.new_zeros(edges.num_targets, own.size(1)), own])
        with nullcontext() if way.products else _WithoutProducts():  # type: ignore[no-untyped-call]
            out = model.run_layer(layer, x, edges.adj_t, blank(edges.num_targets))
        return torch.autograd.grad(out, own, given.to(out), allow_unused=True)[0] if out.requires_grad else None


class Moved(nn.Module):
    """Runs a model's layers with other parameters: where some are zero, as gates are at first, layers look simpler.

    Args:
        model: gives the layers, and stays as it is.
        generator: what the differences are drawn from.
    """

    def __init__(self, model: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.model = model
        self._others = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                other = drawn_like(parameter.detach(), generator).mul_(0.3).add_(parameter.detach())
                self._others[f"model.{name}"] = other

    def forward(self, *args: Any) -> Any:
        """Run the layer, or send back through it."""
        name, *rest = args
        return getattr(self.model, name)(*rest)

    def run_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """See :meth:`LayeredGNN.run_layer`."""
        out: Tensor = torch.func.functional_call(self, self._others, ("run_layer", layer, x, adj_t, state))
        return out

    def send_back(self, layer: int, x: Tensor, given: Tensor) -> Tensor | None:
        """See :meth:`LayeredGNN.send_back`."""
        found: Tensor | None = torch.func.functional_call(self, self._others, ("send_back", layer, x, given))
        return found


def way_of(
    model: LayeredGNN,
    layer: int,
    like: Tensor,
    edges: Edges,
    inputs: State,
    blank: Blank,
    forms: Sequence[Form] = (Form.SUM, Form.SUM_AND_OWN, Form.EDGES),
) -> Way:
    """Return the first way that is right for a layer; that is observed, with drawn numbers in the place of all rows.

    Args:
        model: gives the layer.
        layer: its number.
        like: its input's rows of the mini-batch [B, channels].
        edges: from the mini-batch to nodes outside, at least one.
        inputs: the layer's keyword arguments, for the outward edges by target.
        blank: makes its state.
        forms: of a sum over edges, from the fastest on, the last of which is right for every sum.
    """
    generator = torch.Generator().manual_seed(layer)
    moved = Moved(model, generator)

    def drawn(tensor: Tensor) -> Tensor:
        return drawn_like(tensor, generator)

    own = drawn(like)
    with torch.no_grad():
        rows = torch.cat([own.new_zeros(edges.num_targets, own.size(1)), own])
        given = drawn(moved.run_layer(layer, rows, edges.adj_t, blank(edges.num_targets)))
    alone = transposed(moved, layer, Way(Form.EDGES), own, given, edges, blank)
    if not same(alone, _among_others(moved, layer, own, given, edges.by_target, blank, drawn)):
        return Way(Form.ANY)
    if any(isinstance(value, Tensor) and value.dim() for value in inputs.values()):
        forms = forms[-1:]  # the inputs are those of the outward edges
    ways = (Way(form, products) for form in forms for products in (False, True))
    found = next(way for way in ways if same(alone, transposed(moved, layer, way, own, given, edges, blank)))
    if found.form == Form.EDGES or torch.is_autocast_enabled(own.device.type):
        return found
    with torch.no_grad():
        said = moved.send_back(layer, own, multiplied(edges.all, given))
    return found if said is None else replace(found, written=same(alone, said))


def _among_others(
    model: Moved,
    layer: int,
    own: Tensor,
    given: Tensor,
    outward: Outward,
    blank: Blank,
    drawn: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Return what :func:`transposed` does, with drawn rows of the targets, each with one more edge, from itself."""
    targets, nodes = outward.num_targets, outward.n_id.numel()
    each = torch.arange(targets, device=outward.col.device)
    adj_t, with_more = one_more_edge(outward, each, nodes, drawn)
    state = blank(targets)
    tree = Tree({name: value for name, value in state.items() if name not in outward.edges})
    other: State = tree.build([drawn(tensor) for tensor in tree.tensors])
    other |= {name: with_more(state[name]) for name in outward.edges.keys() & state.keys()}
    with torch.enable_grad():
        own = own.detach().requires_grad_()
        x = torch.cat([drawn(own.new_zeros(targets, own.size(1))), own])
        out = model.run_layer(layer, x, adj_t, other)
        return torch.autograd.grad(out, own, given, allow_unused=True)[0] if out.requires_grad else None


def one_more_edge(
    outward: Outward, sources: Tensor, nodes: int, drawn: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the edges into nodes outside with one more for each, of a drawn weight, and what does so for attributes.

    Args:
        outward: the edges, by target.
        sources: of those that are added [T].
        nodes: how many there are.
        drawn: draws numbers.

    Returns:
        An adjacency [T, nodes], and a function of attributes of the edges [E', ...] to those of its edges.
    """
    targets, device = outward.num_targets, outward.col.device
    place = torch.cat([torch.arange(outward.col.numel(), device=device), outward.rowptr[1:] - 1])
    order = place.argsort(stable=True)  # the edge that is added comes behind a target's others

    def with_more(values: Tensor) -> Tensor:
        more = values.new_zeros(targets, *values.shape[1:])
        return torch.cat([values, drawn(more) + 0.5 if values.is_floating_point() else more])[order]

    rowptr = outward.rowptr + torch.arange(targets + 1, device=device)
    col = torch.cat([outward.col, sources])[order]
    return sparse_csr(rowptr, col, with_more(outward.value), (targets, nodes)), with_more


def drawn_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return normal numbers in the place of a tensor's, unless it holds integers."""
    values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(tensor) if tensor.is_floating_point() else tensor


def same(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether two gradients agree, to the root of their type's precision; ``None`` is none."""
    if first is None or second is None:
        return first is second
    scale = torch.maximum(first.abs().max(), second.abs().max())
    return bool((first - second).abs().max() <= scale * torch.finfo(first.dtype).eps ** 0.5)
