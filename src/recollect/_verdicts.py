"""Verdicts over numbers that a device computes, without waiting for it.

What is to be judged is copied to the host beside what the device does next. The verdict is given when the copy has
arrived: that is looked for when a backward pass ends and when the next region or engine begins. Whoever wants it sooner
calls :func:`settle`, which waits. What nobody asked for is given when the process ends, as a warning.

What a forward pass gathers, one range for each layer say, is sent at once where nothing is on its way. Else it waits
until that has arrived or a backward pass ends, and goes in one copy: the depth makes no more of them.
"""

from __future__ import annotations

import atexit
import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect._torch import graph_task_id, outside_modes, when_backward_ends
from recollect._transfer import Fetch, Order

__all__ = ["arrive", "later", "look", "outstanding", "settle"]

Numbers = list[list[Any]]
Verdict = Callable[[Numbers], None]
Item = tuple[Sequence[Tensor], Verdict, Order]

# Of so many backward passes numbers may be under way; then the oldest are waited for. The host is seldom as far ahead.
_MOST = 8
_BETWEEN = -1  # in place of a backward pass's number


class _Copy:
    """Numbers of one device on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        dtype = tensors[0].dtype
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        self._sizes = [tensor.numel() for tensor in tensors]
        self.fetch = Fetch(torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors]))

    def read(self) -> Numbers:
        """Return the numbers of each tensor, and wait if they are not here."""
        return [part.tolist() for part in torch.split(self.fetch.read(), self._sizes)]


class _Sent:
    """Copies that were begun together, and the verdicts over them."""

    def __init__(self, items: Sequence[Item]) -> None:
        groups: dict[tuple[torch.device, bool], dict[int, Tensor]] = {}
        for tensors, _, order in items:
            order.before(tensors)
            for tensor in tensors:
                groups.setdefault((tensor.device, tensor.is_floating_point()), {})[id(tensor)] = tensor
        with torch.inference_mode(False), torch.no_grad(), outside_modes():
            self._copies = [(list(group), _Copy(list(group.values()))) for group in groups.values()]
        self._verdicts = [([id(tensor) for tensor in tensors], verdict) for tensors, verdict, _ in items]

    def is_here(self) -> bool:
        """Whether all numbers have arrived."""
        return all(copy.fetch.is_here() for _, copy in self._copies)

    def judge(self) -> list[Exception]:
        """Give the verdicts, and return what they raised."""
        numbers: dict[int, list[Any]] = {}
        for keys, copy in self._copies:
            numbers.update(zip(keys, copy.read(), strict=True))
        raised: list[Exception] = []
        for keys, verdict in self._verdicts:
            try:
                verdict([numbers[key] for key in keys])
            except Exception as error:
                if any(copy.fetch.is_late for _, copy in self._copies):
                    error.add_note(
                        "It was found when numbers came from the device, which nothing waits for: it may concern the "
                        "gradients of an earlier step"
                    )
                raised.append(error)
        return raised


_lock = threading.RLock()
# What is to be sent when a backward pass ends, by its number. Passes that an exception ended stay, until the next.
_collected: dict[int, list[Item]] = {}
_waiting: list[_Sent] = []
_raised: list[Exception] = []  # by verdicts, and not yet by anybody who asked


def later(tensors: Sequence[Tensor], verdict: Verdict) -> None:
    """Call ``verdict`` with the numbers of each tensor, flat, when they have arrived on the host.

    Inside a backward pass they are sent when it ends, all at once.

    Args:
        tensors: floating-point ones and integers, which come exact up to 64 bits.
        verdict: raises, or warns, where the numbers are not what they must be. What it holds lives until then.

    Raises:
        Exception: what verdicts raised that are there already.
    """
    task, item = graph_task_id(), (tensors, verdict, Order(tensors))
    if task == _BETWEEN:
        with _lock:
            _collected.setdefault(_BETWEEN, []).append(item)
        look()
        return
    with _lock:
        if task in _collected:
            _collected[task].append(item)
            return
        if _collected.keys() - {_BETWEEN}:
            _send_collected()
        _collected[task] = [item]
    try:
        when_backward_ends(functools.partial(_end, task))
    except RuntimeError:  # an engine without such calls
        _end(task)


def _end(task: int) -> None:
    with _lock:
        items = _collected.pop(_BETWEEN, []) + _collected.pop(task, [])
    _send(items)
    for one in _first(len(_waiting) - _MOST):
        _judge(one)
    look()


def _send_collected() -> None:
    """Send what passes have collected; those that run in other threads collect on."""
    with _lock:
        items = [item for collected in _collected.values() for item in collected]
        for collected in _collected.values():
            collected.clear()
    _send(items)


def _send(items: Sequence[Item]) -> None:
    if not items:
        return
    sent = _Sent(items)
    with _lock:
        _waiting.append(sent)


def _first(number: int) -> list[_Sent]:
    """Return so many that wait for a verdict, in their order."""
    with _lock:
        return _waiting[: max(number, 0)]


def _judge(sent: _Sent) -> None:
    """Give the verdicts over what was sent, unless another thread does."""
    with _lock:
        if sent not in _waiting:
            return
        _waiting.remove(sent)
    raised = sent.judge()
    with _lock:
        _raised.extend(raised)


def outstanding() -> bool:
    """Whether there are verdicts that nobody has been told of."""
    return bool(_waiting or _raised or (_collected and any(list(_collected.values()))))


def arrive() -> None:
    """Wait for all numbers that were sent, and give the verdicts; errors are kept for whoever looks next."""
    _send_collected()
    for one in _first(len(_waiting)):
        _judge(one)


def look() -> None:
    """Give the verdicts over what has arrived, without waiting.

    Raises:
        Exception: the first that a verdict raised; it has a note of the others.
    """
    for one in _first(len(_waiting)):
        if not one.is_here():
            break
        _judge(one)
    with _lock:
        items = [] if _waiting else _collected.pop(_BETWEEN, [])
    _send(items)
    _raise()


def settle() -> None:
    """Wait for the devices, and give all verdicts over what was computed until now.

    On devices other than the CPU nothing waits for the comparison of what backward has rebuilt with the forward pass,
    of the drift, and of Gramians with gradients. Errors come with a later step then, and with this function at the
    latest: call it at the end of training, and before parameters are saved.

    Raises:
        RebuildError: a rebuild did not repeat the forward pass.
        GramianError: a Gramian does not fit the gradient that it weighs.

    Warns:
        DriftWarning: a reconstruction is off by more than the threshold.

    Example:
        >>> import torch, recollect
        >>> x = torch.randn(3, requires_grad=True)
        >>> recollect.checkpoint(torch.exp, x * 1).sum().backward()
        >>> recollect.frames.settle()
    """
    arrive()
    _raise()


def _raise() -> None:
    with _lock:
        if not _raised:
            return
        first, *others = _raised
        _raised.clear()
    for other in others:
        first.add_note(f"Another one: {type(other).__name__}: {other}")
    raise first


def _report() -> None:
    """Tell at the end of the process what nobody has asked for."""
    try:
        settle()
    except Exception as error:
        notes = "".join(f". {note}" for note in getattr(error, "__notes__", ()))
        warnings.warn(f"found when the process ended: {type(error).__name__}: {error}{notes}", stacklevel=1)


atexit.register(_report)
