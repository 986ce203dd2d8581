"""Clipping and the noise scale, against gradients that are written out."""

import math

import pytest
import torch
from autogram_zoo import explicit_jacobian
from torch import nn

from recollect.autogram import Engine, NoiseScale, clip_weights, gradient_noise_scale


def net_and_losses():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return net, net(torch.randn(7, 4, dtype=torch.float64)).square().sum(1)


def test_backward_with_the_weights_is_the_sum_of_clipped_gradients():
    net, losses = net_and_losses()
    jacobian = explicit_jacobian(losses, list(net.parameters()))
    most = float(jacobian.norm(dim=1).median())
    norms = Engine(net).compute_norms(losses)
    losses.backward(clip_weights(norms, most))
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    clipped = torch.stack([row * min(1, most / float(row.norm())) for row in jacobian])
    assert (clipped.norm(dim=1) <= most * (1 + 1e-12)).all()
    torch.testing.assert_close(found, clipped.sum(0))


def test_short_gradients_stay_and_none_is_no_quotient_by_zero():
    weights = clip_weights(torch.tensor([[0.0, 1.0], [3.0, 6.0]]), 3)
    assert weights.tolist() == [[1.0, 1.0], [1.0, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("most", [math.inf, 1e300, 1e308])
def test_nothing_is_clipped_to_more_than_the_type_holds(dtype, most):
    norms = torch.tensor([0.0, 1.0, 3e4], dtype=dtype)
    assert torch.equal(clip_weights(norms, most), torch.ones_like(norms))


@pytest.mark.parametrize(("norms", "most", "error", "message"), [
    ([1.0], 1.0, TypeError, "is list"),
    (torch.ones(2, dtype=torch.long), 1.0, TypeError, "int64"),
    (torch.tensor([-1.0]), 1.0, ValueError, "below zero"),
    (torch.tensor([math.inf]), 1.0, ValueError, "finite"),
    (torch.ones(2), 0.0, ValueError, "max_norm is 0.0"),
    (torch.ones(2), math.nan, ValueError, "max_norm is nan"),
    (torch.ones(2), "two", TypeError, "max_norm must be a number"),
    (torch.ones(2), None, TypeError, "max_norm must be a number"),
])  # fmt: skip
def test_clip_weights_refuses(norms, most, error, message):
    with pytest.raises(error, match=message):
        clip_weights(norms, most)


def test_both_ways_are_the_definition():
    net, losses = net_and_losses()
    rows = explicit_jacobian(losses, list(net.parameters()))
    count, mean = len(rows), rows.mean(0)
    covariance = torch.cov(rows.T)
    trace = float(covariance.trace())
    squared = float(mean @ mean) - trace / count
    engine = Engine(net)
    both = (
        gradient_noise_scale(engine.compute_gramian(losses)),
        gradient_noise_scale(norms=engine.compute_norms(losses), mean_norm=engine.compute_norms(losses.mean())),
    )
    for found in both:
        assert found.trace == pytest.approx(trace, rel=1e-10)
        assert found.squared_norm == pytest.approx(squared, rel=1e-10)
        assert found.simple == pytest.approx(trace / squared, rel=1e-10)


def test_the_estimates_are_unbiased():
    """Over 4,000 batches of 3 from a known distribution, both means are within four standard errors of the truth."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.tensor([1.0, -0.5, 0.2]).double(), torch.tensor([0.5, 2.0, 1.0]).double()
    found = []
    for _ in range(4000):
        rows = mean + spread * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        scale = gradient_noise_scale(rows @ rows.T)
        found.append([scale.squared_norm, scale.trace])
    values = torch.tensor(found).double()
    truth = torch.stack([mean.square().sum(), spread.square().sum()])
    errors = values.std(0) / len(values) ** 0.5
    assert (errors < 0.1 * truth).all()  # tight enough to tell: ‖ḡ‖² without its correction is too large by 1.75
    assert ((values.mean(0) - truth).abs() <= 4 * errors).all()


def test_noise_alone_has_no_finite_scale():
    scale = gradient_noise_scale(torch.eye(4))
    assert scale == NoiseScale(0.0, 1.0)
    assert scale.simple == math.inf


@pytest.mark.parametrize(("given", "error", "message"), [
    ({}, ValueError, "give one of the two"),
    ({"gramian": torch.eye(2), "norms": torch.ones(2)}, ValueError, "give one of the two"),
    ({"norms": torch.ones(2)}, ValueError, "give one of the two"),
    ({"gramian": torch.ones(2, 3, 3, 2)}, ValueError, "flat=True"),
    ({"gramian": torch.ones(2, 3)}, ValueError, r"\[m, m\]"),
    ({"gramian": [1]}, TypeError, "is list"),
    ({"gramian": torch.full((2, 2), math.nan)}, ValueError, "not finite"),
    ({"gramian": torch.ones(1, 1)}, ValueError, "of 1 losses"),
    ({"norms": torch.ones(1), "mean_norm": 1.0}, ValueError, "of 1 losses"),
    ({"norms": torch.ones(2), "mean_norm": torch.ones(2)}, ValueError, "one finite number"),
    ({"norms": torch.ones(2), "mean_norm": math.inf}, ValueError, "one finite number"),
    ({"norms": -torch.ones(2), "mean_norm": 1.0}, ValueError, "below zero"),
])  # fmt: skip
def test_the_noise_scale_refuses(given, error, message):
    with pytest.raises(error, match=message):
        gradient_noise_scale(**given)


def test_weights_that_are_complex_are_refused():
    net, losses = net_and_losses()
    with pytest.raises(TypeError, match=r"weights of torch\.complex128.*weights\.real"):
        Engine(net).backward(losses, lambda gramian: gramian.diagonal().to(torch.complex128))
    assert all(p.grad is None for p in net.parameters())
