"""From the Gramian of many losses' gradients to the weights of one update.

With m losses and the Jacobian J of their gradients, G = J Jᵀ ``[m, m]`` knows every length and every angle. That is
enough to choose weights w, and ``losses.backward(w)`` then makes the update Jᵀ w: the Jacobian is never formed.
``recollect.autogram`` computes G; here it becomes weights. The two know nothing of each other: a weighting is any
callable from ``[m, m]`` to ``[m]``, and every :class:`Weighting` takes a Gramian from anywhere.

What an update may cost is where methods differ. :class:`UPGradWeighting` and :class:`DualProjWeighting` project onto
the cone of directions in which no objective gets worse; :class:`MGDAWeighting` and :class:`CAGradWeighting` look for
the worst-off objective; :class:`PCGradWeighting` lets gradients give way one by one; :class:`IMTLGWeighting`,
:class:`AlignedMTLWeighting` and :class:`NashMTLWeighting` balance them; :class:`KrumWeighting` distrusts them; the
mean, the sum, constant and random weights do not look at them. Quadratic programs are solved in torch, all rows of one
matrix together, on the Gramian's device and to rounding, and how well is checked at each call.

No method asks for gradients of a certain size: numbers are made relative first, from zero to as far apart as their type
reaches. A Gramian that is none, or that is not finite, is refused; the error names the objectives.

:class:`Flattening` is for losses of any shape, and :func:`conflict` measures for a report how much objectives oppose
each other and the update.
"""

from typing import TYPE_CHECKING, NoReturn

from recollect.aggregation._aligned_mtl import AlignedMTLWeighting
from recollect.aggregation._cagrad import CAGradWeighting
from recollect.aggregation._conflict import Conflict, conflict
from recollect.aggregation._dualproj import DualProjWeighting
from recollect.aggregation._flattening import Flattening
from recollect.aggregation._imtlg import IMTLGWeighting
from recollect.aggregation._krum import KrumWeighting
from recollect.aggregation._mgda import MGDAWeighting
from recollect.aggregation._nash_mtl import NashMTLWeighting
from recollect.aggregation._pcgrad import PCGradWeighting
from recollect.aggregation._simple import ConstantWeighting, MeanWeighting, RandomWeighting, SumWeighting
from recollect.aggregation._upgrad import UPGradWeighting
from recollect.aggregation._weighting import Weighting

__all__ = [
    "AlignedMTLWeighting",
    "CAGradWeighting",
    "Conflict",
    "ConstantWeighting",
    "DualProjWeighting",
    "Flattening",
    "IMTLGWeighting",
    "KrumWeighting",
    "MGDAWeighting",
    "MeanWeighting",
    "NashMTLWeighting",
    "PCGradWeighting",
    "RandomWeighting",
    "SumWeighting",
    "UPGradWeighting",
    "Weighting",
    "conflict",
]

if not TYPE_CHECKING:  # to a type checker, the module would have every name

    def __getattr__(name: str) -> NoReturn:
        """Say which weighting belongs to the name of an aggregator, such as UPGrad."""
        weighting = f"{name}Weighting"
        hint = f"; the weights of this method are those of {weighting}" if weighting in __all__ else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
