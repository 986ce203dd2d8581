"""Lets the tests of this folder import what they share."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_geometric.data")  # also hides what it warns of when it is imported
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
