"""Features that are learnt: a vector for each node, where a graph has none of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["learn_features"]


def learn_features(network: nn.Module, num_nodes: int, channels: int) -> None:
    """Let a network look its features up in a table that it learns, ``network.node_features``.

    The first argument of its calls then holds numbers of nodes [rows, 1] int64.

    Args:
        network: takes features [rows, channels] as its first argument.
        num_nodes: N.
        channels: of each vector, which are drawn from a normal distribution.
    """
    network.node_features = nn.Embedding(num_nodes, channels)
    network.register_forward_pre_hook(_look_up)


def _look_up(network: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    numbers, *rest = arguments
    return (network.node_features(numbers[:, 0]), *rest)
