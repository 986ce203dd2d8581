"""Modules with an inverse: written as a function and its inverse, trained without keeping their inputs."""

from recollect.invertible._coupling import AdditiveCoupling, AffineCoupling
from recollect.invertible._identity import Identity
from recollect.invertible._measured import Measured
from recollect.invertible._module import Module
from recollect.invertible._sequential import Sequential

__all__ = ["AdditiveCoupling", "AffineCoupling", "Identity", "Measured", "Module", "Sequential"]
