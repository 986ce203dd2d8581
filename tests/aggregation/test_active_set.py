"""One constraint at a time: right from wherever it begins, and downhill all the way."""

from itertools import pairwise

import pytest
import torch
from weight_inputs import KINDS, gram, normal, tall, wide
from weight_oracles import complementary

from recollect.aggregation._active_set import descend


def problem(kind, m, ridge=1e-6):
    matrix = gram(kind(m))
    return matrix / matrix.diagonal().mean() + ridge * torch.eye(m).double()


BEGINNINGS = {
    "zero": lambda r, m: torch.zeros(r, m).double(),
    "everywhere": lambda r, m: torch.ones(r, m).double(),
    "somewhere": lambda r, m: normal(r, m, seed=9).clamp(min=0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", BEGINNINGS)
def test_right_from_wherever_it_begins(kind, begin):
    matrix, offset = problem(kind, 6), normal(20, 6, seed=1)
    expected = torch.stack([complementary(matrix, q) for q in offset])
    found = descend(matrix, offset, BEGINNINGS[begin](20, 6), tolerance=1e-11, most=400)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [1e-4, 1e-12])
def test_the_conditions_hold_for_more_objectives(kind, ridge):
    matrix = problem(kind, 40, ridge)
    z = descend(matrix, matrix, torch.zeros(40, 40).double(), tolerance=1e-11, most=400)
    assert (z >= 0).all()
    assert torch.minimum(z, z @ matrix + matrix).abs().amax() < 1e-9 * (1 + z.amax())


def test_the_value_falls_in_every_round():
    matrix, offset = problem(tall, 20, 1e-4), normal(1, 20)
    values = []
    for rounds in range(30):
        z = descend(matrix, offset, BEGINNINGS["somewhere"](1, 20), tolerance=1e-11, most=rounds)
        values.append(float(z[0] @ matrix @ z[0] / 2 + offset[0] @ z[0]))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    assert values[0] > values[5] > values[-1]


def test_no_objective_to_gain():
    found = descend(problem(wide, 5), torch.ones(3, 5).double(), torch.zeros(3, 5).double(), tolerance=1e-11, most=400)
    assert not found.any()


def test_a_matrix_that_is_not_positive_stops_it():
    matrix = torch.eye(3).double()
    matrix[1, 1] = -1
    found = descend(matrix, -torch.ones(2, 3).double(), torch.ones(2, 3).double(), tolerance=1e-11, most=50)
    assert found.equal(torch.ones(2, 3).double())
