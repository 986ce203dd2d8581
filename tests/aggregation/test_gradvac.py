"""GradVac: against its published loop, call after call."""

import pytest
import torch
from weight_inputs import DEGENERATE, KINDS, gram, nearly_singular, normal, square, tall

from recollect.aggregation import GradVacWeighting, PCGradWeighting


def update(jacobian, orders, targets, beta):
    """Run algorithm 1 of the paper on the gradients themselves, and move the targets."""
    changed = jacobian.clone()
    for i, order in enumerate(orders):
        for k in order.tolist():
            j = k + (k >= i)
            phi = torch.cosine_similarity(changed[i], jacobian[j], dim=0, eps=0)
            target = targets[i, j].clone()
            if phi < target:
                top = changed[i].norm() * (target * (1 - phi**2).sqrt() - phi * (1 - target**2).sqrt())
                changed[i] += top / (jacobian[j].norm() * (1 - target**2).sqrt()) * jacobian[j]
                reached = torch.cosine_similarity(changed[i], jacobian[j], dim=0, eps=0)
                torch.testing.assert_close(reached, target, rtol=1e-6, atol=1e-8)
            targets[i, j] = (1 - beta) * target + beta * phi
    return changed.sum(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_equals_the_published_loop(kind, m, beta):
    if m == 2 and kind in (tall, nearly_singular):
        pytest.skip("opposite gradients cancel up to rounding, which has a cosine of its own")
    weighting = GradVacWeighting(beta, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    targets = torch.zeros(m, m).double()
    for seed in range(4):
        jacobian = kind(m, seed=seed)
        weights = weighting(gram(jacobian))
        expected = update(jacobian, [torch.randperm(m - 1, generator=generator) for _ in range(m)], targets, beta)
        found = weights @ jacobian
        assert float((found - expected).norm()) <= 1e-6 * float(jacobian.norm(dim=1).amax())
        torch.testing.assert_close(weighting.state, targets, rtol=1e-5, atol=1e-6)


def test_the_first_call_projects_as_pcgrad_does():
    jacobian = normal(2, 5)  # of two gradients: the orders are the same
    jacobian[1] -= jacobian[0]
    gramian = gram(jacobian)
    torch.testing.assert_close(GradVacWeighting()(gramian), PCGradWeighting()(gramian))


def test_targets_without_new_ones_stay():
    weighting = GradVacWeighting(beta=0.0)
    weighting(gram(square(4)))
    assert not weighting.state.any()


def test_a_gradient_that_vanishes_leaves_its_targets():
    jacobian = square(4).abs()
    weighting = GradVacWeighting()
    weighting(gram(jacobian))
    before = weighting.state.clone()
    jacobian[2] = 0
    weights = weighting(gram(jacobian))
    others = torch.tensor([0, 1, 3])
    assert weighting.state[2].equal(before[2])
    assert weighting.state[:, 2].equal(before[:, 2])
    assert (weighting.state[others][:, others] != before[others][:, others]).sum() == 6
    assert weights[2] == 1


def test_targets_at_one_leave_bounded_weights():
    weighting = GradVacWeighting(beta=1.0, eps=1e-4)
    weighting(gram(DEGENERATE["duplicates"]))
    weights = weighting(gram(square(4)))
    assert weights.isfinite().all()
    assert float(weights.abs().amax()) < 1e6


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ((1.5,), ValueError, "beta must be from 0 to 1"),
        ((0.5, 0.0), ValueError, "eps must be finite and positive"),
        ((0.5, 1e-8, 3), TypeError, r"generator must be a torch.Generator or None \(got 3\)"),
    ],
)
def test_settings_that_are_none(settings, error, message):
    with pytest.raises(error, match=message):
        GradVacWeighting(*settings)
