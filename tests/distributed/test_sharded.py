"""Frames and networks whose parameters or tensors are spread over processes (gloo, one and two of them)."""

import functools
import subprocess

import ddp_cases
import plan_cases
import pytest
import sharded_cases
import tensor_parallel_cases
from processes import run
from torch import distributed as dist

MODULES = {module.__name__: module for module in (sharded_cases, tensor_parallel_cases, ddp_cases, plan_cases)}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a function that runs all cases of a module, once, and gives what each raised in each process."""

    @functools.cache
    def get(module, world):
        try:
            return run(module, world, tmp_path_factory.mktemp(f"{module}{world}"))
        except (AssertionError, subprocess.TimeoutExpired) as error:
            return str(error)  # for every case: the processes are not started again

    return get


@pytest.mark.parametrize("world", [1, 2], ids="world{}".format)
@pytest.mark.parametrize(
    ("module", "case"), [(name, case) for name, module in MODULES.items() for case in module.CASES], ids=str
)
def test_the_numbers_are_those_of_one_plain_network(results, module, case, world):
    outcome = results(module, world)
    assert isinstance(outcome, list), outcome
    for rank, raised in enumerate(outcome):
        assert raised[case] is None, f"rank {rank}:\n{raised[case]}"
