"""Link prediction on mini-batches with histories: which pairs of nodes are joined by an edge that was hidden?

    python examples/link_prediction.py
    python examples/link_prediction.py --nodes 2000 --parts 8

A tenth of a graph's edges are hidden for testing, and a third of the others are what training predicts. A mini-batch
holds both ends of its pairs: pairs within a part come with this part, and those between two parts with both of them.
Pairs that are no edges are drawn anew in each mini-batch. The score of a pair is the product of its nodes' embeddings.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data

from recollect.autoscale import EvalSubgraphLoader, ScalableGNN, SubgraphLoader, metis, normalize, permute, to_adj_t

CHANNELS, LAYERS = 32, 2


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        auc: probability that a hidden edge has a higher score than a pair of nodes that is none.
        auc_before: the same before training.
        pairs: pairs that one epoch handed out.
        links: pairs that there are to train on.
    """

    auc: float
    auc_before: float
    pairs: int
    links: int


class Encoder(ScalableGNN):
    """Embeddings of nodes by graph convolutions."""

    def __init__(self, num_nodes: int, in_channels: int) -> None:
        super().__init__(num_nodes, CHANNELS, LAYERS)
        widths = [in_channels] + [CHANNELS] * LAYERS
        self.linears = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the targets' channels of adj_t [num_targets, num_sources] and x [num_sources, ...]."""
        x = adj_t @ self.linears[layer](x)
        return x if layer == LAYERS - 1 else x.relu()


def make_graph(num_nodes: int, features: int = 16) -> Data:
    """Points in the plane; the nearer two are, the more likely an edge joins them. Features are noisy functions."""
    points = torch.rand(num_nodes, 2)
    distance = torch.cdist(points, points)
    likely = torch.exp(-distance * 25) * (12 / (num_nodes * 0.01))
    joined = torch.rand(num_nodes, num_nodes).triu(1) < likely.triu(1)
    pairs = joined.nonzero().t().contiguous()
    x = (points @ torch.randn(2, features) * 4 + torch.rand(features) * 6).sin() + 0.5 * torch.randn(
        num_nodes, features
    )
    return Data(x=x, edge_index=pairs)


def split(data: Data) -> tuple[Data, Tensor, Tensor]:
    """Return the graph whose messages flow, the pairs to train on [2, K] and the pairs to test with [2, T]."""
    pairs = data.edge_index[:, torch.randperm(data.edge_index.size(1))]
    hidden, rest = pairs.split([pairs.size(1) // 10, pairs.size(1) - pairs.size(1) // 10], dim=1)
    links, messages = rest.split([rest.size(1) // 3, rest.size(1) - rest.size(1) // 3], dim=1)
    # As edge_label_index, permute gives them the new numbers; messages flow in both directions.
    graph = Data(x=data.x, edge_index=torch.cat([messages, messages.flip(0)], dim=1), edge_label_index=links)
    return graph, links, hidden


def scores_of(z: Tensor, pairs: Tensor) -> Tensor:
    """Return the score of each pair [K] for embeddings [N, CHANNELS]."""
    return (z[pairs[0]] * z[pairs[1]]).sum(1)


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Return the share of pairs of scores in the right order."""
    return (positive[:, None] > negative[None, :]).double().mean().item()


def train(num_nodes: int = 800, num_parts: int = 4, epochs: int = 15, seed: int = 0) -> Result:
    """Train on a random geometric graph."""
    torch.manual_seed(seed)
    whole = make_graph(num_nodes)
    graph, links, hidden = split(whole)
    others = torch.randint(num_nodes, hidden.shape)  # few of them are edges

    data = to_adj_t(graph)
    data.adj_t = normalize(data.adj_t)
    perm, ptr = metis(data.adj_t, num_parts, log=False)
    data = permute(data, perm, log=False)
    loader = SubgraphLoader(data, ptr, links=data.edge_label_index, shuffle=True, log=False)
    everything = EvalSubgraphLoader(data, ptr, log=False)
    model = Encoder(num_nodes, graph.x.size(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def evaluate() -> float:
        z = torch.empty(num_nodes, CHANNELS)
        z[data.node_order] = model(loader=everything)  # in the graph's first order; fills the histories too
        return area_under_curve(scores_of(z, hidden), scores_of(z, others))

    before, pairs = evaluate(), 0
    for epoch in range(epochs):
        for batch in loader:
            z = model(batch.data.x, batch.data.adj_t, *batch[1:])
            positive = batch.data.edge_label_index  # rows of z
            negative = torch.randint(batch.batch_size, positive.shape)
            scores = torch.cat([scores_of(z, positive), scores_of(z, negative)])
            target = torch.cat([torch.ones(positive.size(1)), torch.zeros(negative.size(1))])
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(scores, target).backward()
            optimizer.step()
            pairs += positive.size(1) * (epoch == 0)
    return Result(evaluate(), before, pairs, links.size(1))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Link prediction on mini-batches with histories.")
    parser.add_argument("--nodes", type=int, default=800)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    result = train(options.nodes, options.parts, options.epochs)
    print(f"hidden edges against other pairs   AUC {result.auc:.3f}; before training {result.auc_before:.3f}")
    print(f"pairs of an epoch                  {result.pairs} of {result.links}")


if __name__ == "__main__":
    main()
