"""Frames and networks whose parameters or tensors are spread over processes (gloo, one and two of them)."""

import ddp_cases
import plan_cases
import pytest
import sharded_cases
import tensor_parallel_cases
from torch import distributed as dist

MODULES = {module.__name__: module for module in (sharded_cases, tensor_parallel_cases, ddp_cases, plan_cases)}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.mark.parametrize("world", [1, 2], ids="world{}".format)
@pytest.mark.parametrize(
    ("module", "case"), [(name, case) for name, module in MODULES.items() for case in module.CASES], ids=str
)
def test_the_numbers_are_those_of_one_plain_network(assert_passed, module, case, world):
    assert_passed(module, world, case)
