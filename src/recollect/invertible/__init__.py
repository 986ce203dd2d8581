"""Modules with an inverse: written as a function and its inverse, trained without keeping their inputs.

:class:`Module` is what users extend; the layers here are written with it. Modules one after the other, in
:class:`Sequential` or in code of your own, form a chain that keeps its last output only: backward asks each for its
input, from the last to the first. Layers whose Jacobian determinant is known give it too
(:meth:`Module.forward_and_log_det`), which makes a chain a normalising flow.
"""

from recollect.invertible._activation import SELU, Asinh, LeakyReLU
from recollect.invertible._conv import Conv1d, Conv2d, Conv3d, PixelShuffle, PixelUnshuffle
from recollect.invertible._coupling import AdditiveCoupling, AffineCoupling
from recollect.invertible._linear import Linear
from recollect.invertible._measured import Measured
from recollect.invertible._module import Module
from recollect.invertible._norm import ActNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from recollect.invertible._sequential import Sequential
from recollect.invertible._shape import ConstantPad, Flatten, Identity, Permute, Unflatten

__all__ = [
    "SELU",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Asinh",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConstantPad",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Flatten",
    "Identity",
    "LeakyReLU",
    "Linear",
    "Measured",
    "Module",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "Sequential",
    "Unflatten",
]
