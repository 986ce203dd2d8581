"""Whether a layer is a sum over edges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recollect._util._tree import Tree
from recollect.autoscale._network import LayeredGNN, State
from recollect.autoscale.loader._outward import Outward
from recollect.messages import sparse_csr

__all__ = ["check_separable"]


def check_separable(
    model: LayeredGNN, layer: int, like: Tensor, outward: Outward, blank: Callable[[int], State]
) -> None:
    """Raise unless what sources outside send to a target does not change what those inside do to it.

    That is so for z_i = Σ_j a_ij g(z_j) + s(z_i). It is observed: the gradient by the batch's rows is compared, once
    with the batch's edges alone, and once with another edge into each target, and with other rows of the targets.

    Args:
        model: gives the layer.
        layer: its number.
        like: its input's rows of the mini-batch [B, channels].
        outward: the edges from the mini-batch to nodes outside.
        blank: makes the layer's state for so many targets.

    Raises:
        NotImplementedError: it is none.
    """
    generator = torch.Generator().manual_seed(layer)

    def drawn(tensor: Tensor) -> Tensor:
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
        return values.to(tensor) if tensor.is_floating_point() else tensor

    targets, sources = outward.num_targets, outward.n_id.numel()
    own = drawn(like)
    alone = torch.cat([own.new_zeros(targets, own.size(1)), own])
    beside = torch.cat([drawn(alone[:targets]), own])
    size = (targets, sources)
    # An edge of each target from its own row comes behind its others.
    ends, each = outward.rowptr[1:], torch.arange(targets, device=outward.col.device)
    order = torch.cat([torch.arange(outward.col.numel(), device=ends.device), ends - 1]).argsort(stable=True)
    weights = 0.5 + drawn(outward.value.new_ones(targets)).abs().to(outward.value)
    more = sparse_csr(
        outward.rowptr + torch.cat([each, each.new_full((1,), targets)]),
        torch.cat([outward.col, each])[order],
        torch.cat([outward.value, weights])[order],
        size,
    )
    state = blank(targets)
    tree = Tree({name: value for name, value in state.items() if name not in outward.edges})
    other = tree.build([drawn(tensor) for tensor in tree.tensors])
    for name in outward.edges.keys() & state.keys():
        edge = state[name]
        other[name] = torch.cat([edge, drawn(edge[:1].expand(targets, *edge.shape[1:]))])[order]
    given: list[Tensor] = []

    def gradient(rows: Tensor, adj_t: Tensor, state: State) -> Tensor | None:
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            out = model.run_layer(layer, rows, adj_t, state)
            given.append(given[0] if given else drawn(out))
            found = torch.autograd.grad(out, rows, given[0], allow_unused=True)[0] if out.requires_grad else None
        return None if found is None else found[targets:]

    first = gradient(alone, outward.adj_t(), state)
    second = gradient(beside, more, other)
    if first is None or second is None:
        if first is second:
            return
        close = False
    else:
        scale = max(float(first.abs().max()), float(second.abs().max()))
        close = float((first - second).abs().max()) <= scale * torch.finfo(first.dtype).eps ** 0.5
    if not close:
        raise NotImplementedError(
            f"layer {layer} of {type(model).__name__} is no sum over edges, z_i = sum of a_ij g(z_j) over sources j, "
            "plus what depends on i: what a source does to a target depends on the target's other sources. Apply the "
            "activation (and norm) at the beginning of the next layer in the place of the end of this one, and divide "
            "by degrees with weights of edges; or give the loader outward=\"complete\", which brings all edges of the "
            "nodes outside"
        )
