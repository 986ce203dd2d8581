"""What moves the elements of a batch by numbers in tensors, which may be others in the next graph of the same form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.autogram._layout import Layout
from recollect.autogram._walk import Graph

__all__ = ["Found", "MovedError", "axis_of", "comparing", "cut", "layout_of", "moves", "moving", "numbers"]

Found = Mapping[int, Sequence[Layout | None]]
"""Where the outputs of nodes have the batch."""

_MASKED = ("MaskedSelectBackward0", "MaskedScatterBackward0")
# Nodes that take parts of an axis, or pad it, and what they keep of where these parts begin and end.
_CUTS = {
    "SliceBackward0": ("_saved_start", "_saved_end", "_saved_step"),
    "SelectBackward0": ("_saved_index",),
    "SplitBackward0": ("_saved_split_size",),
    "SplitWithSizesBackward0": ("_saved_split_sizes",),
    "AsStridedBackward0": ("_saved_size", "_saved_stride", "_saved_storage_offset"),
    "UnfoldBackward0": ("_saved_dimension", "_saved_size", "_saved_step"),
    "Rot90Backward0": ("_saved_k",),
    "ConstantPadNdBackward0": ("_saved_pad",),
    **{f"{kind}Pad{n}DBackward0": ("_saved_padding",) for kind in ("Reflection", "Replication") for n in (1, 2, 3)},
}


class MovedError(Exception):
    """The batch is not where it was in another graph of the same form: it is to be looked for anew."""


def moves(node: Any) -> tuple[Tensor | None, ...]:
    """Return the tensors of indices by which a node picks or places entries; of several axes, one for each."""
    names = ("_saved_mask",) if type(node).__name__ in _MASKED else ("_saved_index", "_saved_indices")
    for name in names:
        saved = getattr(node, name, None)
        if isinstance(saved, Tensor):
            return (saved,)
        if isinstance(saved, tuple):
            return saved
    return ()


def comparing(node: Any, expected: Mapping[int, Tensor]) -> Callable[[Any], None]:
    """Return a hook for a node that raises :class:`MovedError` if it picks or places entries by other indices."""

    def compare(_: Any) -> None:
        found = moves(node)
        if any((now := found[axis]) is None or not torch.equal(now, index) for axis, index in expected.items()):
            raise MovedError

    return compare


def moving(
    graph: Graph, node: int, indices: Sequence[Tensor | None], found: Found, scattered: Collection[int]
) -> dict[int, Tensor]:
    """Return those of a node's indices that say where elements of the batch go, by their positions.

    Args:
        graph: the node's.
        node: its number.
        indices: what :func:`moves` returned.
        found: where the batch is.
        scattered: the nodes where it is somewhere, in no regular order.
    """
    axes: Collection[int] = range(len(indices))
    if node not in scattered and not any(child in scattered for child in graph.edges[node]):
        axes = _moved_axes(graph, node, len(indices), found)
    return {axis: index for axis, index in enumerate(indices) if index is not None and axis in axes}


def _moved_axes(graph: Graph, node: int, count: int, found: Found) -> set[int]:
    name, at = graph.names[node], graph.nodes[node]
    if name == "IndexPutBackward0":  # its values are laid out as its indices are
        own = found[node][0]
        return set() if own is None else {own.dim}
    axes: set[int] = set()
    for child, index in zip(graph.edges[node], graph.indices[node], strict=True):
        layout = layout_of(found, child, index)
        if layout is None:
            continue
        if name == "IndexBackward0":
            axes.add(layout.dim)
            continue
        dim = 0 if name == "EmbeddingBackward0" else getattr(at, "_saved_dim", None)
        if not isinstance(dim, int) or layout.dim == axis_of(dim, len(graph.shape(child, index))):
            axes.update(range(count))
    return axes


def numbers(node: Any) -> tuple[Any, ...]:
    """Return where the parts begin and end that a node takes of an axis, or pads; nothing if it does neither."""
    return tuple(getattr(node, name) for name in _CUTS.get(type(node).__name__, ()))


def cut(graph: Graph, node: int, found: Found, scattered: Collection[int]) -> tuple[Any, ...]:
    """Return those numbers if the axis is the one that has the batch.

    Args:
        graph: the node's.
        node: its number.
        found: where the batch is.
        scattered: the nodes where it is somewhere, in no regular order.
    """
    at = graph.nodes[node]
    if not (kept := numbers(at)):
        return ()
    child, index = graph.edges[node][0], graph.indices[node][0]
    layout, dim = layout_of(found, child, index), getattr(at, "_saved_dim", None)
    if layout is None:
        return kept if child in scattered else ()
    elsewhere = isinstance(dim, int) and layout.dim != axis_of(dim, len(graph.shape(child, index)))
    return () if elsewhere else kept


def layout_of(found: Found, child: int, index: int) -> Layout | None:
    """Where a node's output has the batch; None where it has none."""
    layouts = found.get(child, ())
    return layouts[index] if index < len(layouts) else None


def axis_of(dim: int, dims: int) -> int:
    """Undo what autograd does to negative numbers: it keeps them modulo 2^64."""
    return (dim - 2**64 if dim >= 2**63 else dim) % max(dims, 1)
