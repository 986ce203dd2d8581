"""What a mini-batch reads of nodes outside of it, for the gradients that go through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from recollect.autoscale._separable import Edges
from recollect.autoscale.histories._gradients import GradientHistories
from recollect.autoscale.histories._history import History
from recollect.autoscale.histories._ranks import RankTable
from recollect.autoscale.loader._outward import Outward
from recollect.frames import in_backward
from recollect.messages import multiplied

__all__ = ["Outside", "matches"]

Given = tuple[Tensor, Tensor] | None


class Outside:
    """Rows of a mini-batch's out-neighbours, and of what else their layers read.

    Over ranks all of them are on their way from the beginning of the mini-batch on: ranks exchange in the same order
    whatever their backward passes do, and rows are as they were before the step. Else they are read when they are asked
    for.

    Args:
        gradients: histories of V_l.
        histories: of z_l.
        outward: the mini-batch's edges to nodes outside.
        size: of the mini-batch, B.
        trains: whether there will be a backward pass.
        reads: whether embeddings will be read.
    """

    def __init__(
        self,
        gradients: GradientHistories,
        histories: Iterable[History],
        outward: Outward,
        size: int,
        trains: bool,
        reads: bool,
    ) -> None:
        n_id, targets = outward.n_id, outward.num_targets
        # What a rebuild makes is never gone backward through, and exchanges nothing.
        self._gradients = gradients
        self._given = gradients.begin(n_id[:targets]) if trains and not in_backward() else {}
        others = torch.cat([n_id[:targets], n_id[targets + size :]]) if reads else None
        self._rows = [] if others is None else [_rows(history, others) for history in histories]

    def gradients(self, layer: int) -> Given:
        """Return V_l of the out-neighbours [T, channels] and by what factor they count, once; or nothing is known."""
        given = self._given.pop(layer, None)
        return None if given is None else given()

    def sums(self, layer: int, edges: Edges, near: bool, dtype: torch.dtype | None = None) -> Given:
        """Return the sums Σ a_ij V_l,i over the out-neighbours i of the batch's rows j, and by what factor they count.

        Args:
            layer: l.
            edges: to the out-neighbours, not by target.
            near: of the rows that have such edges alone [R, channels], or of all [B, channels].
            dtype: of V_l; ``None``: as it is pulled.

        Returns:
            Both, once; or nothing is known.
        """
        table = self._gradients.in_memory(layer, dtype) if layer in self._given else None
        if table is None:
            known = self.gradients(layer)
            if known is None:
                return None
            rows, trust = known
            return multiplied(edges.adj if near else edges.all, rows if dtype is None else rows.to(dtype)), trust
        del self._given[layer]  # the table's rows are read where they lie
        return multiplied(edges.to_nodes(table.size(0), near), table), self._gradients.trust(layer)

    def embeddings(self, layer: int) -> Tensor:
        """Return z_l of the out-neighbours, and of the other nodes that they have edges from [T + S, channels]."""
        return self._rows[layer]()


def _rows(history: History, n_id: Tensor) -> Callable[[], Tensor]:
    if not isinstance(history.table, RankTable):
        return lambda: history.pull(n_id)
    take, came = history.begin_pull(n_id.cpu(), "rows of nodes outside"), list[Tensor]()

    def rows() -> Tensor:
        if not came:
            came.append(take())
        return came[0]

    return rows


def matches(nodes: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of nodes that are among others too, and where they are there."""
    if not (nodes.numel() and among.numel()):
        empty = nodes.new_zeros(0, dtype=torch.int64)
        return empty, empty
    values, order = among.sort()
    place = torch.searchsorted(values, nodes.to(values)).clamp_(max=values.numel() - 1)
    found = (values[place] == nodes).nonzero().squeeze(1)
    return found, order[place[found]]
