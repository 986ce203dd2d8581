"""The histories and the pool that a model is made with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect._arguments import as_count
from recollect.autoscale.histories._history import History, history_bytes
from recollect.autoscale.histories._pool import AsyncIOPool

__all__ = ["as_channels", "forget", "fresh_histories", "make_histories", "make_pool", "widths_of"]

_logger = logging.getLogger(__name__)


def make_histories(
    num_nodes: int,
    widths: Sequence[int],
    device: torch.device | str | None,
    dtype: torch.dtype,
    folder: str | Path | None,
    save_histories: bool,
    keep: bool = True,
) -> nn.ModuleList:
    """Make a history for each width; what they will take is logged before it is allocated.

    Raises:
        ValueError: the folder is a file.
    """
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(
            f"history_path={str(folder)!r} is a file, but must be a folder, which need not be there yet: histories are "
            "files in it, 0.history and so on"
        )
    if keep:
        size = sum(history_bytes(num_nodes, width, dtype) for width in widths)
        place = device or "host memory" if folder is None else folder
        _logger.info("%d histories of %d nodes take %.3f GiB in %s", len(widths), num_nodes, size / 2**30, place)
    return nn.ModuleList(
        History(num_nodes, width, device, dtype, _file(folder, layer), save_histories=save_histories, keep=keep)
        for layer, width in enumerate(widths)
    )


def fresh_histories(histories: Iterable[History], parameters: Iterable[Tensor]) -> list[History]:
    """Make histories like these in host memory, as exact as the parameters."""
    exact = next((tensor.dtype for tensor in parameters), torch.float32) == torch.float64
    dtype = torch.float64 if exact else torch.float32
    return [History(history.num_embeddings, history.embedding_dim, dtype=dtype) for history in histories]


def forget(histories: list[Any], layer: int) -> None:
    """Drop the history that no layer reads any more once this layer's is complete."""
    if layer:
        histories[layer - 1] = None


def as_channels(hidden_channels: Any) -> int | list[int]:
    """Return a number of channels as an ``int``, and several as a list of them.

    Raises:
        ValueError: one is no integer, or below 1.
    """
    if isinstance(hidden_channels, Iterable):
        return [as_count("hidden_channels", width) for width in hidden_channels]
    return as_count("hidden_channels", hidden_channels)


def widths_of(hidden_channels: int | list[int], num_layers: int) -> list[int]:
    """Return the widths of all layers' outputs but the last.

    Raises:
        ValueError: there is not one for each.
    """
    if isinstance(hidden_channels, int):
        return [hidden_channels] * (num_layers - 1)
    if len(hidden_channels) != num_layers - 1:
        raise ValueError(
            f"hidden_channels has {len(hidden_channels)} numbers, but between {num_layers} layers there are "
            f"{num_layers - 1} outputs: one number for each is expected"
        )
    return hidden_channels


def make_pool(pool_size: int | None, buffer_size: int | None, widths: Sequence[int]) -> AsyncIOPool | None:
    """Make a pool for histories of these widths, if there shall be one.

    Raises:
        ValueError: one of its numbers is missing.
    """
    if pool_size is None or buffer_size is None:
        if pool_size is buffer_size:
            return None
        raise ValueError(f"pool_size and buffer_size come together (got {pool_size} and {buffer_size})")
    return AsyncIOPool(pool_size, buffer_size, max(widths, default=1))


def _file(folder: str | Path | None, layer: int) -> Path | None:
    return None if folder is None else Path(folder) / f"{layer}.history"
