"""Inputs that the frame before makes again: frames in a row keep the first one's input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from recollect._arguments import check_count
from recollect._util._tree import Tree
from recollect.frames._certificate import judge, tolerance_of
from recollect.frames._errors import RebuildError, naming
from recollect.frames._fingerprint import Fingerprint, difference, fingerprint, is_late
from recollect.frames._modes import aside
from recollect.frames.sources._kept import KeptTensor, Layout
from recollect.frames.sources._source import Arguments, Held, Source, maker_of

if TYPE_CHECKING:
    from recollect.frames._region import Region

__all__ = ["Previous"]


class Previous(Source):
    """The frame before runs again for an input that it returned; other inputs are kept.

    A row of frames, each of which takes what the one before returned, keeps the first one's input alone. In backward
    the last one asks, all of them run again one after the other, and what autograd saved in each is there until its
    turn comes: memory and time are those of one checkpoint around the row, but the row need not be called as one.

    Args:
        length: at most so many frames in a row; ``None``: any number. With 1 every input is kept.

    Raises:
        ValueError: ``length`` is below 1.

    Example:
        >>> import torch, recollect
        >>> from recollect.frames import Previous
        >>> x, source = torch.randn(4, requires_grad=True), Previous(3)
        >>> h = x
        >>> for _ in range(6):  # keeps two of the six inputs
        ...     h = recollect.checkpoint(torch.sin, h, source=source)
        >>> h.sum().backward()
        >>> x.grad.shape
        torch.Size([4])
    """

    def __init__(self, length: int | None = None) -> None:
        check_count("length", length)
        self.length = length

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Held:
        """See :class:`Source`."""
        return _Call(args, kwargs, self.length)

    def __repr__(self) -> str:
        return f"Previous({'' if self.length is None else self.length})"


class _Asked:
    """An argument that the frame before returned: which of its tensors, and what it was like."""

    __slots__ = ("index", "layout", "mark", "tensor")

    def __init__(self, index: int, tensor: Tensor) -> None:
        self.index = index
        self.layout = Layout(tensor)
        self.tensor: Tensor | None = tensor  # until the region runs
        self.mark: Fingerprint | None = None


class _Call(Held):
    """The arguments of one call, some of which the frame before makes again.

    Attributes:
        before: that frame; ``None`` if all are kept.
        position: in the row of frames, from 1.
    """

    __slots__ = ("_arrived", "_changed", "_region", "_tree", "before", "followed", "position")
    makes_leaves = True
    hands_on = True

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], length: int | None) -> None:
        self._tree = tree = Tree((args, kwargs))
        self._changed: list[tuple[str, Tensor, int]] = []
        self._arrived: list[Tensor] | None = None
        self._region: Region
        self.followed = False
        makers = [maker_of(tensor) for tensor in tree.tensors]
        self.before = max((m.frame for m in makers if m is not None), key=lambda f: f.held.position, default=None)
        self.position = 1 if self.before is None else self.before.held.position + 1
        if length is not None and self.position > length:
            self.before, self.position = None, 1
        tree.tensors = [
            _Asked(maker.index, tensor)
            if maker is not None and maker.frame is self.before and not isinstance(tensor, nn.Parameter)
            else KeptTensor(tensor)
            for tensor, maker in zip(tree.tensors, makers, strict=True)
        ]

    def begins(self, region: Region) -> None:
        """Take the fingerprints of what is not kept."""
        self._region = region
        for one in self._tree.tensors:
            if isinstance(one, _Asked):
                tensor, one.tensor = one.tensor, None
                if region.certify and tensor is not None:
                    with aside():
                        one.mark = fingerprint(tensor, exact=region.certify == "exact")

    def inputs(self) -> Arguments:
        """Return the arguments; all frames of the row before this one run again for it."""
        self._changed = []
        arrived, self._arrived = self._arrived, None
        self.followed = self.before is not None
        if arrived is None and self.before is not None:
            row = [self.before]  # by a loop: a row may be longer than the stack is deep
            while (before := row[-1].held.before) is not None:
                row.append(before)
            for frame in reversed(row):
                arrived = frame.output(arrived)
        tensors = []
        for one in self._tree.tensors:
            if isinstance(one, _Asked):
                assert arrived is not None
                tensors.append(self._checked(one, arrived))
            else:
                tensors.append(one.get(None, "input", self._changed))
        arguments: Arguments = self._tree.build(tensors)
        return arguments

    def arrives(self, tensors: list[Tensor] | None) -> None:
        """Take what the frame before returned, for the next :meth:`inputs`."""
        self._arrived = tensors

    def changed(self) -> list[tuple[str, Tensor, int]]:
        """Return those that were changed in place since."""
        changed, self._changed = self._changed, []
        return changed

    def _checked(self, one: _Asked, arrived: list[Tensor]) -> Tensor:
        """Return an argument as it was, after a comparison."""
        tensor, then, region = arrived[one.index], one.mark, self._region
        if then is not None:
            exact = region.certify == "exact"
            allowed = 0.0 if exact else max(tolerance_of(one.layout.dtype), region.tolerance)
            name = naming(region.function)

            def accept(error: float) -> None:
                if error > allowed:
                    raise RebuildError(
                        f"{name()}: the frame before it, which ran again to make its input, returned other values "
                        f"(relative error {error:.1e}; allowed: {allowed:.0e}). It must compute the same again; keep "
                        "this input instead (source=Kept()), or draw random numbers from torch alone"
                    )

            with aside():
                if is_late(then):
                    now = fingerprint(tensor, exact=exact, like=then)
                    judge([(then, now)], lambda errors: accept(errors[0]))
                else:
                    accept(difference(then, tensor, exact=exact))
        return one.layout.fresh(tensor)
