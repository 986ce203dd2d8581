"""The rules: for each type of layer, its Jacobian as a pure function of its inputs and its output's gradients.

A rule knows nothing of hooks, engines or graphs; :data:`recollect.autogram._registry.Rule` says what it gets and gives.
"""

from __future__ import annotations

from torch import nn

from recollect.autogram._registry import Entry
from recollect.autogram.rules._linear import linear

__all__ = ["RULES"]

RULES: dict[type[nn.Module] | str, Entry] = {
    nn.Linear: Entry(linear),
    "torch_geometric.nn.dense.linear.Linear": Entry(linear),
}
