"""The systems that `bench.depth` compares: one grouped additive coupling, seven ways to train it.

All of them run the same block modules, with the same weights, on the same graph:
y_1 = x_1 + f_1(x_2 + ... + x_C), y_i = x_i + f_i(y_{i-1}). "recollect" gets a plain `edge_index`, and computes the
convolutions in the blocks by products with the adjacency, as it does by default; "unfused" calls them as they are, and
"uncertified" does not compare what backward rebuilds with the forward. All others get the `edge_index` too, or, as a
careful user would have it, the adjacency in CSR form, for which torch_geometric computes such products itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch_geometric.nn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench._step import Step, System, UnavailableError, imported
from recollect.messages import make_adj_t
from recollect.models import RevGNN
from recollect.reversible import GroupAddRev

Blocks = Sequence[nn.ModuleList]
Norm = Literal["bare", "layer", "batch"]


class Recollect(System):
    """The caller's input is never touched, so what backward reconstructs is not seen: `inverse` is the same solving."""

    def __init__(self, modules: Sequence[GroupAddRev], graph: Tensor) -> None:
        super().__init__([_bind(module, graph) for module in modules])
        self.modules = modules
        self.graph = graph

    def last_drift(self) -> float | None:
        drifts = [module.last_drift for module in self.modules if module.last_drift is not None]
        return max(drifts, default=None, key=lambda drift: math.inf if math.isnan(drift) else drift)

    @torch.no_grad()
    def restored(self, given: Tensor, out: Tensor) -> tuple[Tensor | None, str]:
        for module in reversed(self.modules):
            out = module.inverse(out, self.graph)
        return out, "the layers' `inverse`, one after the other, of the output"


def build_blocks(
    depth: int, channels: int, norm: Norm, *, dropout: float = 0.0, dtype: torch.dtype, device: torch.device
) -> list[nn.ModuleList]:
    """The blocks of a RevGNN of SAGE layers in 2 groups: "norm, ReLU, dropout, conv"; bare convolutions with "bare".

    Taken from a RevGNN so that what is measured is what the library trains. Each block draws its own dropout mask.
    """
    if norm == "bare" and dropout:
        raise ValueError("bare convolutions have no dropout")
    model = RevGNN(1, channels, 1, depth, 2, "sage", dropout, norm=None if norm == "bare" else norm)
    stacks = [cast(GroupAddRev, layer).convs for layer in model.layers]
    if norm == "bare":
        stacks = [nn.ModuleList(block.get_submodule("conv") for block in stack) for stack in stacks]
    return [stack.to(device, dtype) for stack in stacks]


def _bind(layer: Callable[..., Tensor], graph: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, graph)


def _plain(blocks: Blocks, graph: Tensor) -> System:
    layers = [torch_geometric.nn.GroupAddRev(stack, disable=True) for stack in blocks]
    return System([_bind(layer, graph) for layer in layers])


def _checkpoint(blocks: Blocks, graph: Tensor) -> System:
    def bind(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(layer, x, graph, use_reentrant=False)

    return System([bind(torch_geometric.nn.GroupAddRev(stack, disable=True)) for stack in blocks])


def _pyg(blocks: Blocks, graph: Tensor) -> System:
    return System([_bind(torch_geometric.nn.GroupAddRev(stack), graph) for stack in blocks], refills=True)


class OnGraph(nn.Module):
    """A block with its graph: memcnn's coupling hands on a single tensor."""

    def __init__(self, block: nn.Module, graph: Tensor) -> None:
        super().__init__()
        self.block = block
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x, self.graph)
        return out


def _memcnn(blocks: Blocks, graph: Tensor) -> System:
    if any(len(stack) != 2 for stack in blocks):
        raise UnavailableError("memcnn's additive coupling has two groups")
    memcnn = imported("memcnn")

    def layer(stack: nn.ModuleList) -> Callable[[Tensor], Tensor]:
        coupling = memcnn.AdditiveCoupling(OnGraph(stack[0], graph), OnGraph(stack[1], graph), split_dim=-1)
        wrapped: Callable[[Tensor], Tensor] = memcnn.InvertibleModuleWrapper(
            coupling, keep_input=False, keep_input_inverse=False
        )
        return wrapped

    return System([layer(stack) for stack in blocks], refills=True)


def _recollect(blocks: Blocks, graph: Tensor, fuse: bool = True, certify: bool = True) -> System:
    return Recollect([GroupAddRev(stack, fuse=fuse, certify=certify) for stack in blocks], graph)


SYSTEMS: dict[str, Callable[[Blocks, Tensor], System]] = {
    "plain": _plain,
    "checkpoint": _checkpoint,
    "pyg": _pyg,
    "memcnn": _memcnn,
    "recollect": _recollect,
    "unfused": functools.partial(_recollect, fuse=False),
    "uncertified": functools.partial(_recollect, certify=False),
}


# On a CSR adjacency: what else there is for somebody who cares for time and memory. Only recollect gets edges.
ON_CSR = ("plain", "checkpoint", "pyg", "recollect", "uncertified")
ON_EDGES = tuple(name for name in SYSTEMS if name != "uncertified")


def make_step(name: str, blocks: Blocks, x: Tensor, graph: Tensor) -> Step:
    """A step of one of `SYSTEMS` over blocks that it shares with the others.

    Raises:
        UnavailableError: it cannot run here.
    """
    return Step(SYSTEMS[name](blocks, graph), x, [p for stack in blocks for p in stack.parameters()])


@dataclass(frozen=True)
class Workload:
    """A random graph with random features, and the blocks to run on it.

    Attributes:
        norm: "bare" for convolutions alone, "layer" or "batch" for (norm, ReLU, dropout, conv).
        csr: the peers get the adjacency in CSR form.
    """

    nodes: int
    edges: int
    channels: int
    norm: Norm
    csr: bool = False

    @property
    def systems(self) -> Sequence[str]:
        """The names of those that it is for."""
        return ON_CSR if self.csr else ON_EDGES

    def steps(
        self, depth: int, device: torch.device, dtype: torch.dtype = torch.float32, dropout: float = 0.0
    ) -> dict[str, Callable[[], Step]]:
        """How to make a step of each system, all on the same inputs and weights."""
        torch.manual_seed(0)
        graph = torch.randint(self.nodes, (2, self.edges), device=device)
        x = torch.randn(self.nodes, self.channels, dtype=dtype, device=device, requires_grad=True)
        blocks = build_blocks(depth, self.channels, self.norm, dropout=dropout, dtype=dtype, device=device)
        graphs = dict.fromkeys(self.systems, graph)
        if self.csr:
            ones = torch.ones(self.edges, dtype=dtype, device=device)
            adj_t, _ = make_adj_t(graph[0], graph[1], ones, self.nodes)  # equal edges stay two, as they are in `graph`
            # An edge_index each: what is kept for one while it lives must not be charged to whoever comes first.
            graphs = dict.fromkeys(self.systems, adj_t) | {"recollect": graph, "uncertified": graph.clone()}
        return {name: functools.partial(make_step, name, blocks, x, graphs[name]) for name in self.systems}

    def __str__(self) -> str:
        blocks = "bare SAGE" if self.norm == "bare" else f"{self.norm} norm, ReLU, SAGE"
        form = "; the peers on a CSR adjacency" if self.csr else ""
        return f"{self.nodes:,} nodes, {self.edges:,} edges, {self.channels} channels, 2 groups, {blocks}{form}"
