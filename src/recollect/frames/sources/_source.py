"""What a source of frames is."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recollect.frames._modes import enclosing
from recollect.frames._watch import version_of

if TYPE_CHECKING:
    from recollect.frames._region import Region

__all__ = ["Arguments", "Held", "Made", "Maker", "Source", "hand_on", "maker_of"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""


class Held(ABC):
    """What a source keeps of one call, to bring its arguments back.

    A frame holds it; it must not hold the frame, or graphs could only be freed by the garbage collector.

    Example:
        >>> import torch
        >>> from recollect.frames import Held, Source, run_frame
        >>> class Seven(Held):
        ...     def inputs(self):
        ...         return (torch.full((3,), 7.0, requires_grad=True),), {}
        >>> class Sevens(Source):  # of inputs that are known to be sevens, nothing is kept
        ...     def keep(self, args, kwargs):
        ...         return Seven()
        >>> x = torch.full((3,), 7.0, requires_grad=True)
        >>> run_frame(torch.square, (x,), {}, Sevens()).sum().backward()
        >>> x.grad
        tensor([14., 14., 14.])
    """

    __slots__ = ()

    whole: bool = False
    """Whether every rebuild must run to the region's end, because :meth:`evaluated` needs its output."""
    drifts: bool = False
    """Whether the inputs come back with rounding errors, for which this answers (:meth:`compared`)."""
    makes_leaves: bool = False
    """Whether tensors that :meth:`inputs` returns and that require grad are new ones each time, on memory that others
    may hold; they are emptied after a rebuild."""
    lock: Any = None
    """Held in a rebuild, if several frames share this; ``None``: every frame has a lock of its own."""
    hands_on: bool = False
    """Whether the frame's outputs can be asked of it (:func:`maker_of`), by frames whose inputs they are."""
    followed: bool = False
    """Whether the arguments that were last returned came from frames that have run again for them."""

    def begins(self, region: Region) -> None:
        """Take notice of the region, before it runs: its ``name``, and how to run ``again`` under its conditions."""
        return

    def returned(self, output: Any) -> None:
        """Take notice of what the region returned in the forward pass; the arguments may be dropped from now on."""
        return

    def arrives(self, tensors: list[Tensor] | None) -> None:
        """Take notice of what the frame before has returned again, for the next call of :meth:`inputs`."""
        return

    @abstractmethod
    def inputs(self) -> Arguments:
        """Return the arguments again: tensors without history, with the forward's values, flags and strides."""

    def changed(self) -> list[tuple[str, Tensor, int]]:
        """Return which of the arguments last returned were changed in place since: what to call it, tensor, version.

        That is an error only if the region reads them.
        """
        return []

    def compared(self, error: float) -> None:
        """Take notice, if it ``drifts``, of the largest relative error of what autograd saves in a rebuild."""
        return

    def evaluated(self, output: Any) -> None:
        """Take notice of the region's output in a rebuild that ran to its end."""
        return


class Maker(Protocol):
    """A frame, as far as those that take its outputs know it."""

    @property
    def held(self) -> Any:
        """What its source keeps."""

    @property
    def parent(self) -> object:
        """What it is a part of."""

    def output(self, arrived: list[Tensor] | None) -> list[Tensor]:
        """Run again, on what the frame before it returned; return the tensors that the region returned."""


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that a frame returned: which frame, and which of its tensors."""

    frame: Maker
    index: int


class _Entry:
    """The same, without holding the frame, and the tensor's version then."""

    __slots__ = ("frame", "index", "version")

    def __init__(self, frame: Maker, index: int, version: int) -> None:
        self.frame = weakref.ref(frame)
        self.index = index
        self.version = version


_made: MutableMapping[Tensor, _Entry] = WeakTensorKeyDictionary()


def hand_on(frame: Maker, outputs: Sequence[Tensor]) -> None:
    """Take note of the tensors that a frame returned, in order."""
    for index, tensor in enumerate(outputs):
        if tensor.requires_grad:
            _made[tensor] = _Entry(frame, index, version_of(tensor))


def maker_of(tensor: Tensor) -> Made | None:
    """Return the frame of the running region that returned a tensor; ``None`` if there is none, or it was changed."""
    entry = _made.get(tensor)
    frame = None if entry is None else entry.frame()
    if entry is None or frame is None or frame.parent is not enclosing() or version_of(tensor) != entry.version:
        return None
    return Made(frame, entry.index)


class Source(ABC):
    """Where a frame's inputs come from in backward.

    One source may serve any number of calls; what it keeps of one is a :class:`Held`.

    Example:
        A source that keeps the inputs in half precision (which makes gradients inexact, and so needs
        ``certify=False``):

        >>> import torch, recollect
        >>> from recollect.frames import Held, Source
        >>> class Halved(Source):
        ...     def keep(self, args, kwargs):
        ...         return HalvedCall(args, kwargs)
        >>> class HalvedCall(Held):
        ...     def __init__(self, args, kwargs):
        ...         self.args, self.kwargs = [a.detach().half() for a in args], kwargs
        ...
        ...     def inputs(self):
        ...         return tuple(a.float().requires_grad_() for a in self.args), self.kwargs
        >>> x = torch.ones(3, requires_grad=True)
        >>> recollect.checkpoint(torch.exp, x * 1, source=Halved(), certify=False).sum().backward()
        >>> x.grad
        tensor([2.7183, 2.7183, 2.7183])
    """

    @abstractmethod
    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Held:
        """Return what brings the arguments of one call back; called before the region runs."""
