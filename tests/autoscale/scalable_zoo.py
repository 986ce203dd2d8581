"""A small network on histories, its graph in parts, and the slow way to its gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from graph_zoo import ptr_of
from torch import Tensor, nn
from torch_geometric.data import Data

from recollect.autoscale import ScalableGNN, SubgraphLoader, permute, propagate, to_adj_t

NODES, IN, OUT = 20, 3, 4
WIDTHS = [5, 2, 6]  # of the layers between
PTR = ptr_of(6, 3, 0, 7, 4)


class Mean(ScalableGNN):
    """Four layers tanh(A X W + X V) of different widths, the last of them with the first one's output in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(NODES, WIDTHS, 4, **{"history_dtype": torch.float64} | options)
        widths = [IN, *WIDTHS, OUT]
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            torch.randn(2 * a, b, dtype=torch.float64, generator=generator) for a, b in pairwise(widths)
        )
        self.skip = nn.Parameter(torch.randn(WIDTHS[0], OUT, dtype=torch.float64, generator=generator))

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        out = torch.cat([propagate(adj_t, x), x[: adj_t.size(0)]], -1) @ self.weights[layer]
        if layer == 0:
            state["first"] = out.tanh()
        if layer == 3:
            out = out + state["first"] @ self.skip
        return out.tanh()


class Handwritten(Mean):
    """The same, with a forward of its own, as users write it who come from PyGAS."""

    layers_written_out = True

    def forward(self, x: Tensor, adj_t: Tensor, *args: Any) -> Tensor:
        state: dict[str, Any] = {}
        for layer, history in enumerate(self.histories):
            x = self.forward_layer(layer, x, adj_t, state)
            x = self.push_and_pull(history, x, *args)
        return self.forward_layer(3, x, adj_t, state)


POOL = {"pool_size": 2, "buffer_size": NODES}
pools = pytest.mark.parametrize("pool", [{}, POOL], ids=["plain", "pool"])
both = pytest.mark.parametrize("kind", [Mean, Handwritten])


def make_graph() -> Data:
    """Directed, with an isolated node, in the order of `PTR`'s parts."""
    generator = torch.Generator().manual_seed(1)
    data = Data(
        x=torch.randn(NODES, IN, dtype=torch.float64, generator=generator),
        y=torch.arange(NODES) % OUT,
        edge_index=torch.randint(NODES - 1, (2, 60), generator=generator),
        edge_weight=torch.rand(60, dtype=torch.float64, generator=generator),
    )
    return to_adj_t(permute(data, torch.randperm(NODES, generator=generator), log=False))


def batches(data: Data, per_batch: int = 1, **options: Any) -> list[Any]:
    return list(SubgraphLoader(data, PTR, per_batch, **options))


def run(model: ScalableGNN, batch: Any) -> Tensor:
    return model(batch.data.x, batch.data.adj_t, *batch[1:])


def backward(model: ScalableGNN, out: Tensor) -> list[Tensor]:
    leaves = list(model.parameters())
    return list(torch.autograd.grad(out.sin().sum(), leaves))


def tables(model: ScalableGNN) -> list[Tensor]:
    return [history.pull() for history in model.histories]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
