"""Dividing a graph's nodes into parts, and how well that was done."""

from recollect.autoscale.partitioning._partition import Partition, PartitionQuality, metis, partition, partition_quality

__all__ = ["Partition", "PartitionQuality", "metis", "partition", "partition_quality"]
