"""From the Gramian of many losses' gradients to the weights of one update."""

from recollect.aggregation._dualproj import DualProjWeighting
from recollect.aggregation._flattening import Flattening
from recollect.aggregation._simple import ConstantWeighting, MeanWeighting, RandomWeighting, SumWeighting
from recollect.aggregation._upgrad import UPGradWeighting
from recollect.aggregation._weighting import Weighting

__all__ = [
    "ConstantWeighting",
    "DualProjWeighting",
    "Flattening",
    "MeanWeighting",
    "RandomWeighting",
    "SumWeighting",
    "UPGradWeighting",
    "Weighting",
]
