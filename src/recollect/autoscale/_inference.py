"""Layer by layer over the whole graph, one mini-batch after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autoscale._adjacency import adjacency_of, first_rows
from recollect.autoscale._batch import Batch
from recollect.autoscale._exchange import Exchange
from recollect.autoscale._network import LayeredGNN
from recollect.autoscale.histories._history import History
from recollect.autoscale.loader._loader import SubgraphLoader
from recollect.autoscale.loader._sub_data import SubData

__all__ = ["LayerWise", "evaluating"]

Take = Callable[[], Tensor] | None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run the body in evaluation mode and without gradients; every submodule's mode is given back."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child in training:
            child.training = True


class LayerWise:
    """One pass of layer-wise inference: each layer for all mini-batches, before the next layer begins.

    No layer then sees an old embedding. What layers keep in their state waits in host memory until the next one.

    Args:
        model: gives the layers.
        num_nodes: of the whole graph.
        loader: yields every node once in each of its passes, in the same mini-batches.
        histories: what each layer but the last writes, and the next one reads.
        exchange: reads and writes them.
    """

    def __init__(
        self,
        model: LayeredGNN,
        num_nodes: int,
        loader: Iterable[SubData],
        histories: Sequence[History],
        exchange: Exchange,
    ) -> None:
        self._model = model
        self._num_nodes = num_nodes
        self._exchange = exchange
        self._loader = loader
        self._histories = histories
        self._device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self._states: dict[tuple[tuple[int, ...], ...], dict[str, Any]] = {}
        self._dtype: torch.dtype | None = None

    def run(self, device: torch.device, finished: Callable[[int], None] = lambda layer: None) -> Tensor:
        """Run all layers.

        Args:
            device: of the result.
            finished: called with the number of each layer but the last, when its history is complete.

        Returns:
            The last layer's output [num_nodes, out_channels].

        Raises:
            ValueError: the loader is of another graph, leaves out nodes, or yields other mini-batches in a later pass.
        """
        if isinstance(self._loader, SubgraphLoader):  # of others it is known after a pass, from what they yielded
            _check_cover([torch.stack([self._loader.ptr[:-1], self._loader.ptr.diff()])], self._num_nodes)
        try:
            for layer, history in enumerate(self._histories):
                self._pass(layer, partial(self._exchange.write, history))
                finished(layer)
            result = _Result(self._num_nodes, device)
            self._pass(self._model.num_layers - 1, result.write)
        except BaseException:
            self._exchange.clear()
            raise
        return result.rows

    def _pass(self, layer: int, write: Callable[[Tensor, Batch], None]) -> None:
        """Evaluate one layer for all mini-batches."""
        parts: list[Tensor] = []
        for sub, batch, take in self._loaded(layer):
            write(self._evaluate(layer, sub, batch, take), batch)
            parts.append(torch.stack([batch.offset, batch.count]))
        _check_cover(parts, self._num_nodes)

    def _loaded(self, layer: int) -> Iterator[tuple[SubData, Batch, Take]]:
        """Yield mini-batches, and what gives their embeddings; with a pool these are read one mini-batch ahead."""
        waiting: deque[tuple[SubData, Batch, Take]] = deque()
        for sub in self._loader:
            batch = None
            if isinstance(sub, SubData):
                batch = Batch.of(sub.batch_size, sub.n_id, sub.offset, sub.count)
            if batch is None:
                raise TypeError(
                    f"the loader must yield mini-batches, each a SubData (found {type(sub).__name__}): use "
                    "EvalSubgraphLoader(data, ptr)"
                )
            take = self._exchange.read(self._histories[layer - 1], batch) if layer else None
            waiting.append((sub, batch, take))
            if len(waiting) > (self._exchange.pool is not None):
                yield waiting.popleft()
        yield from waiting

    def _evaluate(self, layer: int, sub: SubData, batch: Batch, take: Take) -> Tensor:
        data = sub.data.to(self._device)
        adj_t = adjacency_of(data)
        batch.check_inputs(data.x, adj_t)
        given = {name: data[name] for name in self._model.inputs}
        state = given | self._take_state(layer, batch)
        x = data.x if take is None else take().to(self._device, self._dtype)
        out = self._model.run_layer(layer, x, first_rows(adj_t, batch.size), state)
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
                f"the loader yielded a mini-batch of the parts at {batch.offset.tolist()} for layer {layer}, but none "
                "for the layer before: layer-wise inference needs the same mini-batches in every pass; use "
                "EvalSubgraphLoader(data, ptr)"
            ) from None


class _Result:
    """The last layer's output for all nodes, made when its width is known."""

    def __init__(self, num_nodes: int, device: torch.device) -> None:
        self._num_nodes = num_nodes
        self._device = device
        self.rows = torch.empty(0)

    def write(self, out: Tensor, batch: Batch) -> None:
        if not self.rows.numel():
            self.rows = out.new_empty(self._num_nodes, out.size(-1), device=self._device)
        self.rows.index_copy_(0, batch.n_id[: batch.size].to(self._device), out.to(self._device))


def _check_cover(parts: list[Tensor], num_nodes: int) -> None:
    """Raise a ValueError unless the parts (offset, count) are all nodes, each once."""
    offset, count = torch.cat(parts, dim=1) if parts else torch.zeros(2, 0, dtype=torch.int64, device="cpu")
    offset, count = offset[count > 0], count[count > 0]
    order = offset.argsort()
    end = count[order].cumsum(0)
    if int(count.sum()) != num_nodes or not torch.equal(offset[order], end - count[order]):
        raise ValueError(
            f"the loader's mini-batches have {int(count.sum())} nodes together, but layer-wise inference needs each of "
            f"the {num_nodes} nodes of the histories once; use EvalSubgraphLoader(data, ptr)"
        )


def _name(batch: Batch) -> tuple[tuple[int, ...], ...]:
    return tuple(batch.offset.tolist()), tuple(batch.count.tolist())


def _moved(value: Any, device: torch.device) -> Any:
    """Move the tensors in a layer's state, also those in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        moved = value.to(device)
        # The rows of a batch may be a view of those of its halo too, which need not stay.
        return moved.clone() if moved is value and value.untyped_storage().nbytes() > value.nbytes else moved
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value
