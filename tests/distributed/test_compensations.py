"""Histories of gradients that lie with several processes (gloo)."""

import compensation_cases
import pytest
from torch import distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.mark.parametrize("world", [1, 2, 4], ids="world{}".format)
@pytest.mark.parametrize("case", compensation_cases.CASES)
def test_the_numbers_are_those_of_one_process(assert_passed, case, world):
    assert_passed("compensation_cases", world, case)
