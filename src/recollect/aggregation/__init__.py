"""From the Gramian of many losses' gradients to the weights of one update.

With m losses and the Jacobian J of their gradients, G = J Jᵀ ``[m, m]`` knows every length and every angle. That is
enough to choose weights w, and ``losses.backward(w)`` then makes the update Jᵀ w: the Jacobian is never formed.
``recollect.autogram`` computes G; here it becomes weights. The two know nothing of each other: a weighting is any
callable from ``[m, m]`` to ``[m]``, and every :class:`Weighting` takes a Gramian from anywhere.

What an update may cost is where methods differ. :class:`UPGradWeighting` and :class:`DualProjWeighting` project onto
the cone of directions in which no objective gets worse; :class:`MGDAWeighting` and :class:`CAGradWeighting` look for
the worst-off objective; :class:`PCGradWeighting` and :class:`GradVacWeighting` let gradients give way one by one;
:class:`IMTLGWeighting`, :class:`ConFIGWeighting`, :class:`AlignedMTLWeighting`, :class:`NashMTLWeighting` and
:class:`FairGradWeighting` balance them; :class:`KrumWeighting` distrusts them; the mean, the sum, constant and random
weights do not look at them. :class:`MoDoWeighting` and :class:`SDMGradWeighting` take products of two independent
batches' gradients, :class:`CRMOGMWeighting` smooths the weights of any method, and :class:`GaussNewtonWeighting` takes
the objectives as residuals. Every method has a short name too: ``UPGrad`` is ``UPGradWeighting``.

Weights are computed in host memory, in float64: a call waits for the Gramian's device once, copies the Gramian, and
sends the weights there without another wait. Quadratic programs are solved in torch, all rows of one matrix together
and to rounding, and how well is checked at each call.

No method asks for gradients of a certain size: numbers are made relative first, from zero to as far apart as their type
reaches. A Gramian that is none, or that is not finite, is refused; the error names the objectives.

:class:`Flattening` is for losses of any shape, and :func:`conflict` measures for a report how much objectives oppose
each other and the update.
"""

from recollect.aggregation._aligned_mtl import AlignedMTLWeighting
from recollect.aggregation._cagrad import CAGradWeighting
from recollect.aggregation._conflict import Conflict, conflict
from recollect.aggregation._conflict_free import ConFIGWeighting
from recollect.aggregation._cr_mogm import CRMOGMWeighting
from recollect.aggregation._double_sampling import MoDoWeighting, SDMGradWeighting
from recollect.aggregation._dualproj import DualProjWeighting
from recollect.aggregation._fairgrad import FairGradWeighting
from recollect.aggregation._flattening import Flattening
from recollect.aggregation._gauss_newton import GaussNewtonWeighting, ResidualWeighting
from recollect.aggregation._gradvac import GradVacWeighting
from recollect.aggregation._imtlg import IMTLGWeighting
from recollect.aggregation._krum import KrumWeighting
from recollect.aggregation._mgda import MGDAWeighting
from recollect.aggregation._nash_mtl import NashMTLWeighting
from recollect.aggregation._pcgrad import PCGradWeighting
from recollect.aggregation._simple import ConstantWeighting, MeanWeighting, RandomWeighting, SumWeighting
from recollect.aggregation._upgrad import UPGradWeighting
from recollect.aggregation._weighting import StatefulWeighting, Weighting

AlignedMTL = AlignedMTLWeighting
CAGrad = CAGradWeighting
CRMOGM = CRMOGMWeighting
ConFIG = ConFIGWeighting
Constant = ConstantWeighting
DualProj = DualProjWeighting
FairGrad = FairGradWeighting
GaussNewton = GaussNewtonWeighting
GradVac = GradVacWeighting
IMTLG = IMTLGWeighting
Krum = KrumWeighting
MGDA = MGDAWeighting
Mean = MeanWeighting
MoDo = MoDoWeighting
NashMTL = NashMTLWeighting
PCGrad = PCGradWeighting
Random = RandomWeighting
SDMGrad = SDMGradWeighting
Sum = SumWeighting
UPGrad = UPGradWeighting

__all__ = [
    "CRMOGM",
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "AlignedMTLWeighting",
    "CAGrad",
    "CAGradWeighting",
    "CRMOGMWeighting",
    "ConFIG",
    "ConFIGWeighting",
    "Conflict",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "DualProjWeighting",
    "FairGrad",
    "FairGradWeighting",
    "Flattening",
    "GaussNewton",
    "GaussNewtonWeighting",
    "GradVac",
    "GradVacWeighting",
    "IMTLGWeighting",
    "Krum",
    "KrumWeighting",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "MoDo",
    "MoDoWeighting",
    "NashMTL",
    "NashMTLWeighting",
    "PCGrad",
    "PCGradWeighting",
    "Random",
    "RandomWeighting",
    "ResidualWeighting",
    "SDMGrad",
    "SDMGradWeighting",
    "StatefulWeighting",
    "Sum",
    "SumWeighting",
    "UPGrad",
    "UPGradWeighting",
    "Weighting",
    "conflict",
]
