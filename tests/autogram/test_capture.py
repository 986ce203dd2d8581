"""What the forward pass leaves behind."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import rnn

from recollect.autogram import Engine
from recollect.memory import peak_memory

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gramian(losses, parameters):
    parameters, rows = list(parameters), []
    for loss in losses:
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def is_captured(output):
    return type(output.grad_fn).__name__ == "CaptureBackward"


@pytest.mark.parametrize("when", ["before", "after", "everywhere"])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_hooks_that_change_an_output(when, batch_dim):
    """A hook of somebody else's that runs before an engine's would hide what the layer itself returned."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()

    def double(module, inputs, output):
        return output * 2 if isinstance(module, nn.Linear) else None

    handle = None
    engine = Engine(layer, batch_dim=batch_dim)
    if when == "everywhere":
        handle = register_module_forward_hook(double)
    else:
        layer.register_forward_hook(double, prepend=when == "before")
    try:
        losses = layer(X).square().sum(1)
        torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, layer.parameters()))
    finally:
        if handle is not None:
            handle.remove()


def test_without_gradients_nothing_is_left():
    layer = nn.Linear(4, 3).double()
    engine = Engine(layer)
    with torch.no_grad():
        assert layer(X).grad_fn is None
    layer.requires_grad_(False)
    assert layer(X).grad_fn is None
    assert not is_captured(layer(X.clone().requires_grad_()))
    layer.bias.requires_grad_()
    assert is_captured(layer(X))
    assert engine is not None


def test_under_function_transforms_nothing_is_left():
    layer = nn.Linear(4, 3).double()
    engine = Engine(layer, batch_dim=0)
    parameters = dict(layer.named_parameters())
    per_row = torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,)).square().sum()), (None, 0)
    )(parameters, X)
    rows = torch.cat([g.flatten(1) for g in per_row.values()], 1)
    torch.testing.assert_close(engine.compute_gramian(layer(X).square().sum(1)), rows @ rows.T)


def test_keyword_arguments():
    layer = nn.Linear(4, 3).double()
    engine = Engine(layer, batch_dim=0)
    output = layer(input=X)
    assert is_captured(output)
    losses = output.square().sum(1)
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, layer.parameters()))


def test_arguments_that_are_no_tensors_go_to_the_fallback():
    lstm = nn.LSTM(4, 3).double()
    engine = Engine(lstm)
    packed = rnn.pack_sequence([X[:4], X[4:]])
    output, _ = lstm(packed)
    assert not is_captured(output.data)
    losses = output.data.square().sum(1)
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, lstm.parameters()))


def test_an_output_changed_in_place():
    layer = nn.Linear(4, 3).double()
    engine = Engine(layer, batch_dim=0)
    losses = layer(X).relu_().add(1).square().sum(1)
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, layer.parameters()))


def test_captures_hold_what_autograd_holds_anyway():
    def held(with_engine):
        net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())))
        engine = Engine(net, batch_dim=0) if with_engine else None
        x = torch.rand(128, 64)
        with peak_memory("cpu") as memory:
            output = net(x)
        del engine
        return memory.current_bytes, output

    assert held(True)[0] <= held(False)[0] + 64


@pytest.mark.parametrize("batch_dim", [0, None])
def test_inputs_of_linear_layers_of_which_only_the_bias_is_trained_are_not_kept(batch_dim):
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).double()
    biases = [layer.bias for layer in net]
    for layer in net:
        layer.weight.requires_grad_(False)
    x = torch.rand(16, 64, dtype=torch.float64)

    def held(with_engine):
        engine = Engine(net, batch_dim=batch_dim) if with_engine else None
        with peak_memory("cpu") as memory:
            losses = net(x).square().sum(1)
        kept = memory.current_bytes
        if engine is not None:
            torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, biases))
        return kept

    assert held(True) <= held(False) + 6 * 64  # of an element each


@pytest.mark.parametrize("uses", [4, 16])
def test_a_layer_that_is_used_again_and_again_holds_its_rows_at_the_most(uses):
    """Beyond a few uses, rows [8, 1088] are smaller than the gradients of all uses, [8, 256, 32] each."""
    layer = nn.Linear(32, 32)
    engine = Engine(layer, batch_dim=0)

    def peak():
        x = torch.rand(8, 256, 32)
        for _ in range(uses):
            x = layer(x).tanh()
        losses = x.sum((1, 2))
        with peak_memory("cpu") as memory:
            engine.compute_gramian(losses)
        return memory.peak_bytes

    peak()
    assert peak() < 7 * 8 * 256 * 32 * 4
