"""The options of a model's histories, and what is made by them."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect._arguments import as_count
from recollect.autoscale.histories._file_layout import check_place
from recollect.autoscale.histories._history import History, history_bytes
from recollect.autoscale.histories._pool import AsyncIOPool
from recollect.distributed import Shares

__all__ = ["HistoryOptions", "as_channels", "forget", "fresh_histories", "widths_of"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HistoryOptions:
    """What the histories of a model are, and how their rows are moved.

    Attributes:
        dtype: in which they are kept, see :class:`~recollect.autoscale.History`.
        device: on which they lie; ``None``: host memory.
        path: a folder; histories are then files in it, ``0.history`` and so on. Not together with a device.
        save: whether ``state_dict`` holds them.
        keep: ``False``: the network is for the whole graph, and histories take no memory. Mini-batches are refused
            then; layer-wise inference fills histories that it makes for itself.
        pool_size: buffers of an :class:`~recollect.autoscale.AsyncIOPool`, which moves rows beside the computation:
            the pulls of all layers start before the first one is computed. Results are the same, bit for bit.
            ``None``: rows are moved when they are needed.
        buffer_size: rows of each buffer, at least those of the largest halo; comes with ``pool_size``. For layer-wise
            inference to use the pool too, at least those of the largest mini-batch and its halo.
        process_group: over whose ranks the rows lie: a :class:`~recollect.distributed.Shares`, or a process group. Each
            layer's rows are then on their way while the layer before it is computed; there is no pool. Where layers
            need their halo again in backward, rows of other ranks are kept until then.

    Raises:
        ValueError: options that do not go together.

    Example:
        >>> import torch
        >>> from recollect.autoscale import HistoryOptions
        >>> from recollect.models import GCN
        >>> model = GCN(100, 5, 8, 3, num_layers=2, histories=HistoryOptions(dtype=torch.int8))
        >>> model.histories[0]
        History(100, 8, dtype=torch.int8, cpu)
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    path: str | Path | None = None
    save: bool = False
    keep: bool = True
    pool_size: int | None = None
    buffer_size: int | None = None
    process_group: Any | None = None

    def __post_init__(self) -> None:
        if self.process_group is not None and self.pool_size is not None:
            raise ValueError(
                "histories over ranks need no pool, as their rows are on their way one layer ahead without one: leave "
                "out pool_size and buffer_size"
            )
        if self.process_group is not None and not isinstance(self.process_group, (Shares, weakref.ref)):
            object.__setattr__(self, "process_group", weakref.ref(self.process_group))  # see Shares: it is not kept
        if not self.keep and (self.pool_size or self.path or self.save):
            raise ValueError("keep_histories=False goes without pool_size, history_path and save_histories")
        if (self.pool_size is None) != (self.buffer_size is None):
            raise ValueError(f"pool_size and buffer_size come together (got {self.pool_size} and {self.buffer_size})")

    def updated(self, **options: Any) -> HistoryOptions:
        """Return these with others in their place where they are not ``None``, by these names or a model's own.

        Raises:
            TypeError: there is no such option.
            ValueError: options that do not go together.
        """
        named = {_NAMES.get(name, name): value for name, value in options.items() if value is not None}
        unknown = named.keys() - {field.name for field in fields(self)}
        if unknown:
            raise TypeError(f"there is no option {', '.join(sorted(unknown))} of histories: see HistoryOptions")
        return replace(self, **named)

    def check_folder(self, number: int) -> None:
        """Raise unless as many files can be made in the folder, before the first one is.

        Raises:
            ValueError: what stands in its place is no folder.
            HistoryFileError: something that is no file stands in the place of one.
        """
        if self.path is None:
            return
        folder = Path(self.path)
        what = None
        if folder.is_symlink() and not folder.exists():
            what = f"a link to {os.readlink(folder)}, which is not there"
        elif folder.exists() and not folder.is_dir():
            what = "a file" if folder.is_file() else "something else"
        if what is not None:
            raise ValueError(
                f"history_path={str(self.path)!r} is {what}, but must be a folder, which need not be there yet: "
                "histories are files in it, 0.history and so on"
            )
        for layer in range(number):
            check_place(_file(self.path, layer, self.process_group))

    def make_histories(self, num_nodes: int, widths: Sequence[int]) -> nn.ModuleList:
        """Make a history for each width; what they will take is logged before it is allocated."""
        self.check_folder(len(widths))
        if self.keep and widths:
            size = sum(history_bytes(num_nodes, width, self.dtype) for width in widths)
            place = self.device or "host memory" if self.path is None else self.path
            _logger.info("%d histories of %d nodes take %.3f GiB in %s", len(widths), num_nodes, size / 2**30, place)
        return nn.ModuleList(
            History(
                num_nodes,
                width,
                self.device,
                self.dtype,
                None if self.path is None else _file(self.path, layer, self.process_group),
                save_histories=self.save,
                keep=self.keep,
                process_group=_group_of(self.process_group),
            )
            for layer, width in enumerate(widths)
        )

    def make_pool(self, widths: Sequence[int]) -> AsyncIOPool | None:
        """Make a pool for histories of these widths, if there shall be one."""
        if self.pool_size is None or self.buffer_size is None:
            return None
        return AsyncIOPool(self.pool_size, self.buffer_size, max(widths, default=1))


_NAMES = {"history_dtype": "dtype", "history_path": "path", "save_histories": "save", "keep_histories": "keep"}


def fresh_histories(
    histories: Iterable[History], parameters: Iterable[Tensor], num_nodes: int | None = None
) -> list[History]:
    """Make histories like these, over the same ranks, or of so many nodes, in host memory, as exact as parameters."""
    exact = next((tensor.dtype for tensor in parameters), torch.float32) == torch.float64
    dtype = torch.float64 if exact else torch.float32
    return [
        History(
            num_nodes or history.num_embeddings,
            history.embedding_dim,
            dtype=dtype,
            process_group=None if num_nodes else history.shares,
        )
        for history in histories
    ]


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


def _file(folder: str | Path, layer: int, process_group: Any | None = None) -> Path:
    """Each rank has files of its own."""
    if process_group is None:
        return Path(folder) / f"{layer}.history"
    group = _group_of(process_group)
    rank = group.rank if isinstance(group, Shares) else torch.distributed.get_rank(group)
    return Path(folder) / f"{layer}.rank{rank}.history"


def _group_of(process_group: Any | None) -> Any | None:
    return process_group() if isinstance(process_group, weakref.ref) else process_group
