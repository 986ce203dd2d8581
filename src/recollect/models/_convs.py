"""Message-passing layers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["CONVS", "make_conv"]


def _gat(geometric: Any, channels: int, heads: int | None = None, **options: Any) -> nn.Module:
    """Heads share the channels: as many as are asked for, or up to four, as many as divide these."""
    fitting = [number for number in range(1, channels + 1) if channels % number == 0]
    if heads is None:
        heads = max(number for number in fitting if number <= 4)
    elif heads not in fitting:
        raise ValueError(
            f"heads is {heads}: a group has {channels} channels, which its heads share, so it must be one of "
            f"{', '.join(map(str, fitting))}; give one of these, or other channels"
        )
    layer: nn.Module = geometric.GATConv(channels, channels // heads, heads=heads, **options)
    return layer


def _gin(geometric: Any, channels: int, **options: Any) -> nn.Module:
    mlp = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
    layer: nn.Module = geometric.GINConv(mlp, **options)
    return layer


def _named(name: str) -> Callable[..., nn.Module]:
    def build(geometric: Any, channels: int, **options: Any) -> nn.Module:
        layer: nn.Module = getattr(geometric, name)(channels, channels, **options)
        return layer

    return build


CONVS: dict[str, Callable[..., nn.Module]] = {
    "gat": _gat,
    "gcn": _named("GCNConv"),
    "gen": _named("GENConv"),
    "gin": _gin,
    "graphconv": _named("GraphConv"),
    "sage": _named("SAGEConv"),
}


def make_conv(conv: str | Callable[[int], nn.Module], channels: int, **options: Any) -> nn.Module:
    """Build a layer from ``channels`` to ``channels``.

    Args:
        conv: a name in :data:`CONVS` (a torch_geometric layer), or a function of the channels.
        channels: of input and output.
        **options: keyword arguments of the named layer.

    Raises:
        ValueError: the name is unknown, or options are given for a function.
        TypeError: neither a name nor a function, or the function makes no module.
        ImportError: a name is given and torch_geometric is missing.
    """
    if isinstance(conv, nn.Module):
        raise ValueError(
            f"conv is a module ({type(conv).__name__}), but each group of each layer needs its own; give a function "
            "that makes one from the number of channels, e.g. lambda channels: SAGEConv(channels, channels)"
        )
    if not isinstance(conv, str):
        if options:
            raise ValueError(f"conv_kwargs {sorted(options)} are for convs by name; give them to your own function")
        layer = conv(channels) if callable(conv) else conv
        if not isinstance(layer, nn.Module):
            raise TypeError(
                f"conv must be one of {', '.join(sorted(CONVS))}, or a function that makes a module from the number of "
                f"channels, e.g. lambda channels: SAGEConv(channels, channels) (got {type(layer).__name__})"
            )
        return layer
    if conv not in CONVS:
        raise ValueError(f"conv={conv!r} is unknown; choose from {', '.join(sorted(CONVS))}, or give a function")
    try:
        import torch_geometric.nn as geometric
    except ImportError as error:
        raise ImportError(f"conv={conv!r} needs torch_geometric: pip install 'torch-recollect[graph]'") from error
    return CONVS[conv](geometric, channels, **options)
