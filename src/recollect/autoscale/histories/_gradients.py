"""Histories of gradients: what the loss' derivative by each layer's output was when it was last computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from recollect.autoscale.histories._history import History
from recollect.autoscale.histories._selection import Selection

__all__ = ["GradientHistories"]

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

    They are never part of ``state_dict``: those of a loaded model are zeros until they are pushed.

    Args:
        num_nodes: N.
        widths: of the outputs of all layers but the first, apart from the last one's, which is not known yet.
        device: of the tables; ``None`` is host memory.
        dtype: of the tables; float16, whose range gradients leave, becomes bfloat16.
        folder: of their files, if they lie in files.
    """

    _sums: Tensor

    def __init__(
        self,
        num_nodes: int,
        widths: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__()
        self._num_nodes = num_nodes
        self._place = device
        self._dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        self._folder = folder
        self._num_layers = len(widths) + 2
        self.tables = nn.ModuleList()
        for width in widths:
            self._append(width)
        self.register_buffer("_sums", torch.zeros(self._num_layers, 3, dtype=torch.float64), persistent=False)

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
        """Return whether nothing was pushed there yet."""
        return len(self.tables) < layer or self.table(layer).table.clock.pushes == 0

    def pull(self, layer: int, n_id: Tensor) -> Tensor:
        """Return the rows of these nodes [nodes, channels]."""
        return self.table(layer).pull(n_id)

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
            old = history.pull(n_id[::every]).flatten()
            new = rows[::every].to(old).flatten()
            sums = torch.stack([old.dot(new), old.dot(old), new.dot(new)])
            self._sums[layer].mul_(_KEEP).add_(sums.to(self._sums))
        history.write(rows, where)

    def trust(self, layer: int) -> Tensor:
        """Return by what factor old rows count, a scalar in [0, 1]; 1 where nothing was compared yet."""
        both, old, new = self._sums[layer]
        explained = both.clamp(min=0.0).square() / (old * new)
        trust = (both / old).clamp(0.0, 1.0) * (2 * explained - 1).clamp(0.0, 1.0)
        return torch.where(old * new > 0, trust, 1.0)

    def believe(self) -> None:
        """Forget what was compared: the rows are those of the present parameters."""
        self._sums.zero_()

    def reset_parameters(self) -> None:
        """Set all rows to 0, never pushed."""
        self.believe()
        for layer in range(1, len(self.tables) + 1):
            self.table(layer).reset_parameters()

    def extend(self, num_nodes: int) -> None:
        """Have rows for so many nodes; all are 0 then, never pushed."""
        self._num_nodes = num_nodes
        for layer in range(1, len(self.tables) + 1):
            self.table(layer).extend(num_nodes)
        self.reset_parameters()

    def _append(self, width: int) -> None:
        number = len(self.tables) + 1
        path = None if self._folder is None else Path(self._folder) / f"{number}.gradients"
        history = History(self._num_nodes, width, self._place, self._dtype, path)
        # Whatever the model was moved to since it was made.
        if self.tables:
            history.to(self.table(1).out_device, self.table(1).out_dtype)
        self.tables.append(history)
