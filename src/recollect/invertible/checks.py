"""Whether a module is invertible as it says: what `Module.check` and `recollect.testing` are made of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recollect._arguments import pack
from recollect.frames import DriftWarning, FrameError, RandomState, RebuildError, backward_mode, devices_of
from recollect.invertible._measured import Measured

__all__ = ["Subject", "check_subject", "plainly"]


@contextmanager
def _training_as(module: nn.Module, mode: bool) -> Iterator[None]:
    """Set the training flags for the body, unless the module's own is so already."""
    flags = [(part, part.training) for part in module.modules()]
    try:
        if module.training != mode:
            module.train(mode)
        yield
    finally:
        for part, training in flags:
            part.training = training


@contextmanager
def _uncertified(module: nn.Module) -> Iterator[None]:
    """Let modules certify nothing for the body: then a wrong rebuild ends in gradients, which can be compared."""
    parts = [(part, part.certify) for part in module.modules() if isinstance(part, Measured)]
    try:
        for part, _ in parts:
            part.certify = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)  # the comparison says more
            yield
    finally:
        for part, certify in parts:
            part.certify = certify


@contextmanager
def _as_before(module: nn.Module, state: RandomState) -> Iterator[None]:
    """Run the body from the same buffers and random state as every other, as rebuilds are."""
    with state.replayed(), ExitStack() as stack:
        copies: dict[int, Tensor] = {}  # a buffer of several modules stays one
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and not is_lazy(buffer):
                    stack.callback(part._buffers.__setitem__, name, buffer)
                    part._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        yield


@contextmanager
def _left_as_it_is(module: nn.Module) -> Iterator[None]:
    """Give parameters their values again: some modules initialise theirs when they first run."""
    with ExitStack() as stack:
        for parameter in module.parameters():
            if not is_lazy(parameter):
                stack.callback(_restore, parameter, parameter.detach().clone())
        yield


def _restore(parameter: Tensor, value: Tensor) -> None:
    if not torch.equal(parameter.detach(), value):
        parameter.data.copy_(value)


_PLAIN = "recollect compares with plain autograd here, which uses no saved-tensor hooks"


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Args:
        module: whose parameters, buffers and training flags count.
        function: from the arguments to all outputs, hidden ones too, without frames.
        inverse: from all outputs to the arguments again.
        framed: from the arguments to the visible outputs, as in training.
        plain: the same with plain autograd.
        seed: whether random numbers are replayed.
        uncertified: ``framed`` without a certificate, where that is not the ``certify`` of the modules inside.
    """

    module: nn.Module
    function: Callable[..., Any]
    inverse: Callable[..., Any]
    framed: Callable[..., Any]
    plain: Callable[..., Any]
    seed: bool = True
    uncertified: Callable[..., Any] | None = None


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function in which all frames, however deep inside, step aside."""
    state = RandomState(devices_of(args))
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_PLAIN):
            return function(*args, **kwargs)
    except RuntimeError as error:
        if _PLAIN not in str(error):
            raise
    with state.replayed():  # hooks that are not ours belong to what is checked
        return function(*args, **kwargs)


def check_subject(
    subject: Subject,
    args: tuple[Any, ...],
    rtol: float,
    atol: float,
    remake: Callable[[Any], Subject] | None = None,
) -> bool:
    """Check that the inverse gives back the inputs, that a second run repeats the first, and the gradients.

    Args:
        subject: what is checked.
        args: inputs to try it on.
        rtol: relative tolerance.
        atol: absolute tolerance.
        remake: makes the subject for a copy of its module, to find out whether precision is the cause of a failure.

    Returns:
        ``True``.

    Raises:
        AssertionError: one of the three fails; the message says which, by how much, and what to try.
    """
    state = RandomState(devices_of(args))
    with state.replayed(), _left_as_it_is(subject.module):
        failure = _inverse_differs(subject, args, state, rtol, atol)
        suspicion = None
        if failure and _draws(subject, args, state) and _holds_in_evaluation(subject, args, state, rtol, atol):
            # Modules of modules invert their parts in reverse order, and so does the random state that is replayed;
            # in training each part has its own. Whether that goes well, the gradients tell.
            suspicion, failure = f"in training mode {failure}; does it draw random numbers in another order?", None
        if failure:
            if remake is not None and _holds_in_double(subject, remake, args, state, rtol, atol):
                failure += "; in double precision it does: use float64, or a better conditioned inverse"
            raise AssertionError(failure)
        failure = _second_differs(subject, args, state, rtol, atol)
        if failure:
            if not subject.seed and not _second_differs(replace(subject, seed=True), args, state, rtol, atol):
                failure += "; with seed=True, which replays random numbers, it does"
            raise AssertionError(failure)
        failure = _gradients_differ(subject, args, state, rtol, atol)
        if failure:
            if not subject.seed:
                failure += "; try seed=True, which replays random numbers"
            if suspicion:
                failure += f"; {suspicion}"
            raise AssertionError(failure)
    return True


def _inverse_differs(
    subject: Subject, args: tuple[Any, ...], state: RandomState, rtol: float, atol: float
) -> str | None:
    name = type(subject.module).__name__
    with _as_before(subject.module, state), torch.enable_grad():
        outputs = pack(subject.function(*_copies(args)))
    with _as_before(subject.module, state), torch.no_grad(), backward_mode():
        inputs = pack(subject.inverse(*outputs))
    for i, arg in enumerate(args):
        if not isinstance(arg, Tensor):
            continue
        back = inputs[i] if i < len(inputs) else None
        if not isinstance(back, Tensor):
            if not _differentiable(arg):  # kept in any case
                continue
            return f"{name}: the inverse returned {len(inputs)} value(s) and no tensor for input {i}"
        difference = _difference(back, arg, rtol, atol)
        if difference:
            return f"{name}: the inverse does not give back input {i}: {difference}"
    return None


def _second_differs(
    subject: Subject, args: tuple[Any, ...], state: RandomState, rtol: float, atol: float
) -> str | None:
    name = type(subject.module).__name__
    with _as_before(subject.module, state), torch.enable_grad():
        first = pack(subject.function(*_copies(args)))
        later = RandomState(devices_of(args))
    # With grad enabled as in a rebuild: some of torch's modules compute otherwise without.
    with _as_before(subject.module, state if subject.seed else later), torch.enable_grad(), backward_mode():
        second = pack(subject.function(*_copies(args)))
    if len(first) != len(second):
        return f"{name}: a second run of the function returned {len(second)} value(s), and the first {len(first)}"
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        difference = _difference(b, a, rtol, atol) if isinstance(a, Tensor) else None
        if difference:
            return f"{name}: a second run of the function does not repeat output {i}: {difference}"
    return None


def _draws(subject: Subject, args: tuple[Any, ...], state: RandomState) -> bool:
    """Whether the function draws random numbers."""
    with _as_before(subject.module, state), torch.no_grad(), backward_mode():
        subject.function(*_copies(args))
        after = RandomState(devices_of(args))
    return any(not torch.equal(a, b) for (_, a), (_, b) in zip(state.states, after.states, strict=True))


def _holds_in_evaluation(subject: Subject, args: tuple[Any, ...], state: RandomState, rtol: float, atol: float) -> bool:
    with _training_as(subject.module, False):
        return _inverse_differs(subject, args, state, rtol, atol) is None


def _gradients_differ(
    subject: Subject, args: tuple[Any, ...], state: RandomState, rtol: float, atol: float
) -> str | None:
    name = type(subject.module).__name__
    for mode in dict.fromkeys((subject.module.training, True)):
        with _training_as(subject.module, mode):
            with _as_before(subject.module, state):
                expected, needed = _gradients(subject.plain, subject, args)
            refusal = None
            try:
                with _as_before(subject.module, state):
                    found, made = _gradients(subject.framed, subject, args)
            except FrameError as error:
                refusal = f"{name}: there are no gradients, and there are with plain autograd: {error}"
                if not isinstance(error, RebuildError):
                    return refusal
            if refusal is not None:  # which gradients it would spoil says more
                try:
                    with _as_before(subject.module, state), _uncertified(subject.module):
                        found, made = _gradients(subject.uncertified or subject.framed, subject, args)
                except FrameError:
                    return refusal
        if needed != made:
            return f"{name}: the outputs' requires_grad is {made}, and {needed} with plain autograd"
        for key, gradient in expected.items():
            difference = _difference(found[key], gradient, rtol, atol)
            if difference:
                failure = f"{name}: the gradient of {key} is not that of plain autograd: {difference}"
                return failure if refusal is None else f"{failure}; {_REFUSED}"
        if refusal is not None:
            return refusal
    return None


_REFUSED = "a training step raises RebuildError instead, unless certify is False"


def _gradients(
    run: Callable[..., Any], subject: Subject, args: tuple[Any, ...]
) -> tuple[dict[str, Tensor | None], list[bool]]:
    """Return the gradients of a random weighting of the outputs by name, and which outputs require grad."""
    leaves = {f"input {i}": arg.detach().clone().requires_grad_() for i, arg in enumerate(args) if _differentiable(arg)}
    wanted = {**leaves, **{k: p for k, p in subject.module.named_parameters() if p.requires_grad}}
    # Not the leaves themselves: those are held anyway, and their inverse would not be asked for.
    given = [leaves[f"input {i}"].clone() if f"input {i}" in leaves else arg for i, arg in enumerate(args)]
    with torch.enable_grad():
        outputs = pack(run(*given))
        del given
        flags = [isinstance(output, Tensor) and output.requires_grad for output in outputs]
        targets = [output for output, needed in zip(outputs, flags, strict=True) if needed]
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype, device="cpu").to(t.device) for t in targets]
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if targets and wanted:
            gradients = torch.autograd.grad(targets, list(wanted.values()), weights, allow_unused=True)
    return dict(zip(wanted, gradients, strict=True)), flags


def _holds_in_double(
    subject: Subject,
    remake: Callable[[Any], Subject],
    args: tuple[Any, ...],
    state: RandomState,
    rtol: float,
    atol: float,
) -> bool:
    try:
        double = remake(copy.deepcopy(subject.module).double())
        wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        return _inverse_differs(double, wide, state, rtol, atol) is None
    except Exception:  # a module that cannot be copied or widened: then nothing is known
        return False


def _difference(found: Any, expected: Any, rtol: float, atol: float) -> str | None:
    """Return how two tensors differ, or None if they agree within ``atol + rtol * largest value``."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return None if found is expected else f"{_kind(found)} instead of {_kind(expected)}"
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}"
    if expected.layout is not torch.strided or expected.numel() == 0:
        return None
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.detach().to(wide), expected.detach().to(wide)
    error, scale = float((a - b).abs().max()), float(b.abs().max())
    if error <= atol + rtol * scale or torch.equal(a, b):
        return None
    return f"largest difference {error:.1e}, of values up to {scale:.1e} (rtol={rtol:g}, atol={atol:g})"


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _differentiable(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and (value.is_floating_point() or value.is_complex())
    )


def _copies(args: tuple[Any, ...]) -> list[Any]:
    """Return the arguments, tensors as copies: the function may work in place."""
    return [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
