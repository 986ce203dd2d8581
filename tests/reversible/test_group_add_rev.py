"""`GroupAddRev` computes the paper's equations, inverts them, and trains as plain autograd does."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import recollect
from recollect.memory import peak_memory
from recollect.reversible import GroupAddRev

pyg = pytest.importorskip("torch_geometric.nn")

CONVS = {
    "sage": lambda c: pyg.SAGEConv(c, c),
    "gcn": lambda c: pyg.GCNConv(c, c),
    "gcn-cached": lambda c: pyg.GCNConv(c, c, cached=True),
    "gin": lambda c: pyg.GINConv(
        nn.Sequential(nn.Linear(c, c), nn.BatchNorm1d(c), nn.ReLU(), nn.Linear(c, c)), 0.1, True
    ),
    "gat": lambda c: pyg.GATConv(c, c // 2, heads=2, dropout=0.4),
    "gen": lambda c: pyg.GENConv(c, c, learn_t=True, learn_msg_scale=True, msg_norm=True),
    "graphconv": lambda c: pyg.GraphConv(c, c, aggr="max"),
}


def tensors(x: Tensor, layer: nn.Module) -> list[Tensor]:
    return [x, *(p for p in layer.parameters() if p.requires_grad)]


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("name", CONVS)
def test_every_conv_and_number_of_groups(name, groups, naive, same_training, edge_index, features):
    torch.manual_seed(0)
    layer = GroupAddRev(CONVS[name](4), num_groups=groups).double()
    x = features(4 * groups)
    assert layer.num_groups == groups
    same_training(lambda: layer(x, edge_index), lambda: naive(layer.convs, x, edge_index), tensors(x, layer))
    layer.eval()
    same_training(lambda: layer(x, edge_index), lambda: naive(layer.convs, x, edge_index), tensors(x, layer))
    y = layer(x, edge_index)
    torch.testing.assert_close(layer.inverse(y, edge_index), x, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer.inverse(layer(x, edge_index), edge_index), x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(layer.inverse(x, edge_index), edge_index), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("disable", [False, True])
def test_fused_convolutions_make_no_row_for_each_edge(disable):
    """A step of one layer; the messages of one group alone would be 30 times its features."""
    nodes = 300
    x, edge_index = torch.randn(nodes, 64, requires_grad=True), torch.randint(nodes, (2, 30 * nodes))
    group = x.untyped_storage().nbytes() / 2
    fused = GroupAddRev(pyg.SAGEConv(32, 32), num_groups=2, disable=disable)
    plain = GroupAddRev(fused.convs, fuse=False)
    peaks, gradients = [], []
    for layer in (fused, plain):
        layer(x, edge_index)  # sorts the edges
        with peak_memory("cpu") as memory:
            gradients.append(torch.autograd.grad(layer(x, edge_index).sin().sum(), [x, *fused.parameters()]))
        peaks.append(memory.peak_bytes / group)
    torch.testing.assert_close(*gradients)
    assert peaks[0] < 25
    assert peaks[1] > 30


def test_by_hand():
    # X = (1, 2, 3), X'_0 = 5, f_i(z) = i z: X'_1 = 5 + 1, X'_2 = 12 + 2, X'_3 = 42 + 3
    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor, graph: None) -> Tensor:
            return self.factor * x

    layer = GroupAddRev(nn.ModuleList([Times(1.0), Times(2.0), Times(3.0)]))
    x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    y = layer(x, None)
    assert y.tolist() == [[6.0, 14.0, 45.0]]
    y[0, 2].backward()
    # X'_3 = X_3 + 3 (X_2 + 2 (X_1 + X_2 + X_3))
    assert x.grad.tolist() == [[6.0, 9.0, 7.0]]
    assert layer.inverse(y, None).tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("dim", [1, -2])
def test_another_split_dim(dim, naive, same_training):
    class Convolve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 3, padding=1)

        def forward(self, x: Tensor, graph: None, gate: Tensor, bias: Tensor) -> Tensor:
            return self.conv(x).tanh() * gate + bias

    torch.manual_seed(0)
    layer = GroupAddRev(nn.ModuleList([Convolve(), Convolve()]), split_dim=dim).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, 6, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    pieces = [gate[:, :3], gate[:, 3:]]
    same_training(
        lambda: layer(x, None, gate, bias),
        lambda: naive(layer.convs, x, None, pieces, [bias, bias], dim=1),
        [gate, bias, *tensors(x, layer)],
    )
    torch.testing.assert_close(layer.inverse(layer(x, None, gate, bias), None, gate, bias), x)


class Constant(nn.Module):
    """A block without parameters."""

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        return x.sin()


class Same(nn.Module):
    """A block that returns the very tensor that it gets."""

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        return x


class Detached(nn.Module):
    """A block whose output has no history."""

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        return x.detach().sin()


def frozen(block: nn.Module) -> nn.Module:
    return block.requires_grad_(False)


def hazards(block: type[nn.Module]) -> dict[str, list[nn.Module]]:
    one = block(4)
    return {
        "no parameters": [Constant(), Constant()],
        "identity": [Same(), Same()],
        "detached": [block(4), Detached(), block(4)],
        "frozen": [frozen(block(4)), frozen(block(4))],
        "half frozen": [frozen(block(4)), block(4), frozen(block(4))],
        "partly frozen": [block(4, nn.Linear(4, 4).requires_grad_(False)), block(4)],
        "dropout": [block(4, nn.Dropout(0.5)), block(4, nn.Dropout(0.3)), block(4, nn.Dropout(0.7))],
        "alpha dropout": [block(4, nn.AlphaDropout(0.5)), block(4)],
        "rrelu": [block(4, nn.RReLU()), block(4, nn.RReLU())],
        "batch norm": [block(4, nn.BatchNorm1d(4)), block(4, nn.BatchNorm1d(4), nn.Dropout(0.5))],
        "batch norm without statistics": [block(4, nn.BatchNorm1d(4, track_running_stats=False)), block(4)],
        "in place after the linear": [block(4, nn.ReLU(inplace=True), nn.Dropout(0.5)), block(4)],
        "the same block twice": [one, one],
    }


HAZARDS = [
    "no parameters", "identity", "detached", "frozen", "half frozen", "partly frozen", "dropout", "alpha dropout",
    "rrelu", "batch norm", "batch norm without statistics", "in place after the linear", "the same block twice",
]  # fmt: skip


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("hazard", HAZARDS)
def test_hazards_train_as_plain(hazard, leaf, depth, block, naive, same_training, edge_index, features):
    torch.manual_seed(0)
    layers = nn.ModuleList(GroupAddRev(nn.ModuleList(hazards(block)[hazard])) for _ in range(depth)).double()
    x = features(4 * layers[0].num_groups)

    def run(call):
        h = x if leaf else x * 1.5
        for layer in layers:
            h = call(layer, h)
        return h

    same_training(
        lambda: run(lambda layer, h: layer(h, edge_index)),
        lambda: run(lambda layer, h: naive(layer.convs, h, edge_index)),
        tensors(x, layers),
    )


def test_input_without_grad(block, naive, same_training, edge_index, features):
    layer = GroupAddRev(block(4, nn.Dropout(0.5)), num_groups=2).double()
    x = features(8, grad=False)
    same_training(lambda: layer(x, edge_index), lambda: naive(layer.convs, x, edge_index), list(layer.parameters()))


def test_nothing_requires_grad(block, edge_index, features):
    layer = GroupAddRev(frozen(block(4)), num_groups=2).double()
    assert not layer(features(8, grad=False), edge_index).requires_grad


@pytest.mark.parametrize(
    "before",
    [
        lambda x: x[:, 1:9],
        lambda x: x[:, ::2][:, :8],
        lambda x: x.t().contiguous().t()[:, :8],
        lambda x: x.view(2, -1).view_as(x)[:, :8],
        lambda x: x.sigmoid()[:, :8],
        lambda x: x.chunk(2, 1)[1],
        lambda x: x[:1, :8].expand(7, 8),
    ],
    ids=["slice", "stride", "transposed", "view", "saved by the operation before", "chunk", "expanded"],
)
def test_views_and_layouts_of_the_input(before, block, naive, same_training, edge_index, features):
    layer = GroupAddRev(block(4, nn.Dropout(0.5)), num_groups=2).double()
    x = features(16)
    base = x.detach().clone()
    same_training(
        lambda: layer(before(x * 1), edge_index), lambda: naive(layer.convs, before(x), edge_index), tensors(x, layer)
    )
    assert torch.equal(x, base)
    y = layer.eval()(before(x), edge_index)
    torch.testing.assert_close(layer.inverse(y, edge_index), before(x))


@pytest.mark.parametrize("groups", [2, 3])
def test_skip_connections_and_branches(groups, block, naive, same_training, edge_index, features):
    a, b, c = (GroupAddRev(block(4, nn.Dropout(0.5)), num_groups=groups).double() for _ in range(3))
    x = features(4 * groups)

    def run(call):
        h = x * 2
        one = call(a, h) + h  # around a block
        two = call(b, one)
        three = call(c, one)  # a second consumer
        four = call(b, two)  # the same layer again
        return torch.cat([one, two, three.exp(), four, h], -1)

    same_training(
        lambda: run(lambda layer, h: layer(h, edge_index)),
        lambda: run(lambda layer, h: naive(layer.convs, h, edge_index)),
        tensors(x, nn.ModuleList([a, b, c])),
    )


def test_layers_of_different_groups_and_dimensions(block, naive, same_training):
    first, second = GroupAddRev(block(6), num_groups=2).double(), GroupAddRev(block(4), num_groups=3).double()
    third = GroupAddRev(nn.ModuleList([block(12), block(12)]), split_dim=0).double()
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    layers = nn.ModuleList([first, second, third])
    same_training(
        lambda: third(second(first(x, None), None), None),
        lambda: naive(third.convs, naive(second.convs, naive(first.convs, x, None), None), None, dim=0),
        tensors(x, layers),
    )


@pytest.mark.parametrize("disable", [False, True])
def test_first_and_second_derivatives_against_finite_differences(disable, block, edge_index):
    layer = GroupAddRev(block(2), num_groups=2, disable=disable).double()
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, edge_index), tensors(x, layer))
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x, edge_index), tensors(x, layer))


class TestBuffers:
    """State that a block changes in its forward changes once a step."""

    def test_batch_norm(self, block, naive, edge_index, features):
        layer = GroupAddRev(block(4, nn.BatchNorm1d(4)), num_groups=2).double()
        plain = copy.deepcopy(layer)
        x = features(8)
        for step in range(1, 4):
            layer(layer(x * step, edge_index), edge_index).sin().sum().backward()
            naive(plain.convs, naive(plain.convs, x * step, edge_index), edge_index).sin().sum().backward()
            for found, expected in zip(layer.convs, plain.convs, strict=True):
                assert int(found.after[0].num_batches_tracked) == 2 * step
                assert torch.equal(found.after[0].running_mean, expected.after[0].running_mean)
                assert torch.equal(found.after[0].running_var, expected.after[0].running_var)

    def test_spectral_norm(self, block, naive, edge_index, features):
        layers = [
            GroupAddRev(nn.ModuleList([block(4, spectral_norm(nn.Linear(4, 4))) for _ in range(2)])) for _ in "ab"
        ]
        chain = nn.ModuleList(layers).double()
        plain, x = copy.deepcopy(chain), features(8)
        y = chain[1](chain[0](x, edge_index), edge_index)
        expected = naive(plain[1].convs, naive(plain[0].convs, x, edge_index), edge_index)
        assert torch.equal(y, expected)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        for found, wanted in zip(chain.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-14)
        for found, wanted in zip(chain.buffers(), plain.buffers(), strict=True):
            assert torch.equal(found, wanted)

    def test_random_stream_goes_on_as_in_plain(self, block, edge_index, features):
        layer = GroupAddRev(block(4, nn.Dropout(0.5)), num_groups=2).double()
        states = []
        for layer.disable in (False, True):
            torch.manual_seed(3)
            layer(layer(features(8), edge_index), edge_index).sin().sum().backward()
            states.append(torch.get_rng_state())
        assert torch.equal(*states)

    def test_training_flags_of_the_forward(self, block, naive, edge_index, features):
        layer = GroupAddRev(block(4, nn.Dropout(0.5), nn.BatchNorm1d(4)), num_groups=2).double()
        x, gradients = features(8), []
        for call in (layer, lambda x, e: naive(layer.convs, x, e)):
            layer.train()
            torch.manual_seed(3)
            y = call(x * 1, edge_index)
            layer.eval()
            gradients.append(torch.autograd.grad(y.sin().sum(), tensors(x, layer)))
        for found, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


class TestModule:
    def test_copies_have_parameters_of_their_own(self, block):
        seed = block(4)
        layer = GroupAddRev(seed, num_groups=3)
        assert layer.convs[0] is seed
        weights = [conv.linear.weight for conv in layer.convs]
        assert len({id(w) for w in weights}) == 3
        assert not torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])

    def test_module_list_is_taken_as_it_is(self, block):
        blocks = nn.ModuleList([block(4), block(4)])
        assert GroupAddRev(blocks).convs is blocks
        assert GroupAddRev(blocks, num_groups=2).num_groups == 2

    def test_reset_parameters(self, block):
        layer = GroupAddRev(block(4), num_groups=2)
        before = [p.clone() for p in layer.parameters()]
        layer.reset_parameters()
        assert not any(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))

    def test_reset_parameters_passes_over_blocks_without(self):
        GroupAddRev(Constant(), num_groups=2).reset_parameters()

    def test_repr(self):
        assert repr(GroupAddRev(pyg.SAGEConv(16, 16), num_groups=2)) == (
            "GroupAddRev(SAGEConv(16, 16, aggr=mean), num_groups=2)"
        )

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "state_dict"])
    def test_copies_of_a_used_layer_train_alike(self, how, block, same_training, edge_index, features):
        layer = GroupAddRev(block(4, nn.BatchNorm1d(4), nn.Dropout(0.5)), num_groups=2).double()
        x = features(8)
        layer(x, edge_index).sin().sum().backward()
        assert layer.last_drift is not None
        if how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        elif how == "save":
            torch.save(layer, buffer := io.BytesIO())
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        else:
            other = GroupAddRev(block(4, nn.BatchNorm1d(4), nn.Dropout(0.5)), num_groups=2).double()
            other.load_state_dict(layer.state_dict())
        assert not {id(p) for p in layer.parameters()} & {id(p) for p in other.parameters()}
        same = [p.detach() for p in layer.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(same, other.parameters(), strict=True))
        torch.manual_seed(1)
        expected = torch.autograd.grad(layer(x, edge_index).sin().sum(), tensors(x, layer))
        torch.manual_seed(1)
        found = torch.autograd.grad(other(x, edge_index).sin().sum(), tensors(x, other))
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e)

    def test_state_dict_is_that_of_the_blocks(self, block):
        layer = GroupAddRev(block(4, nn.BatchNorm1d(4)), num_groups=2)
        assert set(layer.state_dict()) == {f"convs.{k}" for k in layer.convs.state_dict()}

    def test_parameters_swapped_for_the_call(self, block, same_training, edge_index, features):
        layer = GroupAddRev(block(4), num_groups=2).double()
        x, scale = features(8), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

        def run(disable):
            layer.disable = disable
            scaled = {name: p.detach() * scale for name, p in layer.named_parameters()}
            return torch.func.functional_call(layer, scaled, (x, edge_index))

        same_training(lambda: run(False), lambda: run(True), [x, scale])

    def test_hooks_on_blocks(self, block, same_training, edge_index, features):
        layer, calls = GroupAddRev(block(4), num_groups=2).double(), []
        layer.convs[0].register_full_backward_hook(lambda *_: calls.append(1))
        x = features(8)

        def run(disable):
            layer.disable = disable
            return layer(layer(x, edge_index), edge_index)

        same_training(lambda: run(False), lambda: run(True), tensors(x, layer))
        assert len(calls) == 4  # once for each call in each of the two runs, none for rebuilds


class TestInverse:
    def test_trains_as_plain(self, block, naive, same_training, edge_index, features):
        layer = GroupAddRev(block(4, nn.BatchNorm1d(4)), num_groups=3).double()
        y = features(12)

        def plain():
            a, b, c = y.chunk(3, -1)
            c = c - layer.convs[2](b, edge_index)
            b = b - layer.convs[1](a, edge_index)
            return torch.cat([a - layer.convs[0](b + c, edge_index), b, c], -1)

        same_training(lambda: layer.inverse(y * 1, edge_index), plain, tensors(y, layer))

    def test_trains_as_plain_with_dropout(self, block, same_training, edge_index, features):
        layer = GroupAddRev(block(4, nn.Dropout(0.5)), num_groups=2).double()
        y = features(8)

        def run(disable):
            layer.disable = disable
            return layer.inverse(y * 1, edge_index)

        same_training(lambda: run(False), lambda: run(True), tensors(y, layer))

    def test_of_forward_is_the_identity_for_autograd(self, block, edge_index, features):
        layer = GroupAddRev(block(4), num_groups=2).double()
        x = features(8)
        weights = torch.randn_like(x)
        (layer.inverse(layer(x * 1, edge_index), edge_index) * weights).sum().backward()
        torch.testing.assert_close(x.grad, weights)
        assert max(float(p.grad.abs().max()) for p in layer.parameters()) < 1e-12


class TestErrors:
    @pytest.mark.parametrize("groups", [1, 0])
    def test_fewer_than_two_groups(self, groups, block):
        with pytest.raises(ValueError, match="should not be smaller than 2"):
            GroupAddRev(block(4), num_groups=groups)

    def test_short_module_list(self, block):
        with pytest.raises(ValueError, match=r"should not be smaller than 2 \(got 1\)"):
            GroupAddRev(nn.ModuleList([block(4)]))

    def test_names_the_number_of_groups_that_was_given(self, block):
        with pytest.raises(ValueError, match=r"got 0"):
            GroupAddRev(block(4), num_groups=0)

    def test_missing_num_groups(self, block):
        with pytest.raises(ValueError, match="num_groups is missing"):
            GroupAddRev(block(4))

    def test_contradicting_num_groups(self, block):
        with pytest.raises(ValueError, match="num_groups=3, but the ModuleList has 2 blocks"):
            GroupAddRev(nn.ModuleList([block(4), block(4)]), num_groups=3)

    @pytest.mark.parametrize(("channels", "groups", "allowed"), [(9, 2, "8 or 10"), (7, 3, "6 or 9"), (3, 4, "4")])
    def test_channels_not_divisible(self, channels, groups, allowed, block, features, edge_index):
        layer = GroupAddRev(block(4), num_groups=groups)
        with pytest.raises(ValueError, match=rf"groups, {groups} \(got {channels}\); the nearest allowed: {allowed}$"):
            layer(features(channels), edge_index)
        with pytest.raises(ValueError, match=rf"\(got {channels}\)"):
            layer.inverse(features(channels), edge_index)

    @pytest.mark.parametrize("disable", [False, True])
    @pytest.mark.parametrize("out", [1, 5])  # 1 would broadcast
    def test_output_of_another_shape(self, out, disable, edge_index):
        layer = GroupAddRev(pyg.SAGEConv(4, out), num_groups=2, disable=disable)
        with pytest.raises(ValueError, match=rf"SAGEConv\(4, {out}, aggr=mean\).*shape \[7, 4\], got \[7, {out}\]"):
            layer(torch.randn(7, 8), edge_index)

    def test_output_of_fewer_rows(self):
        class Half(nn.Module):
            def forward(self, x, graph):
                return x[::2]

        with pytest.raises(ValueError, match=r"shape \[6, 4\], got \[3, 4\]\n"):  # and nothing of channels
            GroupAddRev(Half(), num_groups=2)(torch.randn(6, 8), None)

    @pytest.mark.parametrize(
        ("conv", "found"),
        [
            (lambda: [nn.Identity(), nn.Identity()], "a list"),
            (lambda: pyg.SAGEConv, "the class SAGEConv itself"),
            (lambda: lambda channels: nn.Identity(), "a function"),
        ],
    )
    def test_conv_that_is_no_module(self, conv, found):
        with pytest.raises(TypeError, match=rf"conv must be a module, or a torch.nn.ModuleList .*\(got {found}\)"):
            GroupAddRev(conv(), num_groups=2)

    @pytest.mark.parametrize("number", ["2", 2.0])
    def test_a_number_of_groups_that_is_no_integer(self, number):
        with pytest.raises(TypeError, match=f"number of groups must be an integer .got {number!r}"):
            GroupAddRev(nn.Identity(), num_groups=number)

    def test_output_that_is_no_tensor(self):
        class Pair(nn.Module):
            def forward(self, x, graph):
                return x, x

        with pytest.raises(ValueError, match=r"Pair\(\).*got tuple"):
            GroupAddRev(Pair(), num_groups=2)(torch.randn(7, 8), None)

    def test_x_is_no_tensor(self, block):
        with pytest.raises(TypeError, match="x must be a tensor"):
            GroupAddRev(block(4), num_groups=2)([1.0, 2.0], None)

    def test_split_dim_out_of_range(self, block):
        with pytest.raises(ValueError, match=r"split_dim=2 of an x of shape \[7, 8\]"):
            GroupAddRev(block(4), split_dim=2, num_groups=2)(torch.randn(7, 8), None)

    @pytest.mark.parametrize("option", ["num_bwd_passes", "anchor_every"])
    def test_counts_below_one(self, option, block):
        with pytest.raises(ValueError, match=rf"{option} must be at least 1, or None \(got 0\)"):
            GroupAddRev(block(4), num_groups=2, **{option: 0})

    @pytest.mark.parametrize(
        "mode",
        [
            torch.enable_grad,
            torch.no_grad,
            pytest.param(
                torch.inference_mode,
                marks=pytest.mark.xfail(
                    strict=True,
                    reason="inference tensors have no version: another group's output is overwritten without a word",
                    raises=pytest.fail.Exception,
                ),
            ),
        ],
    )
    def test_block_that_changes_its_input_in_place(self, mode):
        class Greedy(nn.Module):
            def forward(self, x, graph):
                return x.relu_().sin()

        with mode(), pytest.raises(RuntimeError, match=r"Greedy\(\): the block changed its own input in place"):
            GroupAddRev(Greedy(), num_groups=2)(torch.randn(7, 8), None)

    def test_graph_changed_in_place_before_backward(self, edge_index):
        layer = GroupAddRev(pyg.SAGEConv(4, 4), num_groups=2)
        y = layer(torch.randn(7, 8), edge_index)
        edge_index[0, 0] = 2
        with pytest.raises(RuntimeError, match=r"SAGEConv\(4, 4, aggr=mean\).*\[2, 9\] was changed in place"):
            y.sum().backward()

    def test_block_that_fails_leaves_nothing_behind(self, block, same_training, naive, edge_index, features):
        layer, x = GroupAddRev(block(4, nn.Dropout(0.5)), num_groups=2).double(), features(8)
        handle = layer.convs[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer(x, edge_index)
        handle.remove()
        # Before the forward: a rebuild runs no hooks that came later.
        handle = layer.convs[0].register_forward_pre_hook(lambda *_: 1 / 0 if recollect.in_backward() else None)
        y = layer(x, edge_index)
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()
        handle.remove()
        same_training(lambda: layer(x, edge_index), lambda: naive(layer.convs, x, edge_index), tensors(x, layer))


class TestPasses:
    def test_any_number_by_default(self, block, edge_index, features):
        layer, x = GroupAddRev(block(4, nn.Dropout(0.5)), num_groups=2).double(), features(8)
        loss = layer(layer(x * 1, edge_index), edge_index).sin().sum()
        first, *others = (torch.autograd.grad(loss, tensors(x, layer), retain_graph=True) for _ in range(3))
        for other in others:
            for f, o in zip(first, other, strict=True):
                torch.testing.assert_close(f, o, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("allowed", [1, 2])
    def test_an_integer_is_enforced(self, allowed, block, edge_index, features):
        layer = GroupAddRev(block(4), num_groups=2, num_bwd_passes=allowed).double()
        for _ in range(2):  # the count is of the graph, not of the module
            loss = layer(features(8), edge_index).sin().sum()
            for _ in range(allowed):
                loss.backward(retain_graph=True)
            with pytest.raises(RuntimeError, match=rf"GroupAddRev more than {allowed} time"):
                loss.backward(retain_graph=True)


def test_an_error_of_a_block_comes_with_the_width_that_it_gets():
    layer = GroupAddRev(nn.ModuleList(_Wide() for _ in range(2)))
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(4, 32), None)
    assert caught.value.__notes__ == ["GroupAddRev: each of the 2 blocks gets 16 of 32 channels."]


class _Wide(nn.Linear):
    """Made for all channels."""

    def __init__(self) -> None:
        super().__init__(32, 32)

    def forward(self, x: Tensor, graph: Any) -> Tensor:
        return super().forward(x)
