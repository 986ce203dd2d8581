"""Layers that need halo rows again in backward, with histories over several processes (gloo)."""

import pytest
import recollected_cases
from torch import distributed as dist

CASES = {
    2: list(recollected_cases.CASES),
    4: ["reversible sage", "reversible exact", "recomputed gcn", "bytes of reversible layers, torch.int8"],
}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases], ids=str
)
def test_the_numbers_are_those_of_one_process(assert_passed, case, world):
    assert_passed("recollected_cases", world, case, CASES[world])
