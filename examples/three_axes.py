"""All three at once: a deep network, on mini-batches of a graph, with an objective for each label.

    python examples/three_axes.py
    python examples/three_axes.py --nodes 10000 --depth 16

Messages pass along the edges three times, and between that a stack of reversible layers works on each node:

- depth: the stacks keep their output alone (`GroupAddRev`);
- graph: a step takes a few parts of the graph, and what lies around them comes from histories (`ScalableGNN`);
- objectives: each label is an objective, and a step hurts none of them (`Engine`, `UPGradWeighting`).

The peak memory of such a step is measured against one on the whole graph that keeps every activation.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.aggregation import UPGradWeighting
from recollect.autogram import Engine
from recollect.autoscale import EvalSubgraphLoader, ScalableGNN, SubgraphLoader, metis, normalize, permute, to_adj_t
from recollect.data import load
from recollect.memory import peak_memory
from recollect.reversible import GroupAddRev

LAYERS, FEATURES, CHANNELS, LABELS = 3, 32, 64, 8


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        accuracy: of the labels of the test nodes.
        always_same: the accuracy of giving each label the value that most training nodes have.
        peak: bytes of tensors in a training step on a mini-batch, beyond what there was before it.
        peak_plain: the same on the whole graph, with every activation kept, and the explicit Jacobian.
    """

    accuracy: float
    always_same: float
    peak: int
    peak_plain: int


class Block(nn.Module):
    """What a reversible layer computes at each node. The graph, which it is given too, does not matter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor, _: None) -> Tensor:
        """Return [num_nodes, channels] for x of the same shape."""
        out: Tensor = self.linear(F.dropout(self.norm(x).relu(), 0.1, self.training))
        return out


class Network(ScalableGNN):
    """Message passing through histories; each time followed by reversible layers."""

    def __init__(self, num_nodes: int, depth: int) -> None:
        super().__init__(num_nodes, CHANNELS, LAYERS)
        widths = [FEATURES] + [CHANNELS] * (LAYERS - 1)
        self.linears = nn.ModuleList(nn.Linear(width, CHANNELS) for width in widths)
        self.stacks = nn.ModuleList(
            nn.ModuleList(GroupAddRev(Block(CHANNELS // 2), num_groups=2) for _ in range(depth)) for _ in widths
        )
        self.head = nn.Linear(CHANNELS, LABELS)

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the targets' channels, or logits, of adj_t [num_targets, num_sources] and x [num_sources, ...]."""
        x = F.layer_norm(adj_t @ self.linears[layer](x), (CHANNELS,))
        for reversible in cast(nn.ModuleList, self.stacks[layer]):
            x = reversible(x, None)
        return self.head(x) if layer == LAYERS - 1 else x

    def keep_everything(self) -> None:
        """Make the reversible layers ordinary ones."""
        for module in self.modules():
            if isinstance(module, GroupAddRev):
                module.disable = True


def losses_of(logits: Tensor, data: Any) -> Tensor:
    """Return the loss of each label, [LABELS], over those of the first nodes that are for training."""
    mask = data.train_mask[: len(logits)]
    target = data.y[: len(logits)][mask].to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits[mask], target, reduction="none").mean(0)


def plain_step(net: Network, data: Any) -> None:
    """Do the same on the whole graph with what torch has: a row of the Jacobian for each loss."""
    losses = losses_of(net(data.x, data.adj_t), data)
    parameters = list(net.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    update = UPGradWeighting()(jacobian @ jacobian.T) @ jacobian
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, gradient in zip(parameters, update.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)


def train(num_nodes: int = 2000, depth: int = 4, epochs: int = 6, seed: int = 0) -> Result:
    """Train on a stochastic block model with planted labels."""
    torch.manual_seed(seed)
    data = to_adj_t(load("sbm", num_nodes=num_nodes, num_features=FEATURES, num_labels=LABELS, noise=0.3).data)
    data.adj_t = normalize(data.adj_t)
    perm, ptr = metis(data.adj_t, num_parts=40)
    data = permute(data, perm)
    net = Network(num_nodes, depth)
    everything = EvalSubgraphLoader(data, ptr, batch_size=4)
    net(loader=everything)  # fills the histories
    engine, weighting = Engine(net), UPGradWeighting()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in SubgraphLoader(data, ptr, batch_size=4, shuffle=True):
            optimizer.zero_grad()
            logits = net(batch.data.x, batch.data.adj_t, *batch[1:])
            engine.backward(losses_of(logits, batch.data), weighting)
            optimizer.step()
    right = (net(loader=everything) > 0) == data.y
    same = (data.y[data.train_mask].double().mean(0) > 0.5) == data.y

    with peak_memory() as memory:
        logits = net(batch.data.x, batch.data.adj_t, *batch[1:])
        engine.backward(losses_of(logits, batch.data), weighting)
    net.keep_everything()
    with peak_memory() as plain:
        plain_step(net, data)
    accuracy, always_same = (found[data.test_mask].double().mean().item() for found in (right, same))
    return Result(accuracy, always_same, memory.peak_bytes, plain.peak_bytes)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="A deep network on mini-batches with many objectives.")
    parser.add_argument("--nodes", type=int, default=2000)
    parser.add_argument("--depth", type=int, default=4, help="reversible layers after each of the three convolutions")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    result = train(options.nodes, options.depth, options.epochs)
    print(f"labels of the test nodes   {result.accuracy:.1%} right; always the same: {result.always_same:.1%}")
    print(f"peak of a step             {result.peak / 2**20:.1f} MiB; all kept: {result.peak_plain / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
