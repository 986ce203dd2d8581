"""Layer by layer over the whole graph, one mini-batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recollect.autoscale._batch import Batch
from recollect.autoscale._history import History
from recollect.autoscale._operators import as_csr, first_rows
from recollect.autoscale._sub_data import SubData

if TYPE_CHECKING:
    from recollect.autoscale._scalable import ScalableGNN

__all__ = ["LayerWise", "evaluating"]


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
        loader: yields every node once in each of its passes, in the same mini-batches.
        histories: what each layer but the last writes, and the next one reads.
    """

    def __init__(self, model: ScalableGNN, loader: Iterable[SubData], histories: Sequence[History]) -> None:
        self._model = model
        self._loader = loader
        self._histories = histories
        self._device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self._states: dict[tuple[int, ...], dict[str, Any]] = {}
        self._dtype: torch.dtype | None = None

    def run(self, device: torch.device, finished: Callable[[int], None] = lambda layer: None) -> Tensor:
        """Run all layers.

        Args:
            device: of the result.
            finished: called with the number of each layer but the last, when its history is complete.

        Returns:
            The last layer's output [num_nodes, out_channels].

        Raises:
            ValueError: the loader leaves out nodes, or yields other mini-batches in a later pass.
        """
        for layer, history in enumerate(self._histories):
            self._pass(layer, lambda batch, out, to=history: to.push(out, batch.n_id, batch.offset, batch.count))  # type: ignore[misc]
            finished(layer)
        rows: list[Tensor] = []  # of the last layer: one tensor for all nodes, made when its width is known

        def write(batch: Batch, out: Tensor) -> None:
            if not rows:
                rows.append(torch.empty(self._model.num_nodes, out.size(-1), dtype=out.dtype, device=device))
            rows[0].index_copy_(0, batch.n_id[: batch.size].to(device), out.to(device))

        self._pass(self._model.num_layers - 1, write)
        return rows[0]

    def _pass(self, layer: int, use: Callable[[Batch, Tensor], None]) -> None:
        """Evaluate one layer for all mini-batches."""
        seen = 0
        for sub in self._loader:
            batch = Batch.of(sub.batch_size, sub.n_id, sub.offset, sub.count)
            if batch is None:
                raise TypeError("the loader yields no mini-batches of a SubgraphLoader")
            use(batch, self._evaluate(layer, sub, batch))
            seen += batch.size
        if seen != self._model.num_nodes:
            raise ValueError(
                f"the loader yielded {seen} nodes in a pass, but the model has {self._model.num_nodes}: layer-wise "
                "inference needs every node once; use EvalSubgraphLoader(data, ptr)"
            )

    def _evaluate(self, layer: int, sub: SubData, batch: Batch) -> Tensor:
        data = sub.data.to(self._device)
        adj_t = as_csr(data.adj_t) if "adj_t" in data else as_csr(data.edge_index, data.edge_weight)
        batch.check_inputs(data.x, adj_t)
        x = data.x if layer == 0 else self._histories[layer - 1].pull(batch.n_id).to(self._device, self._dtype)
        given = {name: data[name] for name in self._model.inputs if data.get(name) is not None}
        state = given | self._take_state(layer, batch)
        out = self._model.evaluate(layer, x, first_rows(adj_t, batch.size), state)
        self._dtype = out.dtype
        if layer < self._model.num_layers - 1:
            kept = {name: value for name, value in state.items() if name not in given}
            self._states[tuple(batch.offset.tolist())] = _moved(kept, torch.device("cpu"))
        return out

    def _take_state(self, layer: int, batch: Batch) -> dict[str, Any]:
        if layer == 0:
            return {}
        try:
            state: dict[str, Any] = _moved(self._states.pop(tuple(batch.offset.tolist())), self._device)
            return state
        except KeyError:
            raise ValueError(
                f"the loader yielded a mini-batch of the parts at {batch.offset.tolist()} for layer {layer}, but none "
                "for the layer before: layer-wise inference needs the same mini-batches in every pass; use "
                "EvalSubgraphLoader(data, ptr)"
            ) from None


def _moved(value: Any, device: torch.device) -> Any:
    """Move the tensors in a layer's state, also those in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value
