"""The Gramian of the Jacobian of many losses, layer by layer, without the Jacobian.

After Algorithm 3 of "Jacobian Descent for Multi-Objective Optimization" (arXiv 2406.16232).
"""

from recollect.autogram._engine import Engine, register_rule
from recollect.autogram._factors import Blocks, Factor, NotCovered, Outer, Picked, Rows

__all__ = ["Blocks", "Engine", "Factor", "NotCovered", "Outer", "Picked", "Rows", "register_rule"]
