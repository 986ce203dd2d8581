"""Rows of a history as the inputs of a frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect._verdicts import later
from recollect.autoscale.histories._history import History
from recollect.autoscale.histories._ranks import RankPull, RankTable
from recollect.autoscale.histories._selection import select_rows
from recollect.frames import Arguments, Held, InPlaceError, Kept, Source

__all__ = ["Pulls", "Rows", "check_not_pushed", "pulled_again", "pushes_of"]


def pushes_of(history: History) -> int:
    """Return how often a history was pushed to, when all that was asked for is done."""
    history.settle()
    return history.table.clock.pushes


def check_not_pushed(history: History, n_id: Tensor, since: int, what: str) -> None:
    """Raise unless the rows ``n_id`` are those that the history had after its first ``since`` pushes.

    Raises:
        InPlaceError: some were pushed since, or the history was reset or loaded. Pushes of other rows do not count. For
            stamps on a device it is raised when the backward pass ends.
    """
    pushes, number = pushes_of(history), n_id.numel()

    def refuse(late: int) -> None:
        if late:
            raise InPlaceError(
                f"{late} of the {number} {what} were pushed again to {history!r} before its backward pass pulled them "
                "anew, as another mini-batch's forward pass does; call backward before the next forward pass, or run "
                "these layers without a frame"
            )

    if pushes < since:
        refuse(number)
    late = (history.age(n_id) < pushes - since).sum()
    if forms_of(late.device).reads_at_once:
        refuse(int(late))
    else:
        later([late], lambda numbers: refuse(numbers[0][0]))


class Pulls:
    """The rows that were pulled again last, for frames which come in turn and need the same.

    Frames of one mini-batch share it. It holds the rows of one history at a time.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[History, Tensor, int, Tensor] | None = None

    def get(self, history: History, n_id: Tensor, since: int, what: str, begun: RankPull | None = None) -> Tensor:
        """Return the rows ``n_id`` as they were after the history's first ``since`` pushes; not to be changed.

        Raises:
            InPlaceError: see :func:`check_not_pushed`.
        """
        last = self._last
        if last is not None and last[0] is history and last[1] is n_id and last[2] == since:
            return last[3]
        self._last = last = None  # not the rows of two histories at a time
        rows = pulled_again(history, n_id, since, what, begun)
        self._last = history, n_id, since, rows
        return rows


def pulled_again(history: History, n_id: Tensor, since: int, what: str, begun: RankPull | None = None) -> Tensor:
    """Return rows as they were after the history's first ``since`` pushes.

    Args:
        history: of the rows.
        n_id: their numbers [rows].
        since: pushes.
        what: they are, for the error.
        begun: over ranks, what brought them first.

    Raises:
        InPlaceError: see :func:`check_not_pushed`; over ranks, of this rank's own rows.
    """
    check_not_pushed(history, n_id if begun is None else begun.own, since, what)
    return history.pull(n_id) if begun is None else begun.again()


class Rows(Source):
    """Pulls one argument of a frame again from a history, instead of keeping it.

    The argument is what ``history.pull(n_id)`` returned, in any floating-point type and on any device. All other
    arguments are kept. In backward the rows must be those of the forward: pushes to them in between are an error.

    Args:
        history: that the rows were pulled from.
        n_id: of the rows [rows], int64 or int32.
        first: a mini-batch's own rows [B, channels], if the argument is ``torch.cat([first, history.pull(n_id)])``;
            they are kept.
        argument: which one it is: its position or its keyword.
        pulls: shared by frames that get the same rows, one after the other, and leave them as they are: they are then
            pulled once for all.

    Shapes:
        - the argument: [rows, channels], or [B + rows, channels].

    Raises:
        TypeError: ``history`` is none, ``n_id`` holds no integers, or the call has no such argument.
        ValueError: ``n_id`` is not 1-D, the argument has another shape than its rows, or these lie with several ranks.
        IndexError: rows that the history does not have.
        InPlaceError: in backward, when some of the rows were pushed again since the forward.

    Example:
        >>> import torch, recollect
        >>> from recollect.autoscale import History, Rows
        >>> history, n_id = History(num_embeddings=6, embedding_dim=2), torch.tensor([5, 1])
        >>> weight = torch.ones(2, 3, requires_grad=True)
        >>> out = recollect.checkpoint(torch.mm, history.pull(n_id), weight, source=Rows(history, n_id))
        >>> history.push(torch.ones(1, 2), n_id=torch.tensor([3]))  # another row
        >>> out.sum().backward()
    """

    def __init__(
        self,
        history: History,
        n_id: Tensor,
        *,
        first: Tensor | None = None,
        argument: int | str = 0,
        pulls: Pulls | None = None,
    ) -> None:
        if not isinstance(history, History):
            raise TypeError(f"history: a recollect.autoscale.History is expected (got {type(history).__name__})")
        select_rows(n_id, history.num_embeddings)
        self.history = history
        self.n_id = n_id
        self.first = first
        self.argument = argument
        self.pulls = pulls
        self._since: int | None = None
        self.begun: RankPull | None = None

    def note(self, begun: RankPull | None = None) -> None:
        """Count pushes from now on, and not from when the frame begins: the rows are pulled before the next push.

        Args:
            begun: over ranks, what brings the rows.
        """
        self.begun = begun
        self._since = pushes_of(self.history) if begun is None else begun.since

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Held:
        """See :class:`~recollect.frames.Source`."""
        if isinstance(self.argument, str):
            found = kwargs.get(self.argument)
            kwargs = {**kwargs, self.argument: self.first}
        else:
            found = args[self.argument] if 0 <= self.argument < len(args) else None
            args = tuple(self.first if i == self.argument else arg for i, arg in enumerate(args))
        if not isinstance(found, Tensor):
            raise TypeError(
                f"argument={self.argument!r}: the frame must get a tensor there, rows of {self.history!r} (it was "
                f"called with {len(args)} arguments{', '.join(['', *kwargs])}, and got a {type(found).__name__})"
            )
        own = 0 if self.first is None else self.first.size(0)
        shape = (own + self.n_id.numel(), self.history.embedding_dim)
        if found.shape != shape:
            raise ValueError(
                f"argument={self.argument!r}: rows of {self.history!r} are expected, {list(shape)} (got "
                f"{list(found.shape)}); give what history.pull(n_id) returned"
            )
        if isinstance(self.history.table, RankTable) and self.begun is None:
            raise ValueError(
                f"rows of {self.history!r} are with several ranks, which other steps have changed when backward pulls "
                "them again: leave out source=, so that the frame keeps them, or let the layers of a ScalableGNN pull "
                "them, with recompute=True"
            )
        return _PulledCall(self, found, args, kwargs)


class _PulledCall(Held):
    """The arguments of one call, one of which is pulled again."""

    __slots__ = (
        "_argument",
        "_begun",
        "_changed",
        "_device",
        "_dtype",
        "_history",
        "_kept",
        "_pulls",
        "_requires_grad",
        "_since",
        "_strides",
    )

    def __init__(self, rows: Rows, found: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._history = rows.history
        self._argument = rows.argument
        self._pulls = rows.pulls
        self._begun = rows.begun
        self._since = pushes_of(rows.history) if rows._since is None else rows._since
        self._dtype, self._device, self._strides = found.dtype, found.device, found.stride()
        self._requires_grad = found.requires_grad
        self._kept = Kept().keep((rows.n_id, args), kwargs)
        self._changed: list[tuple[str, Tensor, int]] = []

    def changed(self) -> list[tuple[str, Tensor, int]]:
        """See :class:`~recollect.frames.Held`."""
        return self._changed

    def inputs(self) -> Arguments:
        """See :class:`~recollect.frames.Held`."""
        (n_id, args), kwargs = self._kept.inputs()
        self._changed = self._kept.changed()
        for _, tensor, version in self._changed:
            if tensor is n_id:
                raise InPlaceError(
                    f"the node numbers of shape {list(n_id.shape)} were changed in place between the forward pass "
                    f"(version {version}) and backward, which pulls these rows again; give Rows a copy"
                )
        argument = self._argument
        first = kwargs[argument] if isinstance(argument, str) else args[argument]
        what = "rows that a frame got" if first is None else "halo rows that a mini-batch pulled"
        pull = pulled_again if self._pulls is None else self._pulls.get
        with torch.no_grad():
            rows = pull(self._history, n_id, self._since, f"{what} in its forward pass", self._begun)
            rows = rows.detach().to(self._device, self._dtype)
            if first is not None:
                rows = torch.cat([first, rows])
            if rows.stride() != self._strides:
                laid_out = torch.empty_strided(rows.shape, self._strides, dtype=rows.dtype, device=rows.device)
                rows = laid_out.copy_(rows)
        rows.requires_grad_(self._requires_grad)
        if isinstance(argument, str):
            return args, {**kwargs, argument: rows}
        return tuple(rows if i == argument else arg for i, arg in enumerate(args)), kwargs
