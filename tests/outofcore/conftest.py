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
    from recollect.outofcore import _blocks

    look, known = _blocks.Probe.reach, {}

    def reach(self, block, name, brief):
        key = (name, _blocks.kind_of(block), _blocks.module_of(block).training, brief)
        if key not in known:
            known[key] = look(self, block, name, brief)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks.Probe, "reach", reach)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
