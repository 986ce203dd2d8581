"""What each process of a training run holds of the graph (gloo)."""

import pytest
import team_cases
from torch import distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.mark.parametrize("case", team_cases.CASES)
def test_the_numbers_are_those_of_the_whole_graph(assert_passed, case):
    assert_passed("team_cases", 2, case)
