"""`GroupRevRes`: the graph comes first, and nobody but the blocks looks at it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recollect.reversible import GroupAddRev, GroupRevRes


class OpaqueGraph:
    """Stands for a DGLGraph: any use other than the one that blocks make of it is an error."""

    __slots__ = ("_edges",)

    def __init__(self, edge_index: Tensor) -> None:
        object.__setattr__(self, "_edges", edge_index)

    def __getattribute__(self, name: str) -> Any:
        if name == "propagate":
            edges = object.__getattribute__(self, "_edges")
            return lambda h: torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
        if name == "__class__":
            return OpaqueGraph
        raise RuntimeError(f"somebody looked at {name} of the graph")

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError("somebody used the graph")

    __setattr__ = __eq__ = __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __repr__ = _refuse  # type: ignore[assignment]
    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class CallableGraph(OpaqueGraph):
    """A graph that can be called, as torch_geometric's Data can."""

    __slots__ = ()

    def __call__(self) -> None:
        raise RuntimeError("somebody called the graph")


class Conv(nn.Module):
    """g, x first; ``after`` runs on the result."""

    def __init__(self, channels: int, *after: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.after = nn.Sequential(*after)

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()

    def forward(self, g: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.after(self.linear(x)).tanh()
        h = h if mask is None else h * mask
        if isinstance(g, tuple):
            return torch.zeros_like(h).index_add(0, g[1], h[g[0]])
        if isinstance(g, Tensor) and g.layout is torch.sparse_csr:
            return g @ h
        if isinstance(g, Tensor):
            return torch.zeros_like(h).index_add(0, g[1], h[g[0]])
        return g.propagate(h)


def swapped(layer: GroupRevRes) -> list[Any]:
    return [lambda x, g, *args, module=module: module(g, x, *args) for module in layer.gnn_modules]


def csr(edge_index: Tensor) -> Tensor:
    dense = torch.zeros(7, 7, dtype=torch.float64)
    dense[edge_index[1], edge_index[0]] = torch.linspace(0.5, 1.5, edge_index.size(1), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return dense.to_sparse_csr()


GRAPHS = {"opaque": OpaqueGraph, "edge_index": lambda e: e, "tuple": lambda e: (e[0], e[1]), "csr": csr}


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("kind", GRAPHS)
def test_any_graph(kind, groups, naive, same_training, edge_index, features):
    torch.manual_seed(0)
    graph, x = GRAPHS[kind](edge_index), features(4 * groups)
    layers = nn.ModuleList(GroupRevRes(Conv(4, nn.Dropout(0.4)), groups) for _ in range(3)).double()
    mask = torch.rand_like(x)
    pieces = list(mask.chunk(groups, -1))

    def run() -> Tensor:
        h = x * 1
        for layer in layers:
            h = layer(graph, h, mask)
        return h

    def plain() -> Tensor:
        h = x
        for layer in layers:
            h = naive(swapped(layer), h, graph, pieces)
        return h

    same_training(run, plain, [x, *layers.parameters()])
    layers.eval()
    y = layers[0](graph, x, mask)
    torch.testing.assert_close(layers[0].inverse(graph, y, mask), x, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layers[0].inverse(graph, y, mask), x, rtol=1e-12, atol=1e-12)


def test_graph_that_can_be_called(naive, same_training, edge_index, features):
    graph, x = CallableGraph(edge_index), features(8)
    layer = GroupRevRes(Conv(4), 2).double()
    same_training(lambda: layer(graph, x), lambda: naive(swapped(layer), x, graph), [x, *layer.parameters()])


def test_sparse_graph_that_requires_grad(naive, same_training, edge_index, features):
    graph, x = csr(edge_index).requires_grad_(), features(8)
    layer = GroupRevRes(Conv(4), 2).double()

    def gradients(call) -> list[Tensor]:
        found = torch.autograd.grad(call().sin().sum(), [graph, x, *layer.parameters()])
        return [t.to_dense() if t.layout is torch.sparse_csr else t for t in found]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        found = gradients(lambda: layer(graph, x * 1))
        expected = gradients(lambda: naive(swapped(layer), x, graph))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-14)


def test_agrees_with_group_add_rev(edge_index, features):
    class Turned(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor, g: Any) -> Tensor:
            return self.conv(g, x)

    layer, x = GroupRevRes(Conv(4), 3).double(), features(12)
    other = GroupAddRev(nn.ModuleList(Turned(module) for module in layer.gnn_modules))
    assert torch.equal(layer(edge_index, x), other(x, edge_index))


def test_batch_norm_counts_once(edge_index, features):
    layer = GroupRevRes(Conv(4, nn.BatchNorm1d(4)), 2).double()
    plain = copy.deepcopy(layer)
    plain.disable = True
    for step in range(1, 3):
        for each in (layer, plain):
            each(edge_index, features(8) * step).sin().sum().backward()
    for found, expected in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_training_flags_of_the_forward(edge_index, features):
    layer, x = GroupRevRes(Conv(4, nn.Dropout(0.5)), 2).double(), features(8)
    found = []
    for layer.disable in (False, True):
        layer.train()
        torch.manual_seed(0)
        y = layer(edge_index, x)
        layer.eval()
        found.append(torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()]))
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-14)


def test_parameters_changed_in_place_before_backward(edge_index, features):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, g: Any, x: Tensor) -> Tensor:
            return (x + self.weight).sin()  # the sum is saved, the weight itself is not

    layer = GroupRevRes(Scale(), 2)
    y = layer(None, features(8))
    with torch.no_grad():
        layer.gnn_modules[0].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"Scale\(\).*'weight'.*changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(how, edge_index, features):
    layer, x = GroupRevRes(Conv(4), 2).double(), features(8)
    layer(edge_index, x).sum().backward()
    other = how(layer)
    assert torch.equal(other(edge_index, x), layer(edge_index, x))
    assert set(layer.state_dict()) == {f"gnn_modules.{k}" for k in layer.gnn_modules.state_dict()}


def test_module():
    layer = GroupRevRes(nn.Linear(4, 4), groups=3)
    assert repr(layer) == "GroupRevRes(Linear(in_features=4, out_features=4, bias=True), groups=3)"
    assert layer.num_groups == 3
    assert GroupRevRes(nn.Linear(4, 4)).num_groups == 2
    before = [p.clone() for p in layer.parameters()]
    assert len(before) == 6
    assert not torch.equal(before[0], before[2])
    layer.reset_parameters()
    assert not any(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))


class TestErrors:
    @pytest.mark.parametrize(
        ("module", "found"),
        [
            (lambda: [Conv(4), Conv(4)], "a list"),
            (lambda: Conv, "the class Conv itself"),
            (lambda: nn.ModuleList([Conv(4), Conv(4)]), "a ModuleList"),
        ],
    )
    def test_what_is_not_one_module(self, module, found):
        with pytest.raises(TypeError, match=rf"gnn_module must be one module, .* copy \(got {found}\)"):
            GroupRevRes(module(), 2)

    def test_one_group(self):
        with pytest.raises(ValueError, match="should not be smaller than 2"):
            GroupRevRes(Conv(4), groups=1)

    def test_channels(self, edge_index):
        with pytest.raises(ValueError, match=r"GroupRevRes: .*groups, 3 \(got 8\); the nearest allowed: 6 or 9"):
            GroupRevRes(Conv(4), 3)(edge_index, torch.zeros(7, 8))

    def test_output_of_another_shape(self, edge_index):
        class Wide(nn.Module):
            def forward(self, g: Any, x: Tensor) -> Tensor:
                return torch.cat([x, x], -1)

        with pytest.raises(ValueError, match=r"Wide\(\): .*shape \[7, 4\], got \[7, 8\]"):
            GroupRevRes(Wide(), 2)(edge_index, torch.zeros(7, 8))
