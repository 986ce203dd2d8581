"""Layer by layer over the whole graph, one mini-batch after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recollect._devices import forms_of
from recollect._modules import check_unhooked, in_evaluation
from recollect._transfer import sent
from recollect.autoscale._adjacency import adjacency_of, first_rows
from recollect.autoscale._batch import Batch
from recollect.autoscale._exchange import Exchange
from recollect.autoscale._making import forget
from recollect.autoscale._network import LayeredGNN
from recollect.autoscale._stamp import BatchSize, GraphStamp
from recollect.autoscale.histories._selection import Slices, numbers_of
from recollect.autoscale.loader._loader import SubgraphLoader
from recollect.autoscale.loader._sub_data import SubData
from recollect.distributed import Shares

__all__ = ["LayerWise", "States", "Tables", "check_layerwise", "evaluating"]

Take = Callable[[], Tensor] | None
States = Mapping[Slices, dict[str, Any]]
"""What the layers so far left in the state of each mini-batch, by the rows of its nodes."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run the body in evaluation mode and without gradients; every submodule's mode is given back."""
    with in_evaluation(module), torch.no_grad():
        yield


def check_layerwise(model: nn.Module, method: str, inside: Iterable[tuple[str, nn.Module]] = ()) -> None:
    """Check that a network is what its layers are, one after the other.

    Args:
        model: the network.
        method: of it that says what a layer is.
        inside: modules, with their names, that are not called either.

    Raises:
        TypeError: a class derived from the one with that method has another ``forward``, which does not itself say
            ``layers_written_out = True``: that it runs the same layers in the same order, and nothing around them.
        ValueError: there are hooks.
    """
    forward = forward_of_its_own(model, method)
    if forward is not None:
        raise TypeError(
            f"{forward.__name__} has a forward of its own, which is not called when a loader is evaluated layer by "
            f"layer: let {method} do what it does, or call the network on the whole graph. If it runs the same layers "
            "one after the other and does nothing else, say so: layers_written_out = True in the class"
        )
    check_unhooked([("the network", model), *inside])


def forward_of_its_own(model: nn.Module, method: str) -> type | None:
    """Return the class derived from the one with a method that has another ``forward``; see :func:`check_layerwise`."""
    kinds = type(model).__mro__
    forward, layers = (next(kind for kind in kinds if name in vars(kind)) for name in ("forward", method))
    if forward is layers or not issubclass(forward, layers) or vars(forward).get("layers_written_out", False):
        return None
    return forward


@dataclass(frozen=True)
class Tables:
    """What one pass of layer-wise inference writes and reads.

    Attributes:
        num_nodes: of the whole graph.
        histories: what each layer but the last writes, and the next one reads.
        exchange: reads and writes them.
        passing: whether a history is dropped as soon as no layer reads it any more.
    """

    num_nodes: int
    histories: list[Any]
    exchange: Exchange
    passing: bool = False

    @property
    def nodes(self) -> tuple[int, int]:
        """The first node that is evaluated here, and the end of them: all, or over ranks those of this one."""
        return (0, self.num_nodes) if self.shares is None else self.shares.nodes

    @property
    def shares(self) -> Shares | None:
        """Of the ranks over which the histories lie."""
        return self.histories[-1].shares if self.histories and self.histories[-1] is not None else None


TablesFor = Callable[[GraphStamp | None], Tables]


class LayerWise:
    """One pass of layer-wise inference: each layer for all mini-batches, before the next layer begins.

    No layer then sees an old embedding. What layers keep in their state waits in host memory until the next one.

    Args:
        model: gives the layers.
        loader: yields every node once in each of its passes, in the same mini-batches.
        tables_for: from the graph that the mini-batches are of, as far as they say so, to the tables for it.
    """

    def __init__(self, model: LayeredGNN, loader: Iterable[SubData], tables_for: TablesFor) -> None:
        self._model = model
        self._loader = loader
        self._tables_for = tables_for
        self._tables: Tables | None = None
        self._graph: GraphStamp | None = None
        self._device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self._states: dict[Slices, dict[str, Any]] = {}
        self._dtype: torch.dtype | None = None

    def run(self, device: torch.device, finished: Callable[[int, States], None] = lambda layer, states: None) -> Tensor:
        """Run all layers.

        Args:
            device: of the result.
            finished: called with the number of each layer but the last, when its history is complete, and the states.

        Returns:
            The last layer's output [num_nodes, out_channels].

        Raises:
            ValueError: the loader leaves out nodes, or yields other mini-batches in a later pass, or other graphs'.
        """
        if isinstance(self._loader, SubgraphLoader):  # of others it is known after a pass, from what they yielded
            parts = [torch.stack([self._loader.ptr[:-1], self._loader.ptr.diff()])]
            _check_cover(parts, (0, self._tables_of(self._loader.graph).num_nodes))
        result = _Result(device)
        last = self._model.num_layers - 1
        try:
            for layer in range(last + 1):
                self._pass(layer, result)
                tables = self._tables_of(self._graph)
                if layer < last:
                    finished(layer, self._states)
                    if tables.passing:
                        forget(tables.histories, layer)
        except BaseException:
            if self._tables is not None:
                self._tables.exchange.clear()
            raise
        return result.rows

    def _tables_of(self, graph: GraphStamp | None) -> Tables:
        """Return the tables; which ones, the first mini-batch decides."""
        if self._tables is None:
            self._graph, self._tables = graph, self._tables_for(graph)
        if graph is not None and self._graph is not None and not graph.is_of(self._graph):
            raise ValueError(
                "the loader yields mini-batches of more than one graph, but layer-wise inference evaluates one; use "
                "EvalSubgraphLoader(data, ptr) for each"
            )
        return self._tables

    def _pass(self, layer: int, result: _Result) -> None:
        """Evaluate one layer for all mini-batches."""
        parts: list[Tensor] = []
        for sub, batch, take in self._loaded(layer):
            out = self._evaluate(layer, sub, batch, take)
            tables = self._tables_of(self._graph)
            if layer < len(tables.histories):
                tables.exchange.write(tables.histories[layer], out, batch)
            else:
                result.write(out, batch, tables.nodes)
            parts.append(_parts(batch))
        tables = self._tables_of(self._graph)
        check = partial(_check_cover, parts, tables.nodes)
        if layer == 0 and tables.shares is not None:  # where no other rank waits for rows of this one
            tables.shares.together("nodes of an evaluation's mini-batches", check)
        else:
            check()

    def _loaded(self, layer: int) -> Iterator[tuple[SubData, Batch, Take]]:
        """Yield mini-batches, and what gives their embeddings; with a pool these are read one mini-batch ahead."""
        waiting: deque[tuple[SubData, Batch, Take]] = deque()
        for sub in self._loader:
            if not isinstance(sub, SubData):
                raise _no_mini_batch(sub)
            tables = self._tables_of(sub.batch_size.graph if isinstance(sub.batch_size, BatchSize) else None)
            batch = Batch.of((sub.batch_size, sub.n_id, sub.offset, sub.count), tables.num_nodes)
            if batch is None:
                raise _no_mini_batch(sub)
            take = tables.exchange.read(tables.histories[layer - 1], batch) if layer else None
            waiting.append((sub, batch, take))
            if len(waiting) > (tables.exchange.pool is not None):
                yield waiting.popleft()
        yield from waiting

    def _evaluate(self, layer: int, sub: SubData, batch: Batch, take: Take) -> Tensor:
        data = sub.data.to(self._device, non_blocking=forms_of(self._device).sends_at_once)
        adj_t = adjacency_of(data)
        batch.check_inputs(data.x, adj_t)
        given = {name: data[name] for name in self._model.inputs}
        state = given | self._take_state(layer, batch)
        x = data.x if take is None else sent(take(), self._device).to(self._dtype)
        own = first_rows(adj_t, batch.size)
        if layer == 0:
            self._model.look_at_layers(x, own, given)
        out = self._model.run_layer(layer, x, own, state)
        self._dtype = out.dtype
        if layer < self._model.num_layers - 1:
            kept = {name: value for name, value in state.items() if name not in given}
            self._states[_name(batch)] = _moved(kept, torch.device("cpu"))
            return out
        return self._model.readout(out, state)

    def _take_state(self, layer: int, batch: Batch) -> dict[str, Any]:
        if layer == 0:
            return {}
        try:
            state: dict[str, Any] = _moved(self._states.pop(_name(batch)), self._device)
            return state
        except KeyError:
            raise ValueError(
                f"the loader yielded a mini-batch of the parts at {_parts(batch)[0].tolist()} for layer {layer}, but "
                "none for the layer before: layer-wise inference needs the same mini-batches in every pass; use "
                "EvalSubgraphLoader(data, ptr)"
            ) from None


class _Result:
    """The last layer's output for all nodes, made when its width is known."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rows = torch.empty(0)

    def write(self, out: Tensor, batch: Batch, nodes: tuple[int, int]) -> None:
        start, stop = nodes
        if not self.rows.numel():
            self.rows = out.new_empty(stop - start, out.size(-1), device=self._device)
        self.rows.index_copy_(0, sent(numbers_of(batch.rows), self._device) - start, out.to(self._device))


def _no_mini_batch(found: object) -> TypeError:
    return TypeError(
        f"the loader must yield mini-batches, each a SubData (found {type(found).__name__}): use "
        "EvalSubgraphLoader(data, ptr)"
    )


def _check_cover(parts: list[Tensor], nodes: tuple[int, int]) -> None:
    """Raise a ValueError unless the parts (offset, count) are all of these nodes, each once."""
    start, stop = nodes
    offset, count = torch.cat(parts, dim=1) if parts else torch.zeros(2, 0, dtype=torch.int64, device="cpu")
    offset, count = offset[count > 0], count[count > 0]
    order = offset.argsort()
    end = count[order].cumsum(0)
    if int(count.sum()) != stop - start or not torch.equal(offset[order] - start, end - count[order]):
        raise ValueError(
            f"the loader's mini-batches have {int(count.sum())} nodes together, but layer-wise inference needs each of "
            f"the {stop - start} nodes of the histories once; use EvalSubgraphLoader(data, ptr)"
        )


def _parts(batch: Batch) -> Tensor:
    """The ranges of a batch's rows: where each begins, and how many they are [2, parts]."""
    if isinstance(batch.rows, Tensor):
        return torch.stack([batch.rows, torch.ones_like(batch.rows)])
    ranges = torch.tensor(batch.rows, dtype=torch.int64, device="cpu").view(-1, 2)
    return torch.stack([ranges[:, 0], ranges[:, 1] - ranges[:, 0]])


def _name(batch: Batch) -> Slices:
    return batch.rows if isinstance(batch.rows, tuple) else tuple((row, row + 1) for row in batch.rows.tolist())


def _moved(value: Any, device: torch.device) -> Any:
    """Move the tensors in a layer's state, also those in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        moved = sent(value, device)
        # The rows of a batch may be a view of those of its halo too, which need not stay.
        return moved.clone() if moved is value and value.untyped_storage().nbytes() > value.nbytes else moved
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value
