"""Features that are learnt: a vector for each node, where a graph has none of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["learn_features"]


def learn_features(network: nn.Module, x: Tensor) -> None:
    """Let a network learn its features: they are its parameter ``node_features``, in the place of its first argument.

    Args:
        network: takes features of the whole graph as its first argument.
        x: the vectors to begin with [num_nodes, channels].
    """
    network.node_features = nn.Parameter(x.detach().clone())
    network.register_forward_pre_hook(_take_own)


def _take_own(network: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (network.node_features, *arguments[1:])
