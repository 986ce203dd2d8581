"""Dividing a graph's nodes into parts, and how well that was done."""

from recollect.autoscale.partitioning._partition import Partition, PartitionQuality, metis, partition, partition_quality
from recollect.autoscale.partitioning._weights import part_weights

__all__ = ["Partition", "PartitionQuality", "metis", "part_weights", "partition", "partition_quality"]
