"""Grouped reversible residual layers: depth without activations.

A layer splits its input into C groups along the features and computes (Li et al. 2021, "Training Graph Neural Networks
with 1000 Layers", arXiv 2106.07476, equations 3 and 4)::

    X'_0 = X_2 + ... + X_C,    X'_i = X_i + f_i(X'_{i-1}, graph, args)

from which every X_i can be computed again. Stacked layers form a chain that keeps its last output only, and each block
is evaluated twice per training step: once forward, and once to bring back its input and its saved tensors together.
"""

from recollect.reversible._beside import Beside
from recollect.reversible._group import GroupAddRev, GroupRevRes
from recollect.reversible._module import InvertibleModule
from recollect.reversible._streams import BDIA, Midpoint

__all__ = ["BDIA", "Beside", "GroupAddRev", "GroupRevRes", "InvertibleModule", "Midpoint"]
