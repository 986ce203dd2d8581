"""Networks of every form of layer, and the slow way to exact histories and gradients: the whole graph at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from graph_zoo import ptr_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.nn import GraphConv, SAGEConv

from recollect.autoscale import ScalableGNN, SubgraphLoader, edge_index_of, permute, propagate, to_adj_t
from recollect.models import APPNP, GAT, GCN, GCN2, GIN, PNA, PNA_JK

NODES, IN, HIDDEN, OUT = 40, 3, 6, 4
PTR = ptr_of(10, 0, 12, 9, 9)
DOUBLE = {"history_dtype": torch.float64}


def make_data(edges: int = 160, seed: int = 1) -> Data:
    """Directed and weighted, with double edges, self-loops and an isolated node."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(NODES - 1, (2, edges), generator=generator)
    edge_index[:, :4] = edge_index[:, 4:8]
    edge_index[1, 8:12] = edge_index[0, 8:12]
    data = Data(
        x=torch.randn(NODES, IN, dtype=torch.float64, generator=generator),
        edge_index=edge_index,
        edge_weight=torch.rand(edges, dtype=torch.float64, generator=generator),
        edge_attr=torch.randn(edges, 2, dtype=torch.float64, generator=generator),
        node_share=torch.rand(NODES, OUT, dtype=torch.float64, generator=generator),
    )
    return to_adj_t(permute(data, torch.randperm(NODES, generator=generator), log=False))


class Layers(ScalableGNN):
    """Layers of a kind, with tanh before each but the first."""

    def __init__(self, make: Callable[[int, int], nn.Module], num_layers: int, **options: Any) -> None:
        super().__init__(NODES, HIDDEN, num_layers, **options)
        widths = [IN, *[HIDDEN] * (num_layers - 1), OUT]
        self.layers = nn.ModuleList(make(*pair) for pair in pairwise(widths))

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        return self.convolve(layer, x.tanh() if layer else x, adj_t, state)

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        weights = {} if isinstance(self.layers[layer], SAGEConv) else {"edge_weight": adj_t.values()}
        return self.layers[layer]((x, x[: adj_t.size(0)]), edge_index_of(adj_t), **weights)


class Own(Layers):
    """A user's layer: a target's own row stays apart, and what the layers before returned for it goes in too."""

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        out = self.layers[layer](propagate(adj_t, x.square()) + x[: adj_t.size(0)])
        if layer == 0:
            state["first"] = out.sin()
        elif layer < self.num_layers - 1:
            out = out + state["first"]
        for earlier in state.get("all", ()):
            out = out + earlier.mean(-1, keepdim=True)
        state["all"] = (*state.get("all", ()), out)
        return out


class Gated(Layers):
    """What a source sends is no linear function of its products with weights."""

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        return propagate(adj_t, self.layers[layer](x).tanh())


class EdgeWise(Layers):
    """Messages g(x_j, e_ij), each edge's attributes in a product with its source's row."""

    inputs = ("edge_attr",)

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        rows = self.layers[layer](x)[adj_t.col_indices()] * state["edge_attr"].sum(-1, keepdim=True).sin()
        target = edge_index_of(adj_t)[1]
        return rows.new_zeros(adj_t.size(0), rows.size(1)).index_add(0, target, rows)


class Leaving(Layers):
    """Leaves more than its output."""

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        out = propagate(adj_t, self.layers[layer](x))
        state["more"] = out.sin()
        return out


class LateState(Layers):
    """What the first layer left goes into an activation at the end of each other."""

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        out = self.layers[layer](propagate(adj_t, x))
        if layer == 0:
            state["first"] = out
        return F.softplus(out + state["first"].mean(-1, keepdim=True))


class Late(Layers):
    """Its activation comes at a layer's end: no sum over edges."""

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        return F.softplus(self.layers[layer](propagate(adj_t, x)))


def _pna(kind: type[PNA]) -> Callable[..., ScalableGNN]:
    degrees = make_data().adj_t.crow_indices().diff()
    return lambda layers, **options: kind(
        NODES, IN, HIDDEN, OUT, layers, ["mean", "std", "max"], ["identity", "amplification"], degrees, **options
    )


SUMS: dict[str, Callable[..., ScalableGNN]] = {
    "gcn": lambda layers, **options: GCN(NODES, IN, HIDDEN, OUT, layers, **options),
    "gcn-linear": lambda layers, **options: GCN(NODES, IN, HIDDEN, OUT, layers, linear=True, residual=True, **options),
    "gcn2": lambda layers, **options: GCN2(NODES, IN, HIDDEN, OUT, layers, shared_weights=False, **options),
    "appnp": lambda layers, **options: APPNP(NODES, IN, HIDDEN, OUT, layers, **options),
    "graphconv": lambda layers, **options: Layers(lambda a, b: GraphConv((a, a), b), layers, **options),
    "sage-sum": lambda layers, **options: Layers(lambda a, b: SAGEConv((a, a), b, aggr="sum"), layers, **options),
    "own": lambda layers, **options: Own(nn.Linear, layers, **options),
    "gated": lambda layers, **options: Gated(nn.Linear, layers, **options),
    "edges": lambda layers, **options: EdgeWise(nn.Linear, layers, **options),
}
OTHERS: dict[str, Callable[..., ScalableGNN]] = {
    "late": lambda layers, **options: Late(nn.Linear, layers, **options),
    "sage": lambda layers, **options: Layers(lambda a, b: SAGEConv((a, a), b), layers, **options),
    "gin": lambda layers, **options: GIN(NODES, IN, HIDDEN, OUT, layers, **options),
    "gat": lambda layers, **options: GAT(NODES, IN, 3, 2, OUT, 1, layers, **options),
    "pna": _pna(PNA),
    "pna-jk": _pna(PNA_JK),
}


def make(name: str, layers: int, **options: Any) -> ScalableGNN:
    torch.manual_seed(0)
    made = SUMS | OTHERS
    made["leaving"] = lambda layers, **options: Leaving(nn.Linear, layers, **options)
    made["late-state"] = lambda layers, **options: LateState(nn.Linear, layers, **options)
    return made[name](layers, **DOUBLE | options).double()


def run(model: ScalableGNN, batch: Any) -> Tensor:
    given = {name: batch.data[name] for name in model.inputs}
    given |= {"outward": batch.data.outward} if "outward" in batch.data else {}
    return model(batch.data.x, batch.data.adj_t, *batch[1:], **given)


def loss_of(out: Tensor, share: Tensor) -> Tensor:
    """A sum over nodes."""
    return (out.sin() * share).sum()


def gradients_of(model: ScalableGNN) -> Tensor:
    """All parameters' gradients in one, which are then given up."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([grad.flatten() for grad in found])


def whole(model: ScalableGNN, data: Data) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradient of the whole graph's loss, what each layer returns, and the loss' gradient by that."""
    rows: list[Tensor] = []

    def follow(layer: int, out: Tensor, before: Any, state: Any) -> tuple[Tensor, Any]:
        out.retain_grad()
        rows.append(out)
        return out, state

    inputs = {name: data[name] for name in model.inputs}
    out = model.run_layers(data.x, data.adj_t, inputs, lambda layer, x: x, None, follow)
    loss_of(out, data.node_share).backward()
    return gradients_of(model), [row.detach() for row in rows], [row.grad for row in rows]


def fill(model: ScalableGNN, rows: list[Tensor], gradients: Sequence[Tensor] = ()) -> None:
    """Put these into the histories."""
    for history, row in zip(model.tables, rows, strict=False):
        history.push(row)
    for layer in range(1, len(gradients) if model.compensate else 0):
        model.gradients.table(layer, gradients[layer].size(1)).push(gradients[layer])


def epoch(model: ScalableGNN, data: Data, outward: bool | str, per_batch: int = 2) -> Tensor:
    """The sum of all mini-batches' gradients."""
    for batch in SubgraphLoader(data, PTR, per_batch, log=False, outward=outward):
        loss_of(run(model, batch), batch.data.node_share[: batch.batch_size]).backward()
    return gradients_of(model)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
