"""Pairs of nodes to be predicted, each handed to one mini-batch of an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recollect.autoscale.loader._checks import check_edge_index, check_nodes
from recollect.autoscale.loader._cut import Cut
from recollect.autoscale.loader._local import in_parts, local_numbers
from recollect.autoscale.loader._roles import roles_of
from recollect.autoscale.loader._storage import graph_copy
from recollect.autoscale.loader._sub_data import SubData

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["LinkCut", "Links"]

_INDEX, _LABEL = "edge_label_index", "edge_label"


class Links:
    """Pairs of nodes sorted into units: those within a part, and those between two parts.

    Args:
        index: [2, K] nodes by number.
        rows: By name what has a row for each pair, such as ``edge_label``, and the dimension along which they lie.
        ptr: [num_parts + 1] int64 on the CPU.

    Attributes:
        units: The parts of each unit that has pairs: one, or two in ascending order.
    """

    def __init__(self, index: Tensor, rows: Mapping[str, tuple[Tensor, int]], ptr: Tensor) -> None:
        index = index.as_subclass(Tensor).long()
        low, high = in_parts(index, ptr).cpu().aminmax(dim=0)
        num_parts = ptr.numel() - 1
        keys, self._order = (low * num_parts + high).sort(stable=True)
        distinct, counts = torch.unique_consecutive(keys, return_counts=True)
        self._bounds = [0, *counts.cumsum(0).tolist()]
        pairs = zip((distinct // num_parts).tolist(), (distinct % num_parts).tolist(), strict=True)
        self.units: list[tuple[int, ...]] = [(one,) if one == other else (one, other) for one, other in pairs]
        self._index, self._rows = index, dict(rows)

    def take(self, units: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The pairs of some units [2, k], in numbers of the whole graph, and what has rows for them."""
        chosen = torch.cat([self._order[self._bounds[unit] : self._bounds[unit + 1]] for unit in units])
        rows = {name: value.index_select(dim, chosen.to(value.device)) for name, (value, dim) in self._rows.items()}
        return self._index[:, chosen.to(self._index.device)], rows

    @classmethod
    def of(
        cls, data: Data, index: Any, labels: Any, ptr: Tensor, kinds: Mapping[str, str] | None
    ) -> tuple[Links, Data]:
        """Links of a loader's arguments and its graph, and the graph without those that it had itself.

        Raises:
            TypeError: ``index`` or ``labels`` are no tensors of their kind.
            ValueError: The shape is wrong, there are no pairs, or nothing says which labels go with them.
        """
        roles = roles_of(data, kinds)
        check_edge_index("links", index)
        check_nodes("links", index, roles.num_nodes)
        if not index.size(1):
            raise ValueError("links has no pairs: leave it out, or give nodes by number, [2, K]")
        own = {path[0]: role for path, role in roles.roles.items() if role.of == (_INDEX,) and len(path) == 1}
        rest = graph_copy(data)
        same = _INDEX in data and data[_INDEX].shape == index.shape and bool((data[_INDEX] == index).all())
        rows = {str(name): (data[name], role.dim or 0) for name, role in own.items()} if same else {}
        for name in (_INDEX, *own):
            if name in rest:
                del rest[name]
        if labels is not None:
            rows[_LABEL] = (_checked(labels, index), 0)
        elif _LABEL in data and _LABEL not in rows:
            label = data[_LABEL]
            alone = _LABEL not in own and roles.roles[_LABEL,].kind == "graph"
            if not alone or label.dim() == 0 or label.size(0) != index.size(1):
                raise ValueError(
                    f"data.edge_label has shape {tuple(label.shape)} and goes with other edges than the "
                    f"{index.size(1)} links: give theirs with link_labels=, or delete it"
                )
            rows[_LABEL] = (label, 0)
        if _LABEL in rest:
            del rest[_LABEL]
        return cls(index, rows, ptr), rest


class LinkCut:
    """Cuts a mini-batch of the parts of some units, with their pairs; a loader's workers get a copy of it."""

    def __init__(self, cut: Cut, links: Links) -> None:
        self._cut, self._links, self.graph = cut, links, cut.graph

    def __call__(self, units: Sequence[int]) -> SubData:
        """The mini-batch of these units, in this order; each may be there once."""
        if len(set(units)) < len(units):
            raise ValueError(f"a mini-batch may have each unit of links once, but its sampler chose {list(units)}")
        parts = dict.fromkeys(part for unit in units for part in self._links.units[unit])
        batch = self._cut(list(parts))
        pairs, rows = self._links.take(units)
        batch.data[_INDEX] = local_numbers(pairs, batch.offset, batch.count)
        for name, value in rows.items():
            batch.data[name] = value
        return batch


def _checked(labels: Any, index: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"link_labels is a {type(labels).__name__}, but must be a tensor: write torch.as_tensor(link_labels)"
        )
    if labels.dim() == 0 or labels.size(0) != index.size(1):
        raise ValueError(
            f"link_labels has shape {tuple(labels.shape)}, but must have a row for each of the {index.size(1)} links"
        )
    return labels
