"""Shared parameters by the weights and heads by their own losses; gradients with respect to features; residuals."""

import pytest
import torch
from torch import nn

from recollect.aggregation import CAGrad, GaussNewton, MeanWeighting, UPGrad
from recollect.autogram import Engine


def parts(tasks=3):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(tasks)).double()
    return encoder, heads, torch.randn(5, 4, dtype=torch.float64)


def losses_of(encoder, heads, x):
    z = encoder(x)
    return [head(z.sin()).add(k).square().mean() for k, head in enumerate(heads)]


def rows(losses, tensors):
    jacobian = []
    for loss in losses:
        grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        pairs = zip(grads, tensors, strict=True)
        jacobian.append(torch.cat([(torch.zeros_like(t) if g is None else g).flatten() for g, t in pairs]))
    return torch.stack(jacobian)


@pytest.mark.parametrize("together", [False, True], ids=["list", "vector"])
def test_heads_have_their_own_losses_gradients(together):
    encoder, heads, x = parts()
    losses = losses_of(encoder, heads, x)
    jacobian = rows(losses, list(encoder.parameters()))
    weights = UPGrad()(jacobian @ jacobian.T)
    expected = [
        torch.autograd.grad(loss, list(h.parameters()), retain_graph=True)
        for loss, h in zip(losses, heads, strict=True)
    ]
    engine = Engine(encoder)
    losses = losses_of(encoder, heads, x)
    found = engine.mtl_backward(torch.stack(losses) if together else losses, list(heads), UPGrad())
    torch.testing.assert_close(found, weights)
    shared = torch.cat([p.grad.flatten() for p in encoder.parameters()])
    torch.testing.assert_close(shared, weights @ jacobian)
    for head, grads in zip(heads, expected, strict=True):
        for parameter, grad in zip(head.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    assert engine.certificate.checks == 1


def test_a_head_of_several_modules_and_one_without_parameters():
    encoder, heads, x = parts(2)
    losses = losses_of(encoder, heads, x)
    Engine(encoder).mtl_backward(losses, [[heads[0], nn.Tanh()], nn.Identity()], MeanWeighting())
    assert heads[0].weight.grad is not None
    assert heads[1].weight.grad is None


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda heads, encoder: list(heads)[:2], ValueError, "2 heads for losses of shape"),
    (lambda heads, encoder: [encoder, *list(heads)[1:]], ValueError, r"heads\[0\] has parameters of the engine's"),
    (lambda heads, encoder: [heads[0].weight, *list(heads)[1:]], TypeError, r"heads\[0\] must be a module"),
])  # fmt: skip
def test_wrong_heads_are_refused_before_anything_is_changed(change, error, message):
    encoder, heads, x = parts()
    engine = Engine(encoder)
    with pytest.raises(error, match=message):
        engine.mtl_backward(losses_of(encoder, heads, x), change(heads, encoder), UPGrad())
    assert all(p.grad is None for module in (encoder, heads) for p in module.parameters())


@pytest.mark.parametrize("several", [False, True])
def test_gradients_with_respect_to_features(several):
    encoder, heads, x = parts()
    z = encoder(x)
    other = z.sin()
    losses = torch.stack([head(other + z).add(k).square().mean() for k, head in enumerate(heads)])
    features = [z, other] if several else z
    engine = Engine(features=features)
    jacobian = rows(losses, [z, other] if several else [z])
    torch.testing.assert_close(engine.compute_gramian(losses), jacobian @ jacobian.T)
    whole = rows(losses, list(encoder.parameters()))
    weights = engine.backward(losses, CAGrad(c=0.5))
    torch.testing.assert_close(weights, CAGrad(c=0.5)(jacobian @ jacobian.T))
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in encoder.parameters()]), weights @ whole)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda z: Engine(nn.Linear(2, 2), features=z), ValueError, "features or to parameters"),
    (lambda z: Engine(features=[]), ValueError, "features is empty"),
    (lambda z: Engine(features=z.detach()), ValueError, "requires no gradient"),
    (lambda z: Engine(features=(z, 1.0)), TypeError, r"features\[1\] must be a tensor"),
])  # fmt: skip
def test_wrong_features_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.rand(3, requires_grad=True))


def test_norms_and_products_with_respect_to_features():
    encoder, heads, x = parts()
    z = encoder(x)
    losses = torch.stack([head(z.sin()).add(k).square().mean() for k, head in enumerate(heads)])
    jacobian = rows(losses, [z])
    engine = Engine(features=z)
    torch.testing.assert_close(engine.compute_norms(losses), jacobian.norm(dim=1))
    torch.testing.assert_close(engine.compute_gramian(losses, losses[:2] * 3), jacobian @ (3 * jacobian[:2]).T)
    assert engine.explain(losses) == "one backward pass for each of 3 losses down to the features"
    with pytest.raises(ValueError, match="not of features"):
        engine.mtl_backward(losses, list(heads), UPGrad())


def test_a_shared_part_that_is_frozen():
    encoder, heads, x = parts()
    engine = Engine(encoder.requires_grad_(False))
    engine.mtl_backward(losses_of(encoder, heads, x), list(heads), MeanWeighting())
    assert all(head.weight.grad is not None for head in heads)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_step_for_residuals():
    encoder, _, x = parts()
    engine = Engine(encoder)
    residuals = encoder(x).square().sum(1) - 1
    jacobian = rows(residuals, list(encoder.parameters()))
    lam = 0.1
    expected = torch.linalg.solve(
        jacobian.T @ jacobian + lam * torch.eye(jacobian.shape[1]).double(), jacobian.T @ residuals
    )
    engine.backward(encoder(x).square().sum(1) - 1, GaussNewton(damping=lam))
    found = torch.cat([p.grad.flatten() for p in encoder.parameters()])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)
