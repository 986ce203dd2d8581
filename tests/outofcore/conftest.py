"""Lets the tests of this folder import what they share."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_geometric.data")  # also hides what it warns of when it is imported
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def looks():
    """Lets blocks of one kind be looked at once for all tests of a file that make the same network again and again."""
    from recollect.messages.reach import Probe, kind_of, module_of

    look, known = Probe.reach, {}

    def reach(self, block, name, brief):
        key = (name, kind_of(block), module_of(block).training, brief)
        if key not in known:
            known[key] = look(self, block, name, brief)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "reach", reach)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
