"""What a source of frames is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from recollect.frames._region import Region

__all__ = ["Arguments", "Held", "Source"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""


class Held(ABC):
    """What a source keeps of one call, to bring its arguments back.

    A frame holds it; it must not hold the frame, or graphs could only be freed by the garbage collector.
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

    def begins(self, region: Region) -> None:
        """Take notice of the region, before it runs: its ``name``, and how to run ``again`` under its conditions."""
        return

    def returned(self, output: Any) -> None:
        """Take notice of what the region returned in the forward pass; the arguments may be dropped from now on."""
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
