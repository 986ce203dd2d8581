"""Which extra arguments are split over the groups, and that those who require grad get it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recollect.reversible import GroupAddRev, GroupRevRes


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
