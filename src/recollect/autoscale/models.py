"""The models by the name under which `torch_geometric_autoscale.models` has its own.

Nothing in the package imports this file: it stands above :mod:`recollect.models`, which stands on
:mod:`recollect.autoscale`.
"""

from recollect.autoscale import ScalableGNN
from recollect.models import APPNP, GAT, GCN, GCN2, GIN, PNA, PNA_JK

__all__ = ["APPNP", "GAT", "GCN", "GCN2", "GIN", "PNA", "PNA_JK", "ScalableGNN"]
