"""PCGrad: against its published loop, in the same orders."""

import pytest
import torch
from weight_asserts import counting
from weight_inputs import DEGENERATE, KINDS, gram, normal, square

from recollect.aggregation import PCGradWeighting


def update(jacobian, orders):
    """Run algorithm 1 of the paper on the gradients themselves."""
    changed = jacobian.clone()
    for i, order in enumerate(orders):
        for j in order:
            product = changed[i] @ jacobian[j]
            if j != i and product < 0:
                changed[i] -= product / (jacobian[j] @ jacobian[j]) * jacobian[j]
    return changed.sum(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 7, 20])
def test_equals_the_published_loop(kind, m):
    jacobian = kind(m)
    weights = PCGradWeighting(torch.Generator().manual_seed(3))(gram(jacobian))
    generator = torch.Generator().manual_seed(3)
    expected = update(jacobian, [torch.randperm(m, generator=generator) for _ in range(m)])
    torch.testing.assert_close(weights @ jacobian, expected, rtol=1e-8, atol=1e-10)


def test_two_objectives_by_hand():
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]).double()
    weights = PCGradWeighting()(gram(jacobian))
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.5]).double())


@pytest.mark.parametrize("case", ["all zero", "no conflict", "one objective"])
def test_without_conflict_it_is_the_sum(case):
    gramian = gram(DEGENERATE[case])
    assert PCGradWeighting()(gramian).tolist() == [1.0] * len(gramian)


def test_torchs_own_generator_is_the_default():
    gramian = gram(square(9))
    torch.manual_seed(5)
    first = PCGradWeighting()(gramian)
    assert not PCGradWeighting()(gramian).equal(first)
    torch.manual_seed(5)
    assert PCGradWeighting()(gramian).equal(first)


def test_steps_grow_with_objectives_not_with_their_square():
    counts = {}
    for m in (10, 40):
        with counting() as count:
            PCGradWeighting()(gram(normal(m, m)))
        counts[m] = count.total
    assert counts[40] < 5 * counts[10]
