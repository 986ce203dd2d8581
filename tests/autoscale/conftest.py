"""Lets the tests of this folder import what they share; without torch_geometric there are no graphs to test with."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_geometric.data")  # also hides what it warns of when it is imported
sys.path.insert(0, str(Path(__file__).parent))
