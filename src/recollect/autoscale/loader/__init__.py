"""From a graph to mini-batches: what its tensors belong to, its nodes in the order of parts, parts with their halo."""

from recollect.autoscale.loader._cut import checked_ptr
from recollect.autoscale.loader._loader import EvalSubgraphLoader, SubgraphLoader
from recollect.autoscale.loader._order import permute, to_adj_t
from recollect.autoscale.loader._own import OwnGraph, own_graph
from recollect.autoscale.loader._sub_data import SubData

__all__ = [
    "EvalSubgraphLoader",
    "OwnGraph",
    "SubData",
    "SubgraphLoader",
    "checked_ptr",
    "own_graph",
    "permute",
    "to_adj_t",
]
