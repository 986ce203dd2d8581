"""Assertions for those who write modules for recollect.

:func:`check_invertible` says whether a module's inverse is one, whether a second run repeats the first, and whether
the gradients are those of plain autograd.
"""

from recollect.testing._invertible import check_invertible

__all__ = ["check_invertible"]
