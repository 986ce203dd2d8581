"""`RevGNN` against itself with everything kept, and against its formula written out."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.autoscale import SubgraphLoader, partition, permute, to_adj_t
from recollect.frames import DriftGauge
from recollect.memory import peak_memory
from recollect.models import RevGNN
from recollect.models._dropout import dropout, dropout_mask

pyg = pytest.importorskip("torch_geometric.nn")

CONVS = ["gat", "gcn", "gen", "gin", "graphconv", "sage"]
NODES = 24


@pytest.fixture
def edge_index() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(NODES - 1, (2, 80), generator=generator)  # the last node is isolated


@pytest.fixture
def x() -> Tensor:
    return torch.randn(NODES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def classes() -> Tensor:
    return torch.arange(NODES) % 3


def make(layers: int = 4, **options: Any) -> RevGNN:
    torch.manual_seed(0)
    return RevGNN(5, options.pop("hidden", 16), 3, layers, **options).double()


def gradients(model: RevGNN, x: Tensor, edge_index: Tensor, *args: Any, disable: bool, wrt: Any = ()) -> list[Tensor]:
    model.disable = disable
    torch.manual_seed(7)
    logits = model(x, edge_index, *args)
    target = torch.arange(x.size(0)) % 3
    leaves = [*wrt, *model.parameters()]
    found = torch.autograd.grad(model.loss(logits, target), leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative error of the whole gradient, and of each tensor that is not zero to rounding."""
    total = torch.cat([e.flatten() for e in expected]).norm()
    assert total > 0
    return max(
        float((f - e).norm() / (e.norm() if e.norm() > 1e-4 * total else total))
        for f, e in zip(found, expected, strict=True)
    )


def compare(model: RevGNN, x: Tensor, edge_index: Tensor, *args: Any, wrt: Any = ()) -> float:
    expected = gradients(model, x, edge_index, *args, disable=True, wrt=wrt)
    return largest_error(gradients(model, x, edge_index, *args, disable=False, wrt=wrt), expected)


class TestFormula:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("groups", [2, 4])
    def test_written_out(self, groups, shared, tied, x, edge_index):
        model = make(3, num_groups=groups, dropout=0.4, shared_dropout=shared, tied=tied)
        channels = 16 // groups

        def plain() -> Tensor:
            h = model.project(x)
            mask = dropout_mask(h, 0.4) if shared else None
            for index in range(3):
                blocks = model.layers[0 if tied else index].convs
                groups_in = h.split(channels, -1)
                z, out = sum(groups_in[1:]), []
                for i, block in enumerate(blocks):
                    z = F.layer_norm(z, (channels,), block.norm.weight, block.norm.bias).relu()
                    z = dropout(z, 0.4) if mask is None else z * mask[:, i * channels : (i + 1) * channels]
                    z = groups_in[i] + block.conv(z, edge_index)
                    out.append(z)
                h = torch.cat(out, -1)
            h = F.layer_norm(h, (16,), model.norm.weight, model.norm.bias).relu()
            return model.head(dropout(h, 0.4))

        torch.manual_seed(3)
        expected = plain()
        torch.manual_seed(3)
        found = model(x, edge_index)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        leaves = list(model.parameters())
        wanted = torch.autograd.grad(expected.sin().sum(), leaves)
        assert largest_error(torch.autograd.grad(found.sin().sum(), leaves), wanted) <= 1e-10

    def test_evaluation_has_no_randomness(self, x, edge_index):
        model = make(dropout=0.5).eval()
        state = torch.get_rng_state()
        assert torch.equal(model(x, edge_index), model(x, edge_index))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("shared", [False, True])
    def test_training_has(self, shared, x, edge_index):
        model = make(dropout=0.5, shared_dropout=shared)
        assert not torch.equal(model(x, edge_index), model(x, edge_index))

    @pytest.mark.parametrize(("shared", "masks"), [(True, 1), (False, 4)])
    def test_one_mask_for_all_layers_or_one_for_each(self, shared, masks, edge_index):
        seen = []

        class Spy(nn.Module):
            def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
                seen.append((x == 0).detach())
                return torch.zeros_like(x)

        model = make(4, dropout=0.5, shared_dropout=shared, conv=lambda c: Spy(), norm=None)
        with torch.no_grad():  # the blocks' input is positive, so zeros are the mask
            model.project.weight.zero_()
            model.project.bias.fill_(1.0)
            model(torch.zeros(NODES, 5, dtype=torch.float64), edge_index)
        layers = [torch.cat(seen[2 * i : 2 * i + 2], -1) for i in range(4)]
        assert len({tuple(mask.flatten().tolist()) for mask in layers}) == masks
        assert 0.3 < float(layers[0].double().mean()) < 0.7
        assert not torch.equal(layers[0][:, :8], layers[0][:, 8:])


class TestGradients:
    @pytest.mark.parametrize("conv", CONVS)
    @pytest.mark.parametrize("norm", ["layer", "batch", None])
    def test_every_conv_and_norm(self, conv, norm, x, edge_index):
        model = make(conv=conv, norm=norm, dropout=0.3)
        assert compare(model, x, edge_index) <= 1e-10

    @pytest.mark.parametrize("groups", [2, 3, 4])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("tied", [False, True])
    def test_groups_dropout_and_ties(self, groups, shared, tied, x, edge_index):
        model = make(hidden=24, num_groups=groups, dropout=0.3, shared_dropout=shared, tied=tied)
        assert compare(model, x, edge_index) <= 1e-10

    @pytest.mark.parametrize(
        ("conv", "kwargs", "shape"),
        [
            ("gcn", {}, (80,)),
            ("graphconv", {}, (80,)),
            ("gen", {"edge_dim": 6}, (80, 6)),
            ("gen", {"edge_dim": 16}, (80, 16)),  # as wide as x is
            ("gat", {"edge_dim": 6}, (80, 6)),
        ],
    )
    def test_edge_arguments_that_require_grad(self, conv, kwargs, shape, x, edge_index):
        model = make(conv=conv, conv_kwargs=kwargs, dropout=0.3)
        extra = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        x.requires_grad_()
        assert compare(model, x, edge_index, extra, wrt=[extra, x]) <= 1e-10
        logits = model.eval()(x, edge_index, extra)
        assert not torch.allclose(logits, model(x, edge_index, torch.rand_like(extra)))

    def test_an_edge_argument_with_as_many_rows_as_nodes_is_whole(self, x):
        ring = torch.stack([torch.arange(NODES), torch.arange(NODES).roll(1)])
        model = make(conv="gen", conv_kwargs={"edge_dim": 16})
        assert compare(model, x, ring, torch.randn(NODES, 16, dtype=torch.float64)) <= 1e-10

    def test_none_among_the_arguments(self, x, edge_index):
        model = make(conv="gcn").eval()
        assert torch.equal(model(x, edge_index, None), model(x, edge_index))

    @pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
    @pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR format")
    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
    def test_sparse_graph(self, x, edge_index):
        from torch_geometric.utils import to_torch_coo_tensor

        adjacency = to_torch_coo_tensor(edge_index.unique(dim=1).flip(0), size=NODES).double().coalesce()
        model = make(conv=lambda c: pyg.GraphConv(c, c)).eval()
        expected = model(x, edge_index.unique(dim=1))
        torch.testing.assert_close(model(x, adjacency), expected, rtol=1e-12, atol=1e-12)
        assert compare(model, x, adjacency) <= 1e-10

    def test_frozen_layers(self, x, edge_index):
        model = make(6, dropout=0.3)
        model.layers[:3].requires_grad_(False)
        model.project.requires_grad_(False)
        found = []
        for model.disable in (True, False):
            torch.manual_seed(0)
            model.zero_grad()
            model(x, edge_index).sin().sum().backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
        assert largest_error(found[1], found[0]) <= 1e-10


class TestDepth:
    """The numbers to reach, at 64 layers with dropout on."""

    @pytest.mark.parametrize(  # any two of the three in each combination
        ("conv", "dtype", "tolerance", "shared"),
        [
            (conv, dtype, tolerance, (number + place) % 2 == 0)
            for number, conv in enumerate(CONVS)
            for place, (dtype, tolerance) in enumerate([(torch.float64, 1e-10), (torch.float32, 1e-5)])
        ],
    )
    def test_gradients(self, dtype, tolerance, conv, shared, x, edge_index):
        model = make(64, dropout=0.3, shared_dropout=shared, conv=conv).to(dtype)
        found = gradients(model, x.to(dtype), edge_index, disable=False)
        drift = model.last_drift
        expected = gradients(model, x.to(dtype), edge_index, disable=True)
        a, b = (torch.cat([g.flatten() for g in gs]).double() for gs in (found, expected))
        assert (a - b).norm() <= tolerance * b.norm()
        assert drift <= 10 * tolerance

    def test_float64_for_each_parameter_with_batch_norm(self, x, edge_index):
        assert compare(make(64, dropout=0.3, norm="batch"), x, edge_index) <= 1e-10

    @pytest.mark.parametrize(
        "options", [{}, {"shared_dropout": False}, {"norm": "batch"}, {"tied": True}, {"conv": "gcn"}]
    )
    def test_memory_is_flat(self, options):
        x, edge_index = torch.randn(500, 5), torch.randint(500, (2, 1500))

        def peak(layers: int, disable: bool = False) -> int:
            model = RevGNN(5, 32, 3, layers, dropout=0.3, disable=disable, **options)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with peak_memory("cpu") as memory:
                model.loss(model(x, edge_index), torch.zeros(500, dtype=torch.int64)).backward()
            return memory.peak_bytes

        peak(1)  # sorts the edges, which are kept
        assert peak(64) <= 1.05 * peak(8)
        assert peak(64, disable=True) > 4 * peak(8, disable=True)

    def test_112_layers_without_norm_warn_or_anchor(self, x, edge_index):
        model = make(112, norm=None).float()
        x = x.float()
        assert model.last_drift is None
        with pytest.warns(UserWarning, match=r"relative error of .*anchor_every=s"):
            found = gradients(model, x, edge_index, disable=False)
        assert model.last_drift > 1e-3
        expected = gradients(model, x, edge_index, disable=True)
        assert largest_error(found, expected) > 1e-3
        model = make(112, norm=None, anchor_every=8).float()
        found = gradients(model, x, edge_index, disable=False)  # warnings are errors
        assert 0 < model.last_drift < 1e-4
        assert largest_error(found, expected) < 1e-4

    @pytest.mark.parametrize("tied", [False, True])
    def test_last_drift_is_the_largest_of_the_anchors(self, tied, x, edge_index, monkeypatch):
        model = make(60, norm=None, anchor_every=20, tied=tied, conv=lambda c: _Raw(c)).float()
        with torch.no_grad():
            for parameter in model.layers.parameters():
                parameter.mul_(1.5)
        drifts = []

        def record(gauge, drift):
            drifts.append(drift)
            gauge.last = drift if gauge.last is None else max(gauge.last, drift)

        monkeypatch.setattr(DriftGauge, "record", record)
        gradients(model, x.float(), edge_index, disable=False)
        assert len(drifts) == 3
        assert model.last_drift == max(drifts)


class _Raw(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.linear(x)


class TestSwitch:
    def test_both_ways(self, x, edge_index):
        model = make(dropout=0.3)
        assert model.disable is False
        assert not any(layer.disable for layer in model.layers)
        evaluations = []
        model.layers[0].convs[0].conv.register_forward_pre_hook(lambda *_: evaluations.append(1))
        for value, count in ((True, 1), (False, 2), (True, 1)):
            model.disable = value
            assert model.disable is value
            evaluations.clear()
            model(x, edge_index).sum().backward()
            assert len(evaluations) == count
        assert make(disable=True).disable is True
        assert all(layer.disable for layer in make(disable=True).layers)

    def test_switched_between_forward_and_backward(self, x, edge_index):
        model = make(dropout=0.3)
        expected = gradients(model, x, edge_index, disable=True)
        model.disable = False
        torch.manual_seed(7)
        loss = model.loss(model(x, edge_index), torch.arange(NODES) % 3)
        model.disable = True
        assert largest_error(list(torch.autograd.grad(loss, list(model.parameters()))), expected) <= 1e-10

    def test_batch_norm_counts_steps(self, x, edge_index):
        model = make(3, norm="batch")
        plain = copy.deepcopy(model)
        plain.disable = True
        for _ in range(3):
            for each in (model, plain):
                each(x, edge_index).sin().sum().backward()
        buffers = dict(plain.named_buffers())
        assert buffers
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, buffers[name], rtol=1e-10, atol=1e-12)
            if name.endswith("num_batches_tracked"):
                assert int(buffer) == 3

    def test_block_evaluations(self, x, edge_index):
        model = make(5, num_groups=4)
        count = [0]
        for layer in model.layers:
            for block in layer.convs:
                block.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        model(x, edge_index).sum().backward()
        assert count == [2 * 5 * 4]
        with torch.no_grad():
            model(x, edge_index)
        assert count == [3 * 5 * 4]


class TestModule:
    @pytest.mark.parametrize("conv", CONVS)
    def test_reset_parameters_changes_all_that_is_drawn(self, conv):
        model = make(conv=conv, norm="batch", tied=True)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(77)
        model.reset_parameters()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert not (tensor == 77).any(), name

    def test_reset_parameters_reaches_into_convs_without_their_own(self):
        model = make(conv=_Raw)
        before = model.layers[0].convs[0].conv.linear.weight.clone()
        model.reset_parameters()
        assert not torch.equal(model.layers[0].convs[0].conv.linear.weight, before)

    def test_groups_of_convs_without_reset_parameters_begin_differently(self):
        first, second = make(conv=_Raw).layers[0].convs
        assert not torch.equal(first.conv.linear.weight, second.conv.linear.weight)

    def test_groups_and_layers_begin_differently(self):
        model = make(3)
        weights = [block.conv.lin_l.weight for layer in model.layers for block in layer.convs]
        assert len(weights) == 6
        assert len({tuple(w.flatten().tolist()) for w in weights}) == 6

    def test_tied_has_the_parameters_of_one_layer(self):
        one, tied = (sum(p.numel() for p in m.parameters()) for m in (make(1), make(50, tied=True)))
        assert one == tied
        assert tied < sum(p.numel() for p in make(2).parameters())

    def test_tied_keeps_its_depth(self, x, edge_index):
        assert not torch.allclose(make(1).eval()(x, edge_index), make(3, tied=True).eval()(x, edge_index))

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "state_dict"])
    def test_copies(self, how, x, edge_index):
        model = make(dropout=0.3, norm="batch", conv=_Raw if how == "deepcopy" else "sage")
        model(x, edge_index).sum().backward()
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model.state_dict(), buffer := io.BytesIO())
            buffer.seek(0)
            other = RevGNN(5, 16, 3, 4, dropout=0.3, norm="batch").double()
            other.load_state_dict(torch.load(buffer, weights_only=True))
        expected = gradients(model, x, edge_index, disable=False)
        for f, e in zip(gradients(other, x, edge_index, disable=False), expected, strict=True):
            assert torch.equal(f, e)

    def test_factory_is_given_the_channels_of_a_group(self, x, edge_index):
        asked = []
        model = make(3, num_groups=4, conv=lambda c: asked.append(c) or pyg.SAGEConv(c, c))
        assert asked == [4, 4, 4]
        assert model(x, edge_index).shape == (NODES, 3)

    def test_conv_kwargs(self):
        assert make(1, conv="sage", conv_kwargs={"aggr": "max"}).layers[0].convs[1].conv.aggr == "max"
        assert make(1, conv="gat", conv_kwargs={"heads": 2}).layers[0].convs[0].conv.heads == 2

    @pytest.mark.parametrize("hidden", [6, 10, 14, 24])
    def test_gat_heads_fit_any_width(self, hidden, x, edge_index):
        model = make(2, hidden=hidden, conv="gat")
        assert model(x, edge_index).shape == (NODES, 3)
        assert model.layers[0].convs[0].conv.heads > 0

    @pytest.mark.parametrize("heads", [0, 3, 16, 10**12])
    def test_gat_heads_that_do_not_divide_the_channels_are_refused(self, heads):
        with pytest.raises(ValueError, match=f"heads is {heads}: a group has 8 channels, .* one of 1, 2, 4, 8;"):
            make(1, conv="gat", conv_kwargs={"heads": heads})

    def test_autocast(self, x, edge_index):
        model = make(8, dropout=0.3).float()
        found = []
        for model.disable in (False, True):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(model(x.float(), edge_index), torch.arange(NODES) % 3)
            found.append(torch.autograd.grad(loss, list(model.parameters())))
        a, b = (torch.cat([g.flatten() for g in gs]) for gs in found)
        assert (a - b).norm() <= 1e-4 * b.norm()

    def test_learns(self, x, edge_index, classes):
        model = make(16, dropout=0.1)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        first = None
        for _ in range(60):
            optimizer.zero_grad()
            loss = model.loss(model(x, edge_index), classes)
            loss.backward()
            optimizer.step()
            first = loss.item() if first is None else first
        assert loss.item() < 0.5 * first


class TestTasks:
    def test_multiclass(self, classes):
        model, logits = make(), torch.randn(NODES, 3, dtype=torch.float64)
        expected = -torch.stack([row.log_softmax(0)[c] for row, c in zip(logits, classes, strict=True)]).mean()
        torch.testing.assert_close(model.loss(logits, classes), expected)
        assert model.predict(logits).tolist() == [max(range(3), key=row.__getitem__) for row in logits.tolist()]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
    def test_multilabel(self, dtype):
        model, logits = make(task="multilabel"), torch.randn(NODES, 3, dtype=torch.float64)
        target = (torch.randn(NODES, 3) > 0).to(dtype)
        p = logits.sigmoid()
        expected = -torch.where(target.bool(), p.log(), (1 - p).log()).mean()
        torch.testing.assert_close(model.loss(logits, target), expected)
        predicted = model.predict(logits)
        assert predicted.dtype == torch.bool
        assert torch.equal(predicted, p > 0.5)

    def test_multilabel_trains_as_plain(self, x, edge_index):
        model, target = make(task="multilabel", dropout=0.3), torch.ones(NODES, 3)
        found = []
        for model.disable in (False, True):
            torch.manual_seed(0)
            loss = model.loss(model(x, edge_index), target)
            found.append(list(torch.autograd.grad(loss, list(model.parameters()))))
        assert largest_error(*found) <= 1e-10


class TestErrors:
    @pytest.mark.parametrize("name", ["in_channels", "hidden_channels", "out_channels", "num_layers"])
    @pytest.mark.parametrize("value", [0, -2])
    def test_sizes(self, name, value):
        sizes = {"in_channels": 5, "hidden_channels": 16, "out_channels": 3, "num_layers": 2, name: value}
        with pytest.raises(ValueError, match=rf"{name} must be at least 1 \(got {value}\)"):
            RevGNN(**sizes)

    @pytest.mark.parametrize("value", ["4", 4.0, None])
    def test_sizes_are_integers(self, value):
        with pytest.raises(ValueError, match=rf"hidden_channels must be an integer of at least 1 \(got {value!r}\)"):
            RevGNN(5, value, 3, 2)

    @pytest.mark.parametrize("conv", CONVS)
    def test_sizes_may_be_numpys(self, conv, x, edge_index):
        torch.manual_seed(0)
        model = RevGNN(*map(numpy.int64, (5, 16, 3, 2)), num_groups=numpy.int64(2), conv=conv).double()
        torch.testing.assert_close(model(x, edge_index), make(2, conv=conv)(x, edge_index))

    @pytest.mark.parametrize("value", [1, 0, -1])
    def test_groups(self, value):
        with pytest.raises(ValueError, match=rf"num_groups must be at least 2 \(got {value}\)"):
            make(num_groups=value)

    @pytest.mark.parametrize(("hidden", "groups", "allowed"), [(15, 2, 16), (16, 3, 18), (1, 4, 4)])
    def test_not_divisible(self, hidden, groups, allowed):
        with pytest.raises(ValueError, match=rf"hidden_channels={hidden} .*num_groups={groups}; .*: {allowed}$"):
            make(hidden=hidden, num_groups=groups)

    @pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
    def test_dropout(self, value):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
            make(dropout=value)

    def test_norm(self):
        with pytest.raises(ValueError, match="norm='instance' is unknown; choose 'layer', 'batch' or None"):
            make(norm="instance")

    def test_task(self):
        with pytest.raises(ValueError, match="task='ranking' is unknown; choose 'multiclass' or 'multilabel'"):
            make(task="ranking")

    def test_conv(self):
        with pytest.raises(ValueError, match=f"conv='gcm' is unknown; choose from {', '.join(CONVS)}"):
            make(conv="gcm")

    def test_conv_kwargs_with_a_factory(self):
        with pytest.raises(ValueError, match=r"conv_kwargs \['aggr'\] are for convs by name"):
            make(conv=_Raw, conv_kwargs={"aggr": "max"})

    def test_anchor_every(self):
        with pytest.raises(ValueError, match=r"anchor_every must be at least 1, or None \(got 0\)"):
            make(anchor_every=0)

    def test_conv_is_a_module_and_no_factory(self):
        with pytest.raises(ValueError, match="function"):
            make(conv=pyg.SAGEConv(8, 8))

    def test_conv_of_another_width(self, x, edge_index):
        model = make(conv=lambda c: pyg.SAGEConv(c, c + 1))
        with pytest.raises(ValueError, match=r"shape \[24, 8\], got \[24, 9\]"):
            model(x, edge_index)


@pytest.mark.parametrize(("conv", "found"), [(None, "NoneType"), (lambda channels: 5, "int")])
def test_a_conv_that_is_no_module(conv, found):
    with pytest.raises(TypeError, match=f"function that makes a module.*got {found}"):
        RevGNN(4, 8, 2, 2, conv=conv)


class TestMiniBatches:
    @pytest.fixture
    def batch(self, x, edge_index):
        data = to_adj_t(pytest.importorskip("torch_geometric.data").Data(x=x, edge_index=edge_index))
        perm, ptr = partition(data.adj_t, 3, "contiguous", log=False)
        return next(iter(SubgraphLoader(permute(data, perm, log=False), ptr, log=False)))

    @pytest.mark.parametrize(
        ("call", "found"),
        [
            (lambda model, batch: model(batch), "SubData"),
            (lambda model, batch: model(*batch), "Data"),
            (lambda model, batch: model(batch.data), "Data"),
            (lambda model, batch: model(loader=[batch]), "NoneType"),
        ],
    )
    def test_what_is_no_tensor(self, batch, call, found):
        with pytest.raises(TypeError, match=rf"got {found}\); .* whole graphs .*model\(data.x, data.edge_index\)"):
            call(make(), batch)

    @pytest.mark.parametrize("rest", [0, 4])
    def test_an_adjacency_without_rows_for_the_halo(self, batch, rest):
        shape = list(batch.data.adj_t.shape)
        with pytest.raises(ValueError, match=rf"adjacency is \[{shape[0]}, {shape[1]}\] .* whole graphs"):
            make()(batch.data.x, batch.data.adj_t, *batch[1 : 1 + rest])

    def test_a_sparse_adjacency_of_a_whole_graph(self, x, edge_index):
        data = pytest.importorskip("torch_geometric.data").Data(x=x, edge_index=edge_index)
        model = make(conv="graphconv")
        torch.testing.assert_close(model(x, to_adj_t(data).adj_t.double()), model(x, edge_index))


@pytest.mark.parametrize("fuse", [True, False])
def test_threads_share_a_network_and_its_edges(fuse, x, edge_index):
    """Convolutions have another forward meanwhile, which no thread takes for a state to be put back."""
    model = make(2)
    for layer in model.layers:
        layer.fuse = fuse
    expected, failures = gradients(model, x, edge_index, disable=True), []

    def work():
        try:
            for _ in range(12):
                target = torch.arange(NODES) % 3
                found = torch.autograd.grad(model.loss(model(x, edge_index), target), list(model.parameters()))
                assert largest_error(list(found), expected) < 1e-9
        except Exception as error:
            failures.append(error)

    model.disable = False
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not any("forward" in vars(module) for module in model.modules())
