"""Steps over a whole graph by several processes (gloo)."""

import functools
import subprocess

import pytest
import whole_graph_cases
from processes import run
from torch import distributed as dist

CASES = {
    1: ["gcn-dropout", "layers-gcn", "plain", "several-rev"],
    2: list(whole_graph_cases.CASES),
    4: ["gcn-dropout", "layers-gcn2", "ranks_without_training_nodes", "bytes_on_the_wire"],
}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @functools.cache
    def get(world):
        try:
            return run("whole_graph_cases", world, tmp_path_factory.mktemp(f"whole{world}"), cases=CASES[world])
        except (AssertionError, subprocess.TimeoutExpired) as error:
            return str(error)  # for every case: the processes are not started again

    return get


@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases], ids=str
)
def test_the_numbers_are_those_of_one_process(results, case, world):
    outcome = results(world)
    assert isinstance(outcome, list), outcome
    for rank, raised in enumerate(outcome):
        assert raised[case] is None, f"rank {rank}:\n{raised[case]}"
