"""Which extra arguments are split over the groups, and that those who require grad get it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recollect.reversible import GroupAddRev, GroupRevRes, InvertibleModule
from recollect.testing import check_invertible


class Recorder(nn.Module):
    """Notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor, graph: Any, *args: Any) -> Tensor:
        self.seen.append(args)
        return torch.zeros_like(x)


def given(x: Tensor, *args: Any, groups: int = 2, **options: Any) -> list[tuple[Any, ...]]:
    layer = GroupAddRev(nn.ModuleList(Recorder() for _ in range(groups)), **options)
    layer(x, None, *args)
    return [conv.seen[0] for conv in layer.convs]


def shapes(x: Tensor, *args: Any, **options: Any) -> list[list[int]]:
    first, *_ = given(x, *args, **options)
    return [list(arg.shape) for arg in first]


class TestDefault:
    def test_node_level_arguments_are_split_in_order(self):
        mask = torch.arange(7 * 12.0).view(7, 12)
        blocks = given(torch.zeros(7, 12), mask, groups=3)
        for i, (piece,) in enumerate(blocks):
            assert torch.equal(piece, mask[:, 4 * i : 4 * i + 4])

    @pytest.mark.parametrize(
        "argument",
        [
            torch.zeros(9, 8),  # an edge attribute whose width happens to match
            torch.zeros(7, 4),
            torch.zeros(7, 1),
            torch.zeros(9),
            torch.zeros(7),
            torch.tensor(2.0),
            torch.zeros(8, 7),
        ],
        ids=lambda t: str(list(t.shape)),
    )
    def test_other_tensors_are_whole(self, argument):
        for (piece,) in given(torch.zeros(7, 8), argument):
            assert piece is argument

    @pytest.mark.parametrize(
        "argument", [None, "mean", 3, 2.5, (1, 2), {"a": 1}, object()], ids=lambda a: type(a).__name__
    )
    def test_other_things_are_whole(self, argument):
        for (piece,) in given(torch.zeros(7, 8), argument):
            assert piece is argument

    def test_integers_too(self):
        assert shapes(torch.zeros(7, 8), torch.zeros(7, 8, dtype=torch.int64)) == [[7, 4]]

    @pytest.mark.parametrize(
        ("shape", "expected"), [((2, 6, 5), [2, 3, 5]), ((2, 6), [2, 3]), ((2, 5, 6), [2, 5, 6]), ((2,), [2])]
    )
    def test_another_split_dim(self, shape, expected):
        assert shapes(torch.zeros(2, 6, 5), torch.zeros(shape), split_dim=1) == [expected]

    def test_a_vector_is_never_cut_along_the_nodes(self):
        assert shapes(torch.zeros(8, 8), torch.zeros(8)) == [[8]]

    def test_the_graph_is_never_split(self):
        class Check(nn.Module):
            def forward(self, x: Tensor, graph: Tensor) -> Tensor:
                assert graph is dense
                return x

        dense = torch.eye(8)
        GroupAddRev(Check(), num_groups=2)(torch.zeros(8, 8), dense)


class TestExplicit:
    def test_positions(self):
        x, node, edge = torch.zeros(7, 8), torch.zeros(7, 8), torch.zeros(9, 8)
        assert shapes(x, node, edge, node, chunk_args=(1,)) == [[7, 8], [9, 4], [7, 8]]
        assert shapes(x, node, edge, node, chunk_args=[0, 2]) == [[7, 4], [9, 8], [7, 4]]
        assert shapes(x, node, edge, node, chunk_args=()) == [[7, 8], [9, 8], [7, 8]]

    def test_none_at_a_position(self):
        assert given(torch.zeros(7, 8), None, chunk_args=(0,)) == [(None,), (None,)]

    def test_group_rev_res(self):
        class First(nn.Module):
            def forward(self, g: None, x: Tensor, mask: Tensor, edge: Tensor) -> Tensor:
                assert mask.shape == (7, 4)
                assert edge.shape == (7, 8)
                return x

        layer = GroupRevRes(First(), 2, chunk_args=(0,))
        assert layer(None, torch.zeros(7, 8), torch.zeros(7, 8), torch.zeros(7, 8)).shape == (7, 8)

    @pytest.mark.parametrize("width", [1, 3])
    def test_size_not_divisible_is_an_error(self, width):
        with pytest.raises(ValueError, match=rf"got.*{width}"):
            given(torch.zeros(7, 8), torch.zeros(7, width), chunk_args=(0,))

    def test_a_scalar_cannot_be_split(self):
        with pytest.raises(ValueError, match="split_dim"):
            given(torch.zeros(7, 8), torch.tensor(2.0), chunk_args=(0,))

    @pytest.mark.parametrize("position", [-1, 1])
    def test_positions_out_of_range_are_an_error(self, position):
        with pytest.raises(ValueError, match="chunk_args"):
            given(torch.zeros(7, 8), torch.zeros(7, 8), chunk_args=(position,))


class Weighted(nn.Module):
    """Messages weighted by edge weights, shifted by an edge attribute, with a gate for each node and feature."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.edge = nn.Linear(width, channels)
        self.dropout = nn.Dropout(0.4)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        gate: Tensor | None = None,
        weight: Tensor | None = None,
        attribute: Tensor | None = None,
    ) -> Tensor:
        message = self.linear(x)[edge_index[0]]
        if attribute is not None:
            message = message + self.edge(attribute)
        message = self.dropout(message.tanh())
        if weight is not None:
            message = message * weight.unsqueeze(-1)
        out = torch.zeros_like(x).index_add(0, edge_index[1], message)
        return out if gate is None else out * gate


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("present", ["all", "gate", "weight", "attribute", "none"])
@pytest.mark.parametrize("leaf", [True, False])
def test_arguments_that_require_grad(groups, present, leaf, naive, same_training, edge_index, features):
    torch.manual_seed(0)
    width = 4 * groups
    layers = nn.ModuleList(
        GroupAddRev(nn.ModuleList(Weighted(4, width) for _ in range(groups))) for _ in range(3)
    ).double()
    x = features(width)
    leaves = {
        "gate": torch.rand_like(x).requires_grad_(),
        "weight": torch.rand(9, dtype=torch.float64, requires_grad=True),
        "attribute": torch.randn(9, width, dtype=torch.float64, requires_grad=True),
    }

    def arguments() -> list[Tensor | None]:
        chosen = [t if present in (name, "all") else None for name, t in leaves.items()]
        return chosen if leaf else [None if t is None else t.exp() for t in chosen]

    def run() -> Tensor:
        args, h = arguments(), x * 1
        for layer in layers:
            h = layer(h, edge_index, *args)
        return h

    def plain() -> Tensor:
        gate, weight, attribute = arguments()
        gates = [None] * groups if gate is None else [gate[:, 4 * i : 4 * i + 4] for i in range(groups)]
        h = x
        for layer in layers:
            h = naive(layer.convs, h, edge_index, gates, [weight] * groups, [attribute] * groups)
        return h

    same_training(run, plain, [x, *leaves.values(), *layers.parameters()])
    args = arguments()
    layers.eval()
    y = layers[0](x, edge_index, *args)
    torch.testing.assert_close(layers[0].inverse(y, edge_index, *args), x, rtol=1e-12, atol=1e-12)


def test_edge_weights_that_one_layer_makes_for_the_next(naive, same_training, edge_index, features):
    layers = nn.ModuleList(GroupAddRev(Weighted(4, 8), num_groups=2) for _ in range(2)).double()
    x = features(8)

    def run(call):
        h = call(layers[0], x * 1, None)
        weight = (h[edge_index[0]] * h[edge_index[1]]).sum(-1).sigmoid()
        return call(layers[1], h, weight)

    same_training(
        lambda: run(lambda layer, h, w: layer(h, edge_index, None, w)),
        lambda: run(lambda layer, h, w: naive(layer.convs, h, edge_index, [None] * 2, [w] * 2)),
        [x, *layers.parameters()],
    )


def test_argument_changed_in_place_before_backward(edge_index, features):
    layer = GroupAddRev(Weighted(4, 8), num_groups=2).double()
    gate = torch.rand(7, 8, dtype=torch.float64)
    y = layer(features(8), edge_index, gate)
    gate.mul_(2)
    with pytest.raises(RuntimeError, match=r"(?s)Weighted.*was changed in place"):
        y.sum().backward()


class Keyed(nn.Module):
    """A block of a keyword tensor beside positional ones."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, graph: Any, weight: Any = None, *, mask: Any = None, factor: float = 1.0) -> Tensor:
        self.seen.append(tuple(mask.shape) if mask is not None else ())
        h = self.linear(x if weight is None else x * weight).tanh() * factor
        return h if mask is None else h * mask


class ByGraph(Keyed):
    """The same with the graph first."""

    def forward(self, graph: Any, x: Tensor, weight: Any = None, *, mask: Any = None, factor: float = 1.0) -> Tensor:
        return super().forward(x, graph, weight, mask=mask, factor=factor)


class TestKeywords:
    @pytest.fixture(autouse=True)
    def _seed(self):
        torch.manual_seed(0)

    @pytest.mark.parametrize("kind", ["add", "res"])
    @pytest.mark.parametrize("fuse", [True, False])
    @pytest.mark.parametrize("disable", [False, True])
    def test_gradients_and_inverse(self, kind, fuse, disable):
        if kind == "add":
            layer = GroupAddRev(Keyed(4), num_groups=3, fuse=fuse, disable=disable).double()
            blocks = list(layer.convs)

            def run(x, *args, **kwargs):
                return layer(x, None, *args, **kwargs)

            def back(y, *args, **kwargs):
                return layer.inverse(y, None, *args, **kwargs)
        else:
            layer = GroupRevRes(ByGraph(4), groups=3, disable=disable).double()
            blocks = list(layer.gnn_modules)

            def run(x, *args, **kwargs):
                return layer(None, x, *args, **kwargs)

            def back(y, *args, **kwargs):
                return layer.inverse(None, y, *args, **kwargs)

        x, mask = torch.randn(7, 12).double().requires_grad_(), torch.rand(7, 12).double().requires_grad_()
        weight = torch.rand(7, 1).double().requires_grad_()

        def naive():
            z, outputs = x[:, 4:8] + x[:, 8:], []
            for i, block in enumerate(blocks):
                part = slice(4 * i, 4 * i + 4)
                z = (block.linear(z * weight).tanh() * 0.5) * mask[:, part] + x[:, part]
                outputs.append(z)
            return torch.cat(outputs, 1)

        wanted = [x, mask, weight, *layer.parameters()]
        expected = torch.autograd.grad(naive().sin().sum(), wanted)
        found = torch.autograd.grad(run(x * 1, weight, mask=mask, factor=0.5).sin().sum(), wanted)
        torch.testing.assert_close(found, expected)
        assert all(shape == (7, 4) for block in blocks for shape in block.seen)
        y = run(x, weight=weight, mask=mask, factor=0.5)
        torch.testing.assert_close(back(y, weight=weight, mask=mask, factor=0.5), x)
        found = torch.autograd.grad(back(y.detach() * 1, weight, mask=mask).sum(), [mask, *layer.parameters()])
        assert all(torch.isfinite(gradient).all() for gradient in found)

    def test_which_keyword_tensors_are_split_can_be_named(self):
        layer = GroupAddRev(Keyed(4), num_groups=2, chunk_args=("mask",))
        mask = torch.rand(1, 8)  # not as many rows as x
        layer(torch.randn(5, 8), None, mask=mask)
        assert layer.convs[0].seen[-1] == (1, 4)
        whole = GroupAddRev(Keyed(4), num_groups=2, chunk_args=())
        whole(torch.randn(5, 8), None, mask=torch.rand(5, 4))
        assert whole.convs[0].seen[-1] == (5, 4)
        with pytest.raises(ValueError, match=r"chunk_args=\['mask'\] names positions \(from 0\) or keywords"):
            layer(torch.randn(5, 8), None, factor=2.0)
        with pytest.raises(ValueError, match="argument 'mask' is to be split over 2 groups"):
            layer(torch.randn(5, 8), None, mask=torch.rand(5, 7))

    def test_a_keyword_that_blocks_do_not_take(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'maks'"):
            GroupAddRev(Keyed(4), num_groups=2)(torch.randn(5, 8), None, maks=torch.rand(5, 8))

    def test_an_invertible_module(self):
        class Scale(InvertibleModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(3, 4)

            def _forward(self, x, *, given):
                return x * self.net(given).tanh().exp()

            def _inverse(self, y, *, given):
                return y * (-self.net(given).tanh()).exp()

        layer = Scale().double()
        x, given = torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 3).double().requires_grad_()
        wanted = [x, given, *layer.parameters()]
        found = torch.autograd.grad(layer(layer(x * 1, given=given), given=given).sin().sum(), wanted)
        layer.disable = True
        expected = torch.autograd.grad(layer(layer(x * 1, given=given), given=given).sin().sum(), wanted)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(layer.inverse(layer(x, given=given), given=given), x)
        layer.disable = False
        assert check_invertible(layer, x.detach(), given=given.detach())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["add", "res"])
def test_under_autocast_the_stream_is_as_wide_as_the_parameters(kind, wide, half):
    layer = GroupAddRev(Keyed(4), num_groups=2) if kind == "add" else GroupRevRes(ByGraph(4))
    layer.to(wide)
    x = torch.randn(6, 8).to(half)
    order = (lambda x: (x, None)) if kind == "add" else (lambda x: (None, x))
    with torch.autocast("cpu", half):
        kept = None
        for disable in (True, False):
            layer.disable = disable
            y = layer(*order(x))
            assert y.dtype == wide
            assert layer.inverse(*order(y)).dtype == wide
            assert kept is None or torch.equal(y, kept)
            kept = y
    assert layer.to(half)(*order(x)).dtype == half
