"""A graph by name, in the form that is partitioned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from recollect.autoscale.loader._order import to_adj_t
from recollect.data import load, names

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["GraphData", "get_data"]


class GraphData(NamedTuple):
    """A graph and the widths of a network for it.

    Attributes:
        data: with ``x`` [N, in_channels], ``y``, masks and ``adj_t``, a ``torch.sparse_csr`` tensor [N, N].
        in_channels: features of a node.
        out_channels: classes, or labels.

    Example:
        >>> from recollect.autoscale import get_data
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> data.adj_t.shape, in_channels, out_channels
        (torch.Size([34, 34]), 34, 4)
    """

    data: Data
    in_channels: int
    out_channels: int


def get_data(root: str | Path | None, name: str, **options: object) -> GraphData:
    """Load a graph by name, with ``adj_t`` in the place of ``edge_index``.

    Args:
        root: folder of the raw files; see :func:`recollect.data.load`.
        name: one of :func:`recollect.data.names`; also as PyGAS writes it, such as ``"CoauthorCS"`` or ``"arxiv"``.
        **options: of the dataset; see :func:`recollect.data.load`.

    Returns:
        The graph, with ``adj_t`` [N, N] in sparse CSR form, and its numbers of features and of classes (labels).

    Raises:
        UnknownDatasetError, MissingRawFilesError and others: as :func:`recollect.data.load`.

    Example:
        >>> from recollect.autoscale import get_data
        >>> graph = get_data(None, "sbm", num_nodes=100, num_classes=3)
        >>> graph.data.adj_t.layout, graph.out_channels
        (torch.sparse_csr, 3)
    """
    graph = load(_known(name), root, **options)  # type: ignore[arg-type]
    return GraphData(to_adj_t(graph.data), int(graph.data.x.size(1)), graph.num_classes)


def _known(name: str) -> str:
    """Return a graph's name here, from one without regard to case, hyphens and ``ogbn``; an unknown one as it is."""
    known = {_letters(name): name for name in names()}
    return known.get(_letters(name)) or known.get(f"ogbn{_letters(name)}", name)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()
