"""The adjacencies that were made of an ``edge_index``, kept while it lives and stays the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recollect._csr import make_adj_t

__all__ = ["Edges", "edges_of"]

_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Edges:
    """One state of an ``edge_index``, which is not held, and the adjacencies made of it.

    Attributes:
        num_nodes: N.
        state: what is another one when the ``edge_index`` is, as far as torch knows.
        inside: whether all its nodes are among the N.
    """

    def __init__(self, edge_index: Tensor, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self.state = _state_of(edge_index)
        self.inside = int(edge_index.min()) >= 0 and int(edge_index.max()) < num_nodes
        self._adjacencies: dict[Hashable, Tensor] = {}

    def adj_t(self, kind: Hashable, make: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """Return the adjacency of one kind, sparse CSR [N, N].

        Args:
            kind: what tells it from others of the same edges.
            make: returns its edges [2, E'] and their weights [E'].
        """
        if kind not in self._adjacencies:
            with torch.inference_mode(False), torch.no_grad():  # backward will need it, whoever asks first
                (source, target), weight = make()
                self._adjacencies[kind], _ = make_adj_t(source, target, weight, self.num_nodes)
        return self._adjacencies[kind]


def edges_of(edge_index: Tensor, num_nodes: int) -> Edges:
    """Return what is known of the edges [2, E], int64, E at least 1.

    The first call for an ``edge_index`` reads it, which waits for its device; the later ones do not. Another number of
    nodes and a change in place make another graph of it; a change that torch does not count (through ``.data`` or
    NumPy) is not seen.
    """
    known: Edges | None = _KNOWN.get(edge_index, None)  # type: ignore[no-untyped-call]
    if known is None or (known.num_nodes, known.state) != (num_nodes, _state_of(edge_index)):
        known = Edges(edge_index, num_nodes)
        _KNOWN[edge_index] = known
    return known


def _state_of(edge_index: Tensor) -> tuple[int, int, torch.Size]:
    return edge_index._version, edge_index.data_ptr(), edge_index.shape  # the last two: ``edge_index.data`` was set
