"""A gate for each edge, learnt from the edge's features, on mini-batches with histories.

    python examples/edge_gate.py

Half of the edges of this graph join nodes of one class, the others any two, and only the features of an edge tell, with
noise, which it is. A small perceptron turns them into a weight from 0 to 1, and its gradient comes through the product
with the adjacency: for each edge a scalar product of two rows, and no row for each edge. The same network is trained
with weights that are all alike, to compare.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data

from recollect.autoscale import (
    SubgraphLoader,
    edge_index_of,
    normalize,
    partition,
    permute,
    to_adj_t,
    with_weights,
)
from recollect.models import GIN

CLASSES, CHANNELS, EDGE_CHANNELS = 4, 8, 3


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        accuracy: of the test nodes, with gates.
        ungated: of the same network with weights that are all alike.
        within: the mean gate of edges that join nodes of one class.
        between: that of the others.
    """

    accuracy: float
    ungated: float
    within: float
    between: float


def make_graph(num_nodes: int, generator: torch.Generator) -> Data:
    """Draw the graph; edges go from 12 nodes to each, and features of nodes tell little of their classes."""
    y = torch.randint(CLASSES, (num_nodes,), generator=generator)
    target = torch.arange(num_nodes).repeat_interleave(12)
    source = torch.randint(num_nodes, target.shape, generator=generator)
    members = [(y == label).nonzero().flatten() for label in range(CLASSES)]
    for label, nodes in enumerate(members):  # every other edge comes from the target's own class
        into = ((y[target] == label) & (torch.arange(target.numel()) % 2 == 0)).nonzero().flatten()
        source[into] = nodes[torch.randint(nodes.numel(), into.shape, generator=generator)]
    same = (y[source] == y[target]).float()
    return to_adj_t(
        Data(
            x=F.one_hot(y, CHANNELS) + torch.randn(num_nodes, CHANNELS, generator=generator),
            y=y,
            edge_index=torch.stack([source, target]),
            edge_attr=same.unsqueeze(1) + 0.5 * torch.randn(target.numel(), EDGE_CHANNELS, generator=generator),
            train_mask=torch.rand(num_nodes, generator=generator) < 0.5,
        )
    )


class Gate(nn.Module):
    """From the features of edges to a weight for each in (0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(EDGE_CHANNELS, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, edge_attr: Tensor) -> Tensor:
        """Return [num_edges]."""
        weights: Tensor = self.net(edge_attr).squeeze(1).sigmoid()
        return weights


def fit(data: Data, ptr: Tensor, gate: Gate | None, epochs: int) -> float:
    """Train a network, and the gate with it; return the accuracy of the test nodes."""
    model = GIN(data.num_nodes, CHANNELS, 16, CLASSES, num_layers=2)
    parts = nn.ModuleList([model] if gate is None else [model, gate])
    optimizer = torch.optim.Adam(parts.parameters(), lr=0.01)

    def adjacency(of: Data) -> Tensor:
        return of.adj_t if gate is None else with_weights(of.adj_t, of.adj_t.values() * gate(of.edge_attr))

    loader = SubgraphLoader(data, ptr, batch_size=2, shuffle=True, log=False)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            out = model(batch.data.x, adjacency(batch.data), *batch[1:])
            training = batch.data.train_mask[: batch.batch_size]
            F.cross_entropy(out[training], batch.data.y[: batch.batch_size][training]).backward()
            optimizer.step()
    with torch.no_grad():
        right: Tensor = model.eval()(data.x, adjacency(data)).argmax(1) == data.y
    return right[~data.train_mask].double().mean().item()


def train(num_nodes: int = 1000, epochs: int = 40, seed: int = 0) -> Result:
    """Train with gates and without."""
    torch.manual_seed(seed)
    data = make_graph(num_nodes, torch.Generator().manual_seed(seed))
    data.adj_t = normalize(data.adj_t, self_loops=False)
    perm, ptr, *_ = partition(data.adj_t, num_parts=8, method="random", log=False)
    data = permute(data, perm, log=False)
    gate = Gate()
    accuracy, ungated = fit(data, ptr, gate, epochs), fit(data, ptr, None, epochs)
    source, target = edge_index_of(data.adj_t)
    same = data.y[source] == data.y[target]
    with torch.no_grad():
        gates = gate(data.edge_attr)
    return Result(accuracy, ungated, gates[same].mean().item(), gates[~same].mean().item())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Learn a gate for each edge, on mini-batches with histories.")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    result = train(options.nodes, options.epochs)
    print(f"test accuracy  {result.accuracy:.1%} with gates, {result.ungated:.1%} without")
    print(f"mean gate      {result.within:.2f} within a class, {result.between:.2f} between two")


if __name__ == "__main__":
    main()
