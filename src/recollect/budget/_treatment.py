"""How one unit is treated: what stands in front of its forward."""

from __future__ import annotations

from typing import Any

from torch import nn

from recollect._arguments import Certify
from recollect.budget._products import keep_products
from recollect.budget._units import Units, find_units
from recollect.frames import Forward, Kept, Source, frames_apply, run_frame

__all__ = ["Applied", "Treated", "apply"]


class Treated(Forward):
    """Runs a module's forward in a frame.

    Args:
        module: whose forward.
        source: where its inputs come from in backward; ``None``: there is no frame, and everything is kept.
        plain: whether frames inside step aside.
        selective: whether what products return is kept.
        certify: what is accepted of a rebuild.
    """

    __slots__ = ("certify", "plain", "selective", "source")

    def __init__(
        self, module: nn.Module, source: Source | None, plain: bool = True, selective: bool = False,
        certify: Certify = True,
    ) -> None:  # fmt: skip
        super().__init__(module)
        self.source = source
        self.plain = plain
        self.selective = selective
        self.certify = certify

    def settings(self) -> tuple[Any, ...]:
        """See :class:`Forward`."""
        return self.source, self.plain, self.selective, self.certify

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        own = self.own(self.plain)
        if self.source is None or not frames_apply():
            return own(*args, **kwargs)
        contexts = keep_products() if self.selective else None
        return run_frame(own, args, kwargs, self.source, certify=self.certify, contexts=contexts)


class Applied:
    """Modules with something in front of their forward, to be taken away again.

    Example:
        >>> import recollect, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> applied = recollect.apply(model, torch.nn.Linear)
        >>> model(torch.randn(2, 4)).sum().backward()  # each layer in a frame
        >>> applied.remove()
        >>> "forward" in vars(model[0])
        False
    """

    __slots__ = ("_fronts",)

    def __init__(self, fronts: list[Forward]) -> None:
        self._fronts = fronts
        for front in fronts:
            front.put()

    def remove(self) -> None:
        """Leave the modules as they were; a second call does nothing."""
        while self._fronts:
            self._fronts.pop().take()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


def apply(model: nn.Module, units: Units | None = None, source: Source | None = None) -> Applied:
    """Run units of a model in frames, without a plan.

    Args:
        model: any module; its class, names and state dict stay what they are.
        units: as in :func:`plan`.
        source: where inputs come from in backward, such as ``Kept()``, ``Previous(4)`` or ``Offload()``; ``None``:
            they are kept.

    Returns:
        What :meth:`~Applied.remove` takes the frames away again; a context manager, too.

    Raises:
        TypeError: ``source`` is no source.
        ValueError: there are no such units.

    Example:
        >>> import torch, recollect
        >>> from torch import nn
        >>> model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
        >>> with recollect.apply(model, nn.Linear):
        ...     model(torch.randn(2, 4)).sum().backward()
    """
    if source is not None and not isinstance(source, Source):
        raise TypeError(f"source must be a recollect.frames.Source, such as Kept() (got {source!r})")
    found = find_units(model, units)
    return Applied([Treated(m, source or Kept(), plain=False) for m in found.values()])
