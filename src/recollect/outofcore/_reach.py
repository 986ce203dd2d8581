"""How far a block looks: observed, on a few nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recollect.outofcore._parts import cut

__all__ = ["looks_further"]

_NODES = 2

Run = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


def looks_further(
    run: Run, name: str, rowptr: Tensor, col: Tensor, edges: Mapping[str, Tensor], width: int, dtype: torch.dtype
) -> bool:
    """Return whether a block needs the edges into a node's neighbours too, as one that goes by their degrees does.

    What it returns for a few nodes is compared: computed with the edges into these alone, with those into their
    neighbours, and with two steps more of the graph.

    Args:
        run: the block, of rows, an edge index in their numbers and what its edges have; in evaluation mode.
        name: the block's, for the message.
        rowptr: of the graph's CSR adjacency [N + 1].
        col: the source of each edge [E].
        edges: what each edge has.
        width: channels of its input.
        dtype: of its input.

    Raises:
        ValueError: it needs more: rows of nodes that are no neighbours.
    """
    degree = rowptr.diff()
    chosen = torch.where(degree > 0, degree, degree.max() + 1).topk(min(_NODES, degree.numel()), largest=False).indices
    place = torch.full_like(degree, -1)
    halo, near, near_edges = cut(rowptr, col, edges, chosen, False, place)
    around = torch.cat([chosen, halo])
    second, _, _ = cut(rowptr, col, edges, around, False, place)
    wide = torch.cat([around, second])
    third, all_of, all_edges = cut(rowptr, col, edges, wide, False, place)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(wide.numel() + third.numel(), width, generator=generator, dtype=torch.float64).to(dtype)

    def outputs(own: Tensor, edge_index: Tensor, found: dict[str, Tensor]) -> Tensor:
        return run(own, edge_index, found)[: chosen.numel()].double()

    true = outputs(rows, all_of, all_edges)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3

    def is_true(found: Tensor) -> bool:
        return bool((found - true).norm() <= tolerance * (true.norm() + 1e-30))

    if is_true(outputs(rows[: around.numel()], near, near_edges)):
        return False
    _, further, further_edges = cut(rowptr, col, edges, chosen, True, place)
    with_one_more = torch.cat([rows[: around.numel()], rows.new_zeros(1, width)])
    if is_true(outputs(with_one_more, further, further_edges)):
        return True
    raise ValueError(
        f"{name}: what it returns for a node depends on more than the node and its neighbours, so that it cannot be "
        "computed part by part: it has several convolutions one after the other, or normalises over nodes. Make each "
        "convolution a layer of its own, and use norms over channels (LayerNorm)"
    )
