"""Engines over ranks, with replicated and sharded parameters (gloo)."""

import engine_cases
import pytest
import torch
from torch import distributed as dist

from recollect.autogram._exchange import _one, _ordered
from recollect.autogram._factors import Lookups, Picked, Rows, form_rows

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.mark.parametrize("world", [1, 2, 4], ids="world{}".format)
@pytest.mark.parametrize("case", engine_cases.CASES)
def test_the_numbers_are_those_of_one_process(assert_passed, case, world):
    assert_passed("engine_cases", world, case)


def test_lookups_in_different_numbers_are_ordered_and_sent_as_rows():
    generator = torch.Generator().manual_seed(0)
    index, owner = torch.randint(5, (12,), generator=generator), torch.randint(4, (12,), generator=generator)
    factor = Lookups(torch.randn(12, 3, dtype=torch.float64, generator=generator), index, owner, 4, 5)
    jacobian, places = form_rows([factor], slice(0, 4)), torch.tensor([2, 0, 3, 1])
    assert torch.equal(form_rows([_ordered(factor, places)], slice(0, 4)), jacobian[places])
    for shape in (factor.shape, torch.Size((500, 3))):
        one = _one([Lookups(factor.grad, index, owner, 4, shape[0])], shape)
        assert isinstance(one, (Picked, Rows))
        found = form_rows([one], slice(0, 4)).view(4, *shape)
        torch.testing.assert_close(found[:, :5].flatten(1), jacobian)
        assert not found[:, 5:].any()
