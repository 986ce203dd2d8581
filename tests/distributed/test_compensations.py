"""Histories of gradients that lie with several processes (gloo)."""

import compensation_cases
import pytest
from torch import distributed as dist

CASES = {
    1: [
        "training of gcn-combined", "training of rev", "true histories of gin", "true histories of gcn2",
        "gradients_in_files", "a_whole_network_in_a_frame", "bytes of gcn", "bytes of rev",
        "a_step_without_a_backward_pass",
    ],
    2: list(compensation_cases.CASES),
    4: [
        "training of gcn", "training of sage", "training of gcn-combined", "training of rev-groups",
        "true histories of gin", "true histories of rev", "gradients_in_files", "bytes of gcn", "bytes of rev",
        "ranks_that_differ", "a_refresh_in_other_mini_batches", "a_step_without_a_backward_pass",
    ],
}  # fmt: skip

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases], ids=str
)
def test_the_numbers_are_those_of_one_process(assert_passed, case, world):
    assert_passed("compensation_cases", world, case, CASES[world])
