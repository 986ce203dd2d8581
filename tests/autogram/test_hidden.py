"""Parameters that no graph shows: an error says so, and leaves gradients as they were."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from recollect.aggregation import SumWeighting
from recollect.autogram import Engine

USES = {
    "gramian": lambda engine, losses: engine.compute_gramian(losses),
    "norms": lambda engine, losses: engine.compute_norms(losses),
    "cross": lambda engine, losses: engine.compute_gramian(losses[:2], losses[2:]),
    "backward": lambda engine, losses: engine.backward(losses, SumWeighting()),
}


def hiding(layers, through=torch.autograd.backward):
    """A function that runs layers, and goes through them in its backward."""

    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return layers(x).detach()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                y = layers(x)
            through(y, grad)
            return x.grad

    return Hiding.apply


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return nn.Linear(3, 4).double(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), nn.Linear(4, 2).double()


def losses_of(first, inner, head, data=None):
    x = torch.randn(4, 3, dtype=torch.double)
    return head(inner(first(x))).square().sum(1)


def gradients(*modules):
    return [parameter.grad for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("batch_dim", ["auto", None])
def test_a_backward_pass_inside_of_a_functions_own_is_an_error(parts, use, batch_dim):
    first, layers, head = parts
    engine = Engine(*parts, batch_dim=batch_dim)
    for _ in range(2):  # at a later call too
        losses = losses_of(first, hiding(layers), head)
        with pytest.raises(
            ValueError, match=r"'0\.(weight|bias)' comes from a backward pass.*Hiding.*give the parameter"
        ):
            use(engine, losses)
        assert all(grad is None for grad in gradients(*parts))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_function_by_which_no_pass_comes_is_found_too(parts, use):
    _, layers, head = parts
    engine = Engine(layers, head)
    x = torch.randn(4, 4, dtype=torch.double, requires_grad=True)
    losses = head(hiding(layers)(x)).square().sum(1)
    with pytest.raises(ValueError, match="comes from a backward pass inside"):
        use(engine, losses)
    assert all(grad is None for grad in [*gradients(layers, head), x.grad])


def test_parameters_that_the_graph_shows_as_well_are_found(parts):
    first, layers, head = parts
    engine = Engine(*parts)
    losses = losses_of(first, nn.Sequential(layers, Wrapped(hiding(layers))), head)
    with pytest.raises(ValueError, match="comes from a backward pass inside"):
        engine.compute_gramian(losses)


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_what_is_hidden_later_is_an_error_before_it_is_accumulated(parts):
    first, _, head = parts
    idle = nn.Linear(4, 4).double()
    engine = Engine(*parts, idle)
    hidden: list[bool] = []

    class Sometimes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            if hidden:
                with torch.enable_grad():
                    idle(grad).sum().backward()
            return grad

    engine.compute_gramian(losses_of(first, Sometimes.apply, head))
    hidden.append(True)
    losses = losses_of(first, Sometimes.apply, head)
    with pytest.raises(ValueError, match="in no graph"):
        engine.compute_gramian(losses)
    assert idle.weight.grad is None


def test_a_function_that_hides_nothing_of_the_engines_is_no_matter(parts):
    first, layers, head = parts
    losses = losses_of(first, hiding(layers), head)
    jacobian = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*head.parameters()], retain_graph=True)])
            for loss in losses
        ]
    )
    torch.testing.assert_close(Engine(head).compute_gramian(losses), jacobian @ jacobian.T)


def test_passes_of_other_threads_are_theirs(parts):
    first, _, head = parts

    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            if threading.current_thread() is not threading.main_thread():
                return grad
            other = threading.Thread(target=lambda: first(torch.ones(1, 3, dtype=torch.double)).sum().backward())
            other.start()
            other.join()
            return grad

    losses = losses_of(first, Waiting.apply, head)
    Engine(first, head, batch_dim=None).compute_gramian(losses)
    assert first.weight.grad is not None


@pytest.mark.parametrize("use", [*USES.values(), lambda engine, losses: engine.explain(losses)], ids=[*USES, "explain"])
def test_a_reentrant_checkpoint_of_the_engines_layers_is_an_error(parts, use):
    _, layers, head = parts
    engine = Engine(layers, head)
    x = torch.randn(4, 4, dtype=torch.double, requires_grad=True)
    losses = head(checkpoint(layers, x, use_reentrant=True)).square().sum(1)
    with pytest.raises(ValueError, match=r"'0\.weight', '0\.bias' may be in it.*use_reentrant=False"):
        use(engine, losses)
    assert all(grad is None for grad in gradients(layers, head))


def test_a_reentrant_checkpoint_on_the_way_to_a_parameter_is_an_error(parts):
    first, layers, head = parts
    losses = losses_of(first, lambda x: checkpoint(layers, x, use_reentrant=True), head)
    with pytest.raises(ValueError, match="its layers' parameters are not in the losses' graph"):
        Engine(first, head).compute_gramian(losses)


def test_a_reentrant_checkpoint_of_other_layers_is_no_matter(parts):
    first, layers, head = parts
    engine = Engine(head)
    losses = losses_of(first, lambda x: checkpoint(layers, x, use_reentrant=True), head)
    gramian = engine.compute_gramian(losses)
    engine.backward(losses, SumWeighting())
    norm = sum(grad.square().sum() for grad in gradients(head))
    torch.testing.assert_close(gramian.sum(), norm)
    assert all(grad is not None for grad in gradients(*parts))
