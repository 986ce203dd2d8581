"""The networks of the drift benchmark: grouped layers as each system runs them, and as it keeps everything."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch_geometric.nn
from torch import Tensor, nn

from bench._step import UnavailableError, imported, relative_error
from bench._systems import OnGraph
from recollect.reversible import GroupAddRev

NORMS = ("layer", "none")
DIGITS = 14  # k of the exact stream: a thousand layers add up to more than the 256 of k = 16
OWN = 16
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """A random graph with random features, in float32."""

    nodes: int
    edges: int
    channels: int

    def __str__(self) -> str:
        return f"{self.nodes} nodes, {self.edges} edges, {self.channels} channels, 2 groups"

    def graph(self) -> Tensor:
        return torch.randint(self.nodes, (2, self.edges), generator=torch.Generator().manual_seed(1))

    def features(self) -> Tensor:
        return torch.randn(self.nodes, self.channels, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    """A mean over the neighbours, after a layer norm and ReLU or, without a norm, before a tanh."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if norm == "layer" else None
        self.conv = torch_geometric.nn.SAGEConv(channels, channels)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        if self.norm is None:
            out: Tensor = 0.2 * self.conv(x, graph).tanh()
        else:
            out = 0.2 * self.conv(self.norm(x).relu(), graph)
        return out


def stacks(depth: int, work: Work, norm: str) -> list[nn.ModuleList]:
    """Return each layer's blocks; sixteen layers have weights of their own, and those after them the same in turn."""
    torch.manual_seed(0)
    half = work.channels // 2
    own = [nn.ModuleList(Block(half, norm) for _ in range(2)) for _ in range(min(depth, OWN))]
    return [own[index % OWN] for index in range(depth)]


def _chain(layers: Iterable[Callable[[Tensor, Tensor], Tensor]], graph: Tensor) -> Run:
    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, graph)
        return x

    return run


def _recollect(blocks: list[nn.ModuleList], graph: Tensor, exact: bool | int) -> tuple[Run, Run]:
    # As the peers, so that what differs is the stream alone.
    make = functools.partial(GroupAddRev, exact=exact, fuse=False, certify=False)
    return _chain([make(stack) for stack in blocks], graph), _chain([make(s, disable=True) for s in blocks], graph)


def _pyg(blocks: list[nn.ModuleList], graph: Tensor) -> tuple[Run, Run]:
    make = torch_geometric.nn.GroupAddRev
    return _chain([make(stack) for stack in blocks], graph), _chain([make(s, disable=True) for s in blocks], graph)


def _memcnn(blocks: list[nn.ModuleList], graph: Tensor) -> tuple[Run, Run]:
    memcnn = imported("memcnn")

    def layer(stack: nn.ModuleList) -> Callable[[Tensor, Tensor], Tensor]:
        coupling = memcnn.AdditiveCoupling(OnGraph(stack[0], graph), OnGraph(stack[1], graph), split_dim=-1)
        wrapped = memcnn.InvertibleModuleWrapper(coupling, keep_input=False, keep_input_inverse=False)

        def run(x: Tensor, graph: Tensor) -> Tensor:
            out: Tensor = wrapped(x)
            return out

        return run

    return _chain([layer(stack) for stack in blocks], graph), _pyg(blocks, graph)[1]


SYSTEMS: dict[str, Callable[[list[nn.ModuleList], Tensor], tuple[Run, Run]]] = {
    "exact": functools.partial(_recollect, exact=DIGITS),
    "float": functools.partial(_recollect, exact=False),
    "torch_geometric": _pyg,
    "memcnn": _memcnn,
}


def gradients(run: Run, blocks: list[nn.ModuleList], work: Work) -> list[Tensor]:
    """Gradients of the input and all parameters."""
    x = work.features().requires_grad_()
    weights = torch.linspace(0.5, 2.0, work.nodes * work.channels).view(work.nodes, work.channels)
    parameters = list(nn.ModuleList(blocks[:OWN]).parameters())
    for parameter in parameters:
        parameter.grad = None
    y = run(x * 1)  # some empty what they are given
    ((y / y.detach().norm()).sin() * weights).sum().backward()
    return [x.grad, *(p.grad for p in parameters)]  # type: ignore[list-item]


def errors(depth: int, work: Work, norm: str) -> dict[str, float | str]:
    """Relative error of all gradients against the same network with everything kept, by system."""
    graph = work.graph()
    found: dict[str, float | str] = {}
    for name, make in SYSTEMS.items():
        blocks = stacks(depth, work, norm)
        try:
            run, keeping = make(blocks, graph)
            found[name] = relative_error(gradients(run, blocks, work), gradients(keeping, blocks, work))
        except (UnavailableError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
