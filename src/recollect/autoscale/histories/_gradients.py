"""Histories of gradients: what the loss' derivative by each layer's output was when it was last computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect._devices import forms_of
from recollect.autoscale.histories._history import History
from recollect.autoscale.histories._memory import MemoryTable
from recollect.autoscale.histories._ranks import RankTable
from recollect.autoscale.histories._selection import Selection
from recollect.autoscale.histories._table import STATE
from recollect.distributed import Coming, Shares

__all__ = ["Given", "GradientHistories"]

Given = Callable[[], tuple[Tensor, Tensor] | None]
"""Waits for rows of a history of gradients [nodes, channels]; returns them, and the factor by which they count."""

_SAMPLE = 1_024
"""Rows of a push that are compared, at most."""
_KEEP = 0.5
"""What a push leaves of the sums that agreement is measured by."""


class GradientHistories(nn.Module):
    """A history of ∂loss/∂z_l for each layer l but the first, and how far its rows are to be trusted.

    A row is as old as its node's last mini-batch. Where the loss' gradient changes much in between, old rows can be
    worse than none. So each push compares a sample of what it replaces with what it writes, and old rows count by a
    factor: that of least squares, λ = ⟨old, new⟩ / ⟨old, old⟩, held to [0, 1], times 2ρ² - 1 where the share ρ² of the
    new rows that the old ones explain is above a half, and 0 below.

    They are never part of ``state_dict``: those of a loaded model are zeros until they are pushed, or :meth:`load`
    takes what :meth:`state` returned.

    Over ranks a push is local, and what was compared in a step is told to all ranks in the headers of the next one's
    pulls: a factor is made of what all compared before the step, and of what this rank has compared in it.

    Args:
        num_nodes: N.
        widths: of the outputs of all layers but the first, apart from the last one's, which is not known yet.
        device: of the tables; ``None`` is host memory.
        dtype: of the tables; float16, whose range gradients leave, becomes bfloat16.
        folder: of their files, if they lie in files.
        shares: of the ranks over which the rows lie; ``None``: they are all here.
    """

    _sums: Tensor
    _own: Tensor

    def __init__(
        self,
        num_nodes: int,
        widths: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        folder: str | Path | None = None,
        shares: Shares | None = None,
    ) -> None:
        super().__init__()
        self._num_nodes = num_nodes
        self._place = device
        self._dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        self._folder = folder
        self._shares = shares
        self._told: dict[int, Coming] = {}  # by layer, what brings the other ranks' sums of the step before
        self._num_layers = len(widths) + 2
        self.tables = nn.ModuleList()
        for width in widths:
            self._append(width)
        self.register_buffer("_sums", torch.zeros(self._num_layers, 3, dtype=torch.float64), persistent=False)
        self.register_buffer("_own", torch.zeros_like(self._sums), persistent=False)  # of this rank, not told yet

    def table(self, layer: int, width: int | None = None) -> History:
        """Return the history of a layer's output, from 1 on; that of the last layer is made with this width.

        Raises:
            ValueError: the last layer's has another width.
        """
        if layer == self._num_layers - 1 and len(self.tables) < layer and width is not None:
            self._append(width)
        found = self.tables[layer - 1]
        assert isinstance(found, History)
        if width is not None and found.embedding_dim != width:
            raise ValueError(
                f"layer {layer} returned {width} channels, but its history of gradients has {found.embedding_dim}: "
                "make the model anew, or its history_path empty"
            )
        return found

    @property
    def place(self) -> torch.device:
        """On which device rows are compared."""
        return self._sums.device

    def is_empty(self, layer: int) -> bool:
        """Return whether nothing was pushed there yet, by this rank."""
        return len(self.tables) < layer or self.table(layer).table.clock.pushes == 0

    def pull(self, layer: int, n_id: Tensor) -> Tensor:
        """Return the rows of these nodes [nodes, channels]."""
        return self.table(layer).pull(n_id)

    def in_memory(self, layer: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return the table of all nodes' rows itself [N, channels], where products may read it.

        Args:
            layer: from 1 on.
            dtype: that it shall have; ``None``: that of what is pulled.

        Returns:
            It; or ``None`` where nothing was pushed yet, or rows lie elsewhere or in another type: pull them.
        """
        if self.is_empty(layer):
            return None
        history = self.table(layer)
        fits = history.dtype == history.out_dtype == (dtype or history.out_dtype)
        here = isinstance(history.table, MemoryTable) and history.table.records.device == history.out_device
        return history.emb if fits and here and forms_of(history.out_device).reads_at_once else None

    def begin(self, n_id: Tensor) -> dict[int, Given]:
        """Begin to pull the rows of these nodes in all layers.

        Over ranks they are on their way from now on, as they are now, and all ranks call this together; else they are
        read when they are asked for.

        Args:
            n_id: [nodes] int64.

        Returns:
            By layer, what returns them, called once; nothing where no rows were pushed yet.
        """
        if self._shares is None:
            return {layer: self._later(layer, n_id) for layer in range(1, self._num_layers)}
        n_id = n_id.cpu()
        self._hear()
        return {layer: self._sent(layer, n_id) for layer in range(1, len(self.tables) + 1)}

    def _later(self, layer: int, n_id: Tensor) -> Given:
        def pull() -> tuple[Tensor, Tensor] | None:
            return None if self.is_empty(layer) else (self.pull(layer, n_id), self.trust(layer))

        return pull

    def _sent(self, layer: int, n_id: Tensor) -> Given:
        history = self.table(layer)
        assert isinstance(history.table, RankTable)
        both, old, new = self._own[layer].tolist()
        coming = self._told[layer] = history.table.begin(n_id, f"gradients of layer {layer}", (both, old, new))
        self._own[layer].zero_()

        def take() -> tuple[Tensor, Tensor]:
            rows = history.decoded(coming())
            self._hear_of(layer)
            return rows, self.trust(layer)

        return take

    def _hear(self) -> None:
        """Take over what all ranks compared in the step before, if that is not done yet."""
        for layer in list(self._told):
            self._hear_of(layer)

    def _hear_of(self, layer: int) -> None:
        coming = self._told.pop(layer, None)
        if coming is not None:
            told = self._sums.new_tensor(coming.values()).sum(0)
            self._sums[layer].mul_(_KEEP).add_(told)

    def push(self, layer: int, rows: Tensor, n_id: Tensor, where: Selection) -> None:
        """Write the rows of a mini-batch's nodes [B, channels], and compare them with those that were there.

        Args:
            layer: from 1 on.
            rows: [B, channels].
            n_id: the nodes [B].
            where: the same as a selection, checked already.
        """
        history = self.table(layer, rows.size(1))
        if history.table.clock.pushes:
            every = max(-(-n_id.numel() // _SAMPLE), 1)
            old = history.pull_own(n_id[::every].cpu()).flatten()
            new = rows[::every].to(old).flatten()
            sums = torch.stack([old.dot(new), old.dot(old), new.dot(new)])
            if self._shares is None:
                self._sums[layer].mul_(_KEEP).add_(sums.to(self._sums))
            else:
                self._own[layer] += sums.to(self._own)
        history.write(rows, where)

    def trust(self, layer: int) -> Tensor:
        """Return by what factor old rows count, a scalar in [0, 1]; 1 where nothing was compared yet."""
        sums = torch.add(self._own[layer], self._sums[layer], alpha=_KEEP)
        if forms_of(self.place).reads_at_once:
            return sums.new_tensor(_trust(*sums.tolist()))
        both, old, new = sums
        explained = both.clamp(min=0.0).square() / (old * new)
        trust = (both / old).clamp(0.0, 1.0) * (2 * explained - 1).clamp(0.0, 1.0)
        return torch.where(old * new > 0, trust, 1.0)

    def believe(self) -> None:
        """Forget what was compared: the rows are those of the present parameters."""
        self._hear()
        self._sums.zero_()
        self._own.zero_()

    def reset_parameters(self) -> None:
        """Set all rows to 0, never pushed."""
        self.believe()
        for layer in range(1, len(self.tables) + 1):
            self.table(layer).reset_parameters()

    def state(self) -> dict[str, Any]:
        """Return all rows, over ranks this one's, with their ages, and what was compared; they are not copied."""
        self._hear()
        tables = [self.table(layer) for layer in range(1, len(self.tables) + 1)]
        for history in tables:
            history.settle()
        rows = [{"width": history.embedding_dim, "rows": history.table.state()} for history in tables]
        return {"tables": rows, "sums": self._sums, "own": self._own}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state of histories of the same network and graph, whose rows are kept in the same type.

        Raises:
            ValueError: it is of others. All rows are 0 then, never pushed.
        """
        try:
            self._load(state)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self.reset_parameters()
            raise ValueError(f"histories of gradients cannot be taken over: {error}") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        tables, number = state["tables"], self._num_layers - 1
        alike = all(state[name].shape == self._sums.shape for name in ("sums", "own"))
        if not (alike and len(self.tables) <= len(tables) <= number):
            raise ValueError(f"{len(tables)} were stored, and the network has {number}")
        self.believe()
        for layer, one in enumerate(tables, 1):
            history = self.table(layer, one["width"])
            history.settle()
            problem = history.table.load({name: one["rows"][name].cpu() for name in STATE})
            if problem:
                raise ValueError(f"layer {layer}: {problem}")
        self._sums.copy_(state["sums"])
        self._own.copy_(state["own"])

    def extend(self, num_nodes: int) -> None:
        """Have rows for so many nodes; all are 0 then, never pushed."""
        self._num_nodes = num_nodes
        for layer in range(1, len(self.tables) + 1):
            self.table(layer).extend(num_nodes)
        self.reset_parameters()

    def _append(self, width: int) -> None:
        number = len(self.tables) + 1
        rank = "" if self._shares is None else f".rank{self._shares.rank}"
        path = None if self._folder is None else Path(self._folder) / f"{number}{rank}.gradients"
        history = History(self._num_nodes, width, self._place, self._dtype, path, process_group=self._shares)
        # Whatever the model was moved to since it was made.
        if self.tables:
            history.to(self.table(1).out_device, self.table(1).out_dtype)
        self.tables.append(history)

    def __getstate__(self) -> dict[str, Any]:
        self._hear()
        return vars(self)


def _trust(both: float, old: float, new: float) -> float:
    """Do what :meth:`GradientHistories.trust` does, of numbers that the host has, in a fraction of the time."""
    if not old * new > 0:
        return 1.0
    positive = max(both, 0.0)
    explained = positive * positive / (old * new)
    return min(max(both / old, 0.0), 1.0) * min(max(2 * explained - 1, 0.0), 1.0)
