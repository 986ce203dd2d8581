"""Steps over a whole graph by several processes (gloo)."""

import pytest
import whole_graph_cases
from torch import distributed as dist

CASES = {
    1: ["gcn-dropout", "layers-gcn", "plain", "several-rev"],
    2: list(whole_graph_cases.CASES),
    4: ["gcn-dropout", "layers-gcn2", "ranks_without_training_nodes", "bytes_on_the_wire"],
}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases], ids=str
)
def test_the_numbers_are_those_of_one_process(assert_passed, case, world):
    assert_passed("whole_graph_cases", world, case, CASES[world])
