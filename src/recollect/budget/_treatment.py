"""How units are treated: what stands in front of a unit's forward, or of that of the ``Sequential`` around a row."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from recollect._arguments import Certify
from recollect._torch import compiled_blocks_exist, saved_tensor_hooks
from recollect.budget._recipes import run_sparingly
from recollect.budget._units import Units, find_units
from recollect.frames import Forward, Kept, Own, Source, frames_apply, run_frame

__all__ = ["Applied", "Segmented", "Treated", "apply", "segmented"]


class Treated(Forward):
    """Runs a module's forward in a frame.

    Args:
        module: whose forward.
        source: where its inputs come from in backward; ``None``: there is no frame, and everything is kept.
        plain: whether frames inside step aside.
        selective: whether there is no frame, and what cheap functions return is not kept.
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
        if not self.selective or compiled_blocks_exist():  # compiled code does not know what sees its functions
            return run_frame(own, args, kwargs, self.source, certify=self.certify)
        if saved_tensor_hooks() is not None:  # of a frame, say, which answers for what is kept
            return own(*args, **kwargs)
        return run_sparingly(own, args, kwargs, self.certify)


Segment = tuple[int, int, Source]
"""Consecutive children of a ``Sequential``: the first one's place, their number, and where their input comes from."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_in_sequence(container: nn.Module) -> bool:
    """Whether a module calls its children one after the other, each with what the one before returned alone."""
    return type(container).forward is nn.Sequential.forward and "forward" not in vars(container)


class Segmented(Forward):
    """Runs some rows of a ``Sequential``'s children as one frame each, and the others one by one.

    What stands in front of the children steps aside within a frame, and acts where they are called in another way.

    Args:
        module: the container, a ``Sequential`` by its forward.
        segments: the rows, in order.
        certify: what is accepted of a rebuild.
    """

    __slots__ = ("_children", "_rows", "certify", "segments")

    def __init__(self, module: nn.Module, segments: Sequence[Segment], certify: Certify = True) -> None:
        super().__init__(module)
        self.segments = tuple(segments)
        self.certify = certify
        self._children: list[nn.Module] = []  # as they were when it was put there; those of a copy are not there yet
        self._rows: list[nn.Sequential] = []

    def settings(self) -> tuple[Any, ...]:
        """See :class:`Forward`."""
        return self.segments, self.certify

    def put(self) -> None:
        """See :class:`Forward`."""
        super().put()
        self._look()

    def _look(self) -> list[nn.Module]:
        """Return the container's children, and take note of them if they were not looked at yet."""
        module: Any = self._module()
        children = list(module._modules.values())
        if not self._children:
            self._children = children
            # Modules of the rows' own, which nobody else holds: all that a row holds is noted in one go.
            self._rows = [nn.Sequential(*children[start : start + length]) for start, length, _ in self.segments]
        return children

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the container."""
        children = self._look()
        if kwargs or len(args) != 1 or self.before is not None or children != self._children or not frames_apply():
            return self.own()(*args, **kwargs)
        value, at = args[0], 0
        for (start, length, source), row in zip(self.segments, self._rows, strict=True):
            if any(getattr(child, name) for child in children[start : start + length] for name in _HOOKS):
                continue  # a unit's own hooks are called outside of frames, once in a step
            for child in children[at:start]:
                value = child(value)
            own = Own(types.MethodType(nn.Sequential.forward, row), plain=True)
            value, at = run_frame(own, (value,), {}, source, certify=self.certify), start + length
        for child in children[at:]:
            value = child(value)
        return value


def segmented(
    model: nn.Module, calls: Sequence[tuple[nn.Module, str]], sources: Mapping[str, Source], certify: Certify
) -> list[Forward]:
    """Return what runs rows of units as one frame, as far as they are consecutive children of a ``Sequential``.

    Args:
        model: in which the containers are.
        calls: units in order, and their strategies: a ``"checkpoint"`` begins a row, each ``"link"`` goes on with it.
        sources: of both.
        certify: what is accepted of a rebuild.
    """
    places = {
        child: (container, place)
        for container in model.modules()
        if _is_in_sequence(container)
        for place, child in enumerate(container._modules.values())
    }
    times = Counter(unit for unit, _ in calls)
    segments: dict[nn.Module, list[Segment]] = {}
    before: tuple[nn.Module | None, int] = None, 0  # the call before, and its place
    for unit, strategy in calls:
        container, place = places.get(unit, (None, 0)) if times[unit] == 1 and strategy in sources else (None, 0)
        if container is not None:
            found = segments.setdefault(container, [])
            if strategy == "link" and before == (container, place - 1):
                start, length, source = found.pop()
                found.append((start, length + 1, source))
            else:
                found.append((place, 1, sources[strategy]))
        before = container, place
    rows = {container: [one for one in found if one[1] > 1] for container, found in segments.items()}
    return [Segmented(container, found, certify) for container, found in rows.items() if found]


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
