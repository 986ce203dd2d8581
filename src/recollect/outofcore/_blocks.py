"""Which blocks of a reversible network can be computed part by part, as observed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from recollect._devices import forms_of
from recollect._modules import in_evaluation
from recollect.messages.reach import Probe, Reach, kind_of, module_of
from recollect.models import RevGNN
from recollect.outofcore._network import Graph
from recollect.outofcore._writes import Writes

__all__ = ["Blocks", "dtype_of", "place_of"]

_EXTREME = ("max", "min")


@dataclass(frozen=True)
class _Observed:
    name: str
    kind: tuple[Any, ...]
    reach: Reach


def dtype_of(model: RevGNN) -> torch.dtype:
    """Return the type of a network's stream; to look at a weight itself may compute it, and write a buffer."""
    return next(model.project.parameters()).dtype


def place_of(layer: int, group: int) -> str:
    """Return the name of a block."""
    return f"layer {layer}, block {group}"


class Blocks:
    """What the blocks of a network need, in the modes in which they are.

    Args:
        model: the network.
        graph: on whose edges blocks are observed.

    Attributes:
        further: whether parts need the edges into their neighbours too, as blocks that go by degrees do.

    Raises:
        ValueError: a block looks further than to neighbours.
    """

    def __init__(self, model: RevGNN, graph: Graph) -> None:
        self._model = model
        self._in_order = graph.in_order
        width, nodes = model.project.out_features // model.num_groups, graph.data.num_nodes
        self._probe = Probe(graph.edges, width, dtype_of(model), nodes)
        self._kinds: dict[tuple[Any, ...], bool] = {}  # whether convolutions can be computed for a part's nodes alone
        self._writing: set[tuple[Any, ...]] = set()  # kinds that write buffers
        self._kind_at: dict[tuple[int, int], tuple[Any, ...]] = {}
        with in_evaluation(model):
            observed = self._observe(every=True)
        self._refuse([each for each in observed if not (each.reach.near or each.reach.further)])
        # What is refused in training mode alone, such as batch normalisation, is refused in a step.
        training = self._observe(every=True)
        observed += [e for e in training if (e.reach.near or e.reach.further) and e.reach.varied is None]
        self.further = not all(each.reach.near for each in observed)
        self._accept(observed)

    def check(self) -> None:
        """Look at blocks of kinds, or in modes, that are new.

        Raises:
            ValueError: a block looks further than parts go.
        """
        self._accept(self._observe())

    def computed_alone(self, layer: int, group: int, device: torch.device) -> bool:
        """Return whether the convolutions of a block can be computed for the nodes of a part alone.

        That was seen on the CPU: it does not hold where a device calls convolutions that the CPU computes by products.
        """
        if not self._kinds.get(self._kind_at[layer, group], False):
            return False
        forms, block = forms_of(device), self._model.layer(layer)._blocks()[group]
        extreme = not forms.reductions and any(getattr(m, "aggr", "") in _EXTREME for m in module_of(block).modules())
        return forms.convolutions and not extreme

    def watch(self, writes: Writes) -> None:
        """Run each block that writes buffers once, in the network's order."""
        for index in range(self._model.num_layers):
            for group, block in enumerate(self._model.layer(index)._blocks()):
                if self._kind_at.get((index, group)) in self._writing:
                    buffers = list(module_of(block).buffers())
                    writes.watch(place_of(index, group), buffers, partial(self._probe.run, block))

    def _observe(self, every: bool = False) -> list[_Observed]:
        """Return what blocks need: one of each new kind, or all."""
        found, known = [], set(self._kinds)
        first: dict[int, int] = {}  # the place of each layer, which may come at others too
        for index in range(self._model.num_layers):
            layer = self._model.layer(index)
            known_at = first.setdefault(id(layer), index)
            for group, block in enumerate(layer._blocks()):
                if known_at != index:
                    self._kind_at[index, group] = self._kind_at[known_at, group]
                    continue
                kind = self._kind_at[index, group] = kind_of(block)
                if kind not in known or every:
                    name = f"{place_of(index, group)} ({type(getattr(block, 'module', block)).__name__})"
                    found.append(_Observed(name, kind, self._reach(block, name, brief=kind in known)))
                    known.add(kind)
        return found

    def _reach(self, block: Any, name: str, brief: bool) -> Reach:
        try:
            return self._probe.reach(block, name, brief)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{name}: it did not run on a small graph ({type(error).__name__}: {error}). Parts have other numbers "
                "of nodes than the graph: a table with a row for each node, say, cannot be read by row number"
            ) from error

    def _accept(self, observed: list[_Observed]) -> None:
        """Note kinds of blocks as such that can be computed part by part, or refuse them."""
        further = self.further
        self._refuse([each for each in observed if not (each.reach.further if further else each.reach.near)])
        for each in observed:
            if each.reach.ordered and not self._in_order:
                raise ValueError(
                    f"{each.name}: what it returns depends on the order of the edges into a node, and in "
                    "data.edge_index their sources do not ascend, as they do in parts: sort them first, for example "
                    "by torch_geometric.utils.sort_edge_index(edge_index, sort_by_row=False)"
                )
            if each.reach.varied is not None:
                raise ValueError(
                    f"{each.name} writes to its buffer {each.reach.varied} what depends on the rows that it gets, and "
                    "parts have other rows than the graph: keep such statistics outside of layers, or evaluate the "
                    "network (model.eval())"
                )
        self._writing |= {each.kind for each in observed if each.reach.writes}
        for each in observed:
            self._kinds[each.kind] = each.reach.alone(further) and self._kinds.get(each.kind, True)

    def _refuse(self, observed: list[_Observed]) -> None:
        for each in observed:
            raise ValueError(
                f"{each.name}: what it returns for a node depends on more than the node and its neighbours, so that it "
                "cannot be computed part by part: it has several convolutions one after the other, goes against the "
                "edges, normalises over nodes, or goes by their number. Make each convolution a layer of its own, and "
                "use norms over channels (LayerNorm). If it was put into the network later, make another WholeGraph"
            )
