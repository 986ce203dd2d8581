"""Histories by parts of the graph, for checkpoints that other numbers of processes load."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.autoscale._history_network import HistoryGNN
from recollect.autoscale.histories._ranks import RankTable
from recollect.autoscale.histories._table import Table

__all__ = ["history_parts", "load_history_parts"]


def history_parts(model: HistoryGNN) -> dict[str, Tensor]:
    """Return the rows of a network's histories over ranks, a tensor for each layer and part that this rank owns.

    They are for ``torch.distributed.checkpoint``: saved by any number of ranks, they are loaded by another, as each
    asks for the parts that it owns then. Rows are as the histories keep them (of int8, with their scales).

    Args:
        model: has histories over ranks.

    Returns:
        Copies, by names such as ``"1.part.7"``: rows [nodes of the part, width].

    Raises:
        ValueError: the histories are not over ranks; ``state_dict`` with ``save_histories=True`` holds others.

    Example:
        >>> from torch.distributed import checkpoint
        >>> def save(model, optimizer, path):
        ...     state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        ...     checkpoint.save(state | {"histories": history_parts(model)}, checkpoint_id=path)
        >>> def load(model, path):
        ...     state = {"model": model.state_dict(), "histories": history_parts(model)}
        ...     checkpoint.load(state, checkpoint_id=path)
        ...     model.load_state_dict(state["model"])
        ...     load_history_parts(model, state["histories"])
    """
    found = {}
    for layer, history in enumerate(model.tables):
        history.settle()
        for part, (table, rows) in _parts(history.table).items():
            records = torch.empty(len(rows), table.codec.record_width, dtype=table.codec.record_dtype)
            table.records.read(((rows.start, rows.stop),), records)
            found[f"{layer}.part.{part}"] = records
    return found


def load_history_parts(model: HistoryGNN, state: dict[str, Tensor]) -> None:
    """Write what :func:`history_parts` returned to the histories, as one push each: ages begin anew.

    Args:
        model: has histories over ranks, of the same graph, parts, widths and types.
        state: has the parts that this rank owns, and perhaps others.

    Raises:
        KeyError: a part is missing. Nothing is written then.
        ValueError: one is of another size or type, or the histories are not over ranks. Nothing is written then.

    Example:
        >>> import torch
        >>> from torch import distributed as dist
        >>> from recollect.autoscale import history_parts, load_history_parts
        >>> from recollect.distributed import Shares
        >>> from recollect.models import GCN
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # as torchrun does for many
        >>> model = GCN(10, 4, 8, 3, num_layers=2, process_group=Shares(torch.tensor([0, 6, 10])))
        >>> state = {name: torch.ones_like(rows) for name, rows in history_parts(model).items()}
        >>> {name: tuple(rows.shape) for name, rows in state.items()}
        {'0.part.0': (6, 8), '0.part.1': (4, 8)}
        >>> load_history_parts(model, state)
        >>> all(rows.eq(1).all() for rows in history_parts(model).values())
        True
        >>> dist.destroy_process_group()
    """
    checked: list[list[tuple[Table, range, Tensor]]] = []
    for layer, history in enumerate(model.tables):
        checked.append([])
        for part, (table, rows) in _parts(history.table).items():
            name = f"{layer}.part.{part}"
            if name not in state:
                raise KeyError(f"there is no {name}: rows of that layer and part, which this rank owns")
            records, width = state[name], table.codec.record_width
            if records.shape != (len(rows), width) or records.dtype != table.codec.record_dtype:
                raise ValueError(
                    f"{name} is {list(records.shape)} in {records.dtype}, but this history keeps {[len(rows), width]} "
                    f"in {table.codec.record_dtype}: make the model with the same parts, channels and options"
                )
            checked[-1].append((table, rows, records))
    for history, found in zip(model.tables, checked, strict=True):
        history.settle()
        for table, rows, records in found:
            table.mend()
            table.put(records, ((rows.start, rows.stop),), table.next_push())


def _parts(table: Table) -> dict[int, tuple[Table, range]]:
    """Return for each part of this rank the table that holds it, and its rows there."""
    if not isinstance(table, RankTable):
        raise ValueError(
            "the histories are not over ranks: HistoryOptions(process_group=...) makes such; of others state_dict() "
            "holds the rows with save_histories=True"
        )
    shares, first = table.shares, table.shares.nodes[0]
    ends = (shares.ptr - first).tolist()
    return {part: (table.own, range(ends[part], ends[part + 1])) for part in shares.parts}
