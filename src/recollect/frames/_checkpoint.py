"""Checkpoints: one frame around a function, whose inputs come from a source."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from recollect._arguments import Certify, check_certify
from recollect.frames._frame import run_frame
from recollect.frames._modes import frames_apply
from recollect.frames.sources._inverse import Inverse
from recollect.frames.sources._kept import Kept
from recollect.frames.sources._source import Source

__all__ = ["checkpoint", "checkpoint_sequential"]

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

_KEPT = Kept()


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    seed: bool = True,
    enabled: bool = True,
    inverse: Callable[..., Any] | None = None,
    keep: Iterable[Tensor] = (),
    source: Source | None = None,
    certify: Certify = True,
    use_reentrant: bool | None = None,
    preserve_rng_state: bool | None = None,
    context_fn: Contexts | None = None,
    determinism_check: str | None = None,
    debug: bool | None = None,
    early_stop: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run ``function(*args, **kwargs)`` without keeping what autograd saves in it; rebuild that when backward asks.

    Takes the place of :func:`torch.utils.checkpoint.checkpoint`. Without ``source`` and ``inverse`` the inputs are
    kept, and the function is run again from them. With ``inverse`` the inputs are not kept either: they are recollected
    from the outputs. Checkpoints with an inverse whose outputs are the next one's inputs form a chain, which keeps its
    last outputs only.

    The rebuild repeats the forward: random state of the CPU and of the inputs' devices, autocast and other contexts,
    attributes, training flags, parameters and buffers of the modules that ran are those of the forward, and all of them
    are afterwards what they were before. What is handed to backward is compared with the forward's by fingerprints.
    Any number of backward passes, ``torch.autograd.grad``, double backward and ``is_grads_batched`` work as without.
    Where nothing is saved for backward (no grad, inference mode) or saved-tensor hooks do not exist (torch.func,
    whole-model torch.compile), the function runs plain.

    Args:
        function: takes and returns tensors, containers of tensors, or anything else.
        *args: positional arguments; tensors within containers (dicts, dataclasses, graphs, partials, ...) are seen too.
        seed: replay random state in rebuilds. Needed for dropout's gradient to be right.
        enabled: with ``False`` the function runs plain.
        inverse: called as ``inverse(*outputs)``; short for ``source=Inverse(inverse, keep)``.
        keep: input tensors that stay in memory although there is an inverse.
        source: where the inputs come from in backward; ``None``: they are kept.
        certify: ``True`` accepts a rebuild whose values are the forward's up to the rounding of their dtype,
            ``"exact"`` only one of equal bits, ``False`` compares no values.
        use_reentrant: torch's keyword. There is one implementation, and nothing to choose.
        preserve_rng_state: torch's keyword for ``seed``.
        context_fn: torch's keyword: returns the contexts in which the function and its rebuild run, such as
            :func:`torch.utils.checkpoint.create_selective_checkpoint_contexts`.
        determinism_check: torch's keyword. What is rebuilt is always compared.
        debug: torch's keyword. Errors always say what differs.
        early_stop: torch's keyword: whether a rebuild ends when everything that is still needed is there (default), or
            runs to the function's end.
        **kwargs: keyword arguments of the function. One that has the name of an argument above goes into
            ``functools.partial(function, seed=...)``.

    Returns:
        What the function returns.

    Raises:
        TypeError: ``inverse`` cannot be called, or ``source`` is no source.
        ValueError: both ``inverse`` and ``source`` are given, or ``certify`` is none of the three.
        InPlaceError: in backward, when an input, output, parameter or buffer that the function reads was changed in
            place since the forward.
        RebuildError: in backward, when the function computed something else than in the forward, or the inverse did
            not return the inputs.
        GraphFreedError: on a second backward without ``retain_graph=True`` in the first.

    Example:
        >>> import torch, recollect
        >>> x = torch.randn(4, requires_grad=True)
        >>> recollect.checkpoint(torch.sin, x).sum().backward()
        >>> torch.allclose(x.grad, torch.cos(x))
        True
    """
    if inverse is not None:
        if source is not None:
            raise ValueError("inverse and source are both given: source=Inverse(inverse) is what inverse stands for")
        if not callable(inverse):
            raise TypeError(f"inverse must be a function of the outputs (got {inverse!r})")
    if source is not None and not isinstance(source, Source):
        raise TypeError(f"source must be a recollect.frames.Source, such as Offload() (got {source!r})")
    if certify is not True:
        check_certify(certify)
    if use_reentrant or determinism_check is not None or debug:
        _say_once(use_reentrant=use_reentrant or None, determinism_check=determinism_check, debug=debug or None)
    if preserve_rng_state is not None:
        seed = preserve_rng_state
    if not enabled or not frames_apply():
        return function(*args, **kwargs)
    if inverse is not None:
        source = Inverse(inverse, keep)
    return run_frame(
        function,
        args,
        kwargs,
        source if source is not None else _KEPT,
        seed=seed,
        certify=certify,
        early_stop=early_stop is not False,
        contexts=None if context_fn is None else context_fn(),
    )


def checkpoint_sequential(
    functions: nn.Sequential | Iterable[Callable[..., Any]],
    segments: int,
    input: Any,
    use_reentrant: bool | None = None,
    **options: Any,
) -> Any:
    """Run functions one after the other in ``segments`` checkpoints; the last one keeps what it saves.

    Takes the place of :func:`torch.utils.checkpoint.checkpoint_sequential`.

    Args:
        functions: a ``Sequential``, or functions of one argument.
        segments: how many parts, at least 1 and at most the number of functions.
        input: of the first function.
        use_reentrant: as in :func:`checkpoint`.
        **options: of :func:`checkpoint`.

    Returns:
        What the last function returns.

    Raises:
        ValueError: ``segments`` is out of range.

    Example:
        >>> import torch, recollect
        >>> layers = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(6)])
        >>> recollect.checkpoint_sequential(layers, 3, torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """
    layers: list[Callable[..., Any]]
    layers = list(functions.children()) if isinstance(functions, nn.Sequential) else list(functions)
    if not 1 <= segments <= max(len(layers), 1):
        raise ValueError(f"segments must be from 1 to the number of functions, {len(layers)} (got {segments})")
    size = len(layers) // segments
    for start in range(0, size * (segments - 1), size):
        part = _InSequence(layers[start : start + size])
        input = checkpoint(part, input, use_reentrant=use_reentrant, **options)
    return _InSequence(layers[size * (segments - 1) :])(input)


class _InSequence:
    """Functions one after the other."""

    def __init__(self, functions: list[Callable[..., Any]]) -> None:
        self.functions = functions

    @property
    def owner(self) -> Callable[..., Any] | _InSequence:
        """The first function, for messages."""
        return self.functions[0] if self.functions else self

    def __call__(self, value: Any) -> Any:
        for function in self.functions:
            value = function(value)
        return value


_MEANINGLESS = {
    "use_reentrant": "there is one implementation, which is not reentrant",
    "determinism_check": "what is rebuilt is always compared (certify=False switches that off)",
    "debug": "errors always say what differs",
}
_said: set[str] = set()


def _say_once(**given: Any) -> None:
    """Warn of torch's keywords that mean nothing here, once in a process."""
    for name, value in given.items():
        if value is not None and value != "default" and name not in _said:
            _said.add(name)
            warnings.warn(f"recollect.checkpoint: {name}={value!r} has no effect: {_MEANINGLESS[name]}", stacklevel=3)
