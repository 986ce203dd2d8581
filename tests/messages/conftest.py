"""Lets the tests of this folder import the graphs of `tests/autoscale`; without torch_geometric there are none."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_geometric.data")  # also hides what it warns of when it is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "autoscale"))
