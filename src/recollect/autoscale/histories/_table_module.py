"""What every module with a table has: a place for its results, a state, and pools that work beside it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autoscale._stamp import GraphStamp
from recollect.autoscale.histories._table import STATE, Table

__all__ = ["TableModule"]

_GRAPH = "graph"


class TableModule(nn.Module):
    """A module with a table, which is neither moved nor, unless asked for, saved with it.

    Args:
        table: of rows.
        out_dtype: of what is read, at first.
        save_histories: whether ``state_dict`` holds the table.
    """

    _result: Tensor

    def __init__(self, table: Table, out_dtype: torch.dtype, save_histories: bool) -> None:
        super().__init__()
        self.table = table
        self.save_histories = save_histories
        self._users = weakref.WeakSet[Any]()
        # Goes wherever the module goes: so is known where its results belong.
        result = torch.empty(0, dtype=out_dtype, device=table.records.device)
        self.register_buffer("_result", result, persistent=False)

    @property
    def out_dtype(self) -> torch.dtype:
        """Of what :meth:`pull` returns; changes with ``module.to(dtype)``."""
        return self._result.dtype

    @property
    def out_device(self) -> torch.device:
        """Of what :meth:`pull` returns; changes with ``module.to(device)``."""
        return self._result.device

    def settle(self, beside: Any = None) -> None:
        """Wait until the pools have done with this history what they were asked for; every other method does so first.

        Args:
            beside: a pool that is not waited for.

        Raises:
            Exception: what went wrong in a pool's push.
        """
        for pool in list(self._users):
            if pool is not beside:
                pool.settle(self)

    def used_by(self, pool: Any) -> None:
        """Remember a pool that reads and writes :attr:`table` beside this thread."""
        self._users.add(pool)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.save_histories:
            self.settle()
            destination.update({prefix + name: value for name, value in self.table.state().items()})
            if self.table.graph is not None:
                destination[f"{prefix}{_GRAPH}"] = self.table.graph.numbers()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        _, _, missing_keys, _, error_msgs = arguments
        found = {name: state_dict.pop(prefix + name) for name in STATE if prefix + name in state_dict}
        graph = state_dict.pop(f"{prefix}{_GRAPH}", None)  # earlier states do not say whose the rows are
        if found or self.save_histories:
            missing_keys.extend(prefix + name for name in STATE if name not in found)
        if len(found) == len(STATE):
            self.settle()
            problem = self.table.load(found)
            if problem:
                error_msgs.append(f"{prefix}{problem}")
            elif graph is not None:
                self.table.graph = GraphStamp.from_numbers(graph)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {name: value for name, value in self.__dict__.items() if name != "_users"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._users = weakref.WeakSet()
