"""Histories, so that the graph may outgrow memory.

A mini-batch is a few parts of a partitioned graph. Its nodes' neighbours outside of it, the halo, are not computed:
their embeddings come from a history, a table that every node was written into when it was last in a batch. A step then
costs one mini-batch and its 1-hop halo, however large the graph and however many layers ("GNNAutoScale: Scalable and
Expressive Graph Neural Networks via Historical Embeddings", arXiv 2106.05609).
"""

from recollect.autoscale._adjacency import add_self_loops, edge_index_of, normalize
from recollect.autoscale._blocks import Around
from recollect.autoscale._blockwise import BlockwiseGNN
from recollect.autoscale._combination import Combination
from recollect.autoscale._get_data import GraphData, get_data
from recollect.autoscale._making import HistoryOptions
from recollect.autoscale._parts_state import history_parts, load_history_parts
from recollect.autoscale._scalable import ScalableGNN
from recollect.autoscale._staleness import history_errors
from recollect.autoscale._utils import compute_micro_f1, dropout, gen_masks
from recollect.autoscale.histories import AsyncIOPool, History, HistoryFileError, Rows, history_bytes
from recollect.autoscale.loader import EvalSubgraphLoader, SubData, SubgraphLoader, own_graph, permute, to_adj_t
from recollect.autoscale.partitioning import (
    Partition,
    PartitionQuality,
    metis,
    part_weights,
    partition,
    partition_quality,
)
from recollect.messages import propagate, with_weights

__all__ = [
    "Around",
    "AsyncIOPool",
    "BlockwiseGNN",
    "Combination",
    "EvalSubgraphLoader",
    "GraphData",
    "History",
    "HistoryFileError",
    "HistoryOptions",
    "Partition",
    "PartitionQuality",
    "Rows",
    "ScalableGNN",
    "SubData",
    "SubgraphLoader",
    "add_self_loops",
    "compute_micro_f1",
    "dropout",
    "edge_index_of",
    "gen_masks",
    "get_data",
    "history_bytes",
    "history_errors",
    "history_parts",
    "load_history_parts",
    "metis",
    "normalize",
    "own_graph",
    "part_weights",
    "partition",
    "partition_quality",
    "permute",
    "propagate",
    "to_adj_t",
    "with_weights",
]
