"""Several losses over parts: the Gramian is that of the explicit Jacobian, and the gradient what its weights make."""

import gc

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch_geometric.nn import SAGEConv
from whole_graph_zoo import N, a_graph, losses_by_label, plain_jacobian, sum_of_losses

from recollect.aggregation import UPGradWeighting
from recollect.autogram import GramianError
from recollect.memory import peak_memory
from recollect.models import RevGNN
from recollect.outofcore import WholeGraph
from recollect.outofcore._tables import Tables

PTR = torch.tensor([0, 20, 20, 50, 61, N])


def a_model(data, conv="sage", groups=2, **options) -> RevGNN:
    out = data.y.size(1) if data.y.dim() == 2 else 4
    return RevGNN(7, 4 * groups, out, 3, num_groups=groups, conv=conv, exact=True, **options).to(data.x.dtype)


def by_name(model):
    return {name: p.grad for name, p in model.named_parameters()}


def compare(whole, data, *args, weighting=None):
    """Against the explicit Jacobian of the network with everything kept."""
    losses, jacobian, rows, number = plain_jacobian(whole.model, data, *args)
    whole.model.zero_grad()
    torch.manual_seed(5)
    found = whole.step(losses_by_label(data), weighting or UPGradWeighting())
    assert_close(torch.rand(1), number, rtol=0, atol=0)
    assert_close(found, losses, rtol=1e-10, atol=1e-10)
    gramian = jacobian @ jacobian.T
    assert_close(whole.last_gramian, gramian, rtol=1e-10, atol=1e-10)
    weights = (weighting or UPGradWeighting())(whole.last_gramian)
    assert_close(whole.last_weights, weights, rtol=1e-10, atol=1e-10)
    for name, gradient in by_name(whole.model).items():
        expected = torch.tensordot(weights, rows[name], 1)
        assert_close(torch.zeros_like(expected) if gradient is None else gradient, expected, rtol=1e-10, atol=1e-10)
    assert whole.certificate.checks == 1
    assert whole.certificate.last < 1e-12


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("conv", ["sage", "gcn", "gin", "graphconv", "gat", "gen"])
def test_gramians_of_every_convolution(conv, groups):
    data = a_graph(labels=5)
    options = {"conv_kwargs": {"norm": "layer"}} if conv == "gen" else {}
    model = a_model(data, conv, groups, dropout=0.3, **options)
    compare(WholeGraph(model, data, PTR, row_bytes=2 * 8 * 4 * groups * 30), data)  # losses in twos and a rest


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("in_files", [False, True])
def test_gramians_under_all_settings(tied, exact, in_files, tmp_path):
    data = a_graph()
    model = a_model(data, tied=tied, dropout=0.4)
    model.project.requires_grad_(False)
    for layer in model.layers:
        layer.exact = exact
    whole = WholeGraph(model, data, PTR, tmp_path if in_files else None, exact=exact)
    model.requires_grad_(True)
    compare(whole, data)
    assert not whole.unfinished


@pytest.mark.parametrize("row_bytes", [1, 2**26])
def test_losses_in_blocks(row_bytes, tmp_path):
    """Each block has tables of its own; the Gramian has the products of losses of different ones."""
    data = a_graph(labels=5)
    whole = WholeGraph(a_model(data, dropout=0.3), data, PTR, tmp_path, row_bytes=row_bytes)
    compare(whole, data)
    names = {path.stem for path in tmp_path.glob("g0x*.table")}
    assert names == ({f"g0x1.{loss}" for loss in range(5)} if row_bytes == 1 else {"g0x5.0"})


def test_memory_does_not_grow_with_the_losses():
    """But for their rows of parameters, their logits and their Gramian: here for less than half a loss more each."""

    def peak(labels):
        data = a_graph(600, 2400, torch.float32, labels)
        whole = WholeGraph(RevGNN(7, 64, labels, 2), data, torch.tensor([0, 300, 600]), row_bytes=1)
        whole.compute_gramian(losses_by_label(data))
        rows = 4 * labels * max(p.numel() for p in whole.model.parameters())
        with peak_memory("cpu") as memory:
            whole.compute_gramian(losses_by_label(data))
        return memory.peak_bytes - 3 * rows

    assert peak(24) < 1.2 * peak(2)


def test_no_loss_of_the_first_part():
    data = a_graph(labels=3)
    data.train_mask[:50] = False
    compare(WholeGraph(a_model(data), data, PTR), data)


def test_a_convolution_that_several_layers_share():
    shared = SAGEConv(4, 4)
    data = a_graph(labels=3)
    model = a_model(data, lambda channels: shared)
    compare(WholeGraph(model, data, PTR), data)


def test_the_gramian_alone_leaves_gradients_alone():
    data = a_graph(labels=3)
    model = a_model(data, dropout=0.3)
    whole = WholeGraph(model, data, PTR)
    _, jacobian, _, number = plain_jacobian(model, data)
    torch.manual_seed(5)
    assert_close(whole.compute_gramian(losses_by_label(data)), jacobian @ jacobian.T, rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.rand(1), number)
    assert all(p.grad is None for p in model.parameters())
    assert whole.last_weights is None


class Drawing(nn.Module):
    """A weighting that draws, and takes losses."""

    takes_residuals = True

    def forward(self, gramian, losses):
        self.losses = losses
        return torch.rand(losses.shape)


def test_what_a_weighting_draws_is_not_drawn_again():
    data = a_graph(labels=3)
    whole = WholeGraph(a_model(data, dropout=0.3), data, PTR)
    _, _, _, number = plain_jacobian(whole.model, data)
    torch.manual_seed(5)
    weighting = Drawing()
    losses = whole.step(losses_by_label(data), weighting)
    assert torch.equal(weighting.losses, losses)
    assert whole.last_weights[0] == number.double()
    assert torch.rand(1) not in whole.last_weights.float()


class Unequal(torch.autograd.Function):
    """A backward that is not linear."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.abs().sqrt()


class Crooked(RevGNN):
    def classify(self, x, mask=None):
        return super().classify(Unequal.apply(x), mask)


def test_a_gradient_that_the_gramian_does_not_fit():
    data = a_graph(labels=3)
    model = Crooked(7, 8, 3, 3, exact=True).double()
    whole = WholeGraph(model, data, PTR)
    with pytest.raises(GramianError, match="backward that is not linear"):
        whole.step(losses_by_label(data), UPGradWeighting())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("criterion", "weighting", "error", "message"),
    [
        (lambda logits, y: logits.sum(), UPGradWeighting(), ValueError, "vector of m losses"),
        (lambda logits, y: logits, UPGradWeighting(), ValueError, "vector of m losses"),
        (lambda logits, y: logits[:, 0], UPGradWeighting(), ValueError, "vector of [0-9]+ losses"),
        (lambda logits, y: logits.sum(0), None, ValueError, "several losses goes with"),
        (lambda logits, y: logits.sum(0), UPGradWeighting, TypeError, "class UPGradWeighting"),
        (lambda logits, y: logits.sum(0), lambda gramian: 1.0, TypeError, "float"),
        (lambda logits, y: logits.sum(0), lambda gramian: gramian, ValueError, r"\[3\]"),
    ],
)
def test_what_is_refused(criterion, weighting, error, message):
    data = a_graph(labels=3)
    model = a_model(data)
    with pytest.raises(error, match=message):
        WholeGraph(model, data, PTR).step(criterion, weighting)
    assert all(p.grad is None for p in model.parameters())


class Killed(BaseException):
    pass


def a_whole(path):
    torch.manual_seed(1)
    data = a_graph(labels=3)
    return WholeGraph(a_model(data, dropout=0.3), data, PTR, path, memory=0), data


PASSES = 1 + 3 * 2 + 1 + 3 * 2 + 1
"""The projection, blocks forward, the loss, blocks backward, the projection again."""


@pytest.mark.parametrize("at", [1, 8 * 4, 10 * 4 + 2, PASSES * 4, PASSES * 4 + 3, (PASSES + 9) * 4 + 1, 2 * PASSES * 4])
def test_a_step_whose_process_ended_goes_on(at, looks, tmp_path, monkeypatch):
    whole, data = a_whole(tmp_path / "whole")
    torch.manual_seed(5)
    losses = whole.step(losses_by_label(data), UPGradWeighting())
    number = torch.rand(1)

    broken, data = a_whole(tmp_path / "broken")
    applied, apply = [0], Tables.apply

    def stop(self, *args, **options):
        applied[0] += 1
        if applied[0] == at:
            raise Killed
        apply(self, *args, **options)

    monkeypatch.setattr(Tables, "apply", stop)
    torch.manual_seed(5)
    with pytest.raises(Killed) as caught:
        broken.step(losses_by_label(data), UPGradWeighting())
    monkeypatch.undo()
    caught.value.__traceback__ = None  # which holds the files open
    del caught, broken
    gc.collect()

    again, data = a_whole(tmp_path / "broken")
    with pytest.raises(TypeError, match="several losses"):
        again.resume(sum_of_losses(data))
    with pytest.raises(RuntimeError, match="the Gramian would overwrite"):
        again.compute_gramian(losses_by_label(data))
    torch.manual_seed(99)
    assert torch.equal(again.resume(losses_by_label(data), UPGradWeighting()), losses)
    assert torch.equal(torch.rand(1), number)
    assert torch.equal(again.last_gramian, whole.last_gramian)
    expected = by_name(whole.model)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in by_name(again.model).items())
    assert not again.unfinished
