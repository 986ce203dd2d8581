"""The base of invertible modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from recollect._arguments import pack, unpack
from recollect.frames import Kept, frames_apply, run_frame, run_invertible
from recollect.invertible._conditions import Carried, Takes
from recollect.invertible._measured import Measured
from recollect.invertible.checks import Subject, check_subject, plainly

__all__ = ["Module"]

_FLAGS = ("seed", "checkpoint", "invertible", "reversed")


class Module(Measured):
    """A module that is written as a function and its inverse, and trains without keeping its inputs.

    Subclasses define :meth:`function` and :meth:`inverse`, both from positional arguments to a tensor or a tuple, and
    no ``forward``. What :meth:`function` saves for backward is dropped, its inputs too; backward asks :meth:`inverse`
    for the inputs and runs :meth:`function` again. Modules whose outputs are the next one's inputs form a chain that
    keeps its last outputs only. Inputs that somebody else holds stay as they are.

    *Conditions* are arguments that are not inverted: ``function(x, c)`` with ``inverse(y, c)``, which returns x alone.
    They stand behind the inputs and outputs, or are given by keyword, which both then take; they are kept. How many
    there are follows from the signatures, or from :attr:`num_conditions`.

    A module that has a log-determinant says so by a third method, ``function_and_log_det``, with the arguments of
    :meth:`function`: it returns the outputs, and last log|det dy/dx| of shape [batch]. That of the inverse follows
    from it. Without one, :meth:`forward_and_log_det` raises.

    Attributes:
        checkpoint: ``False`` makes it an ordinary module that keeps everything.
        invertible: ``False`` makes it a checkpoint, which keeps its inputs.
        seed: whether a rebuild draws the same random numbers as the forward pass; without it the gradient of
            modules with randomness inside is wrong. It costs nothing where none are drawn.

    All three, and the direction (:meth:`reverse`), can be changed at any time between steps and show in ``repr``. They
    are settings and not state: ``state_dict`` holds tensors only, which mean the same function and inverse in whichever
    direction the module runs. To load that of a reversed module is to load its function; call :meth:`reverse` for the
    direction. (What earlier versions saved has the flags, and sets them.)

    Args:
        *args: of the next class, for modules that extend one of torch's.
        anchor_every: in a chain, keep every s-th activation, which bounds numerical drift; ``None`` keeps none.
        drift_threshold: relative reconstruction error above which a :class:`~recollect.frames.DriftWarning` is given.
        certify: whether what backward rebuilds is compared with the forward: ``True`` allows for rounding, ``"exact"``
            takes equal bits alone, ``False`` compares nothing.
        **kwargs: of the next class.

    Raises:
        TypeError: a subclass defines ``forward`` and no :meth:`function`.
        NotImplementedError: a subclass without :meth:`inverse` is called while gradients are enabled, and neither
            ``checkpoint`` nor ``invertible`` is ``False``.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> class Scale(inn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log_scale = torch.nn.Parameter(torch.zeros(3))
        ...
        ...     def function(self, x):
        ...         return x * self.log_scale.exp()
        ...
        ...     def inverse(self, y):
        ...         return y * (-self.log_scale).exp()
        ...
        ...     def function_and_log_det(self, x):
        ...         return self.function(x), self.log_scale.sum().expand(len(x))
        >>> Scale().check(torch.randn(10, 3))
        True
    """

    _hands_on: ClassVar[bool] = False  # its conditions to modules inside, which know what they take
    _written: ClassVar[tuple[str, str] | None] = ("function", "inverse")
    _moves: ClassVar[bool] = False  # values about, and changes none
    seed: bool = True
    _checkpoint: bool = True
    _invertible: bool = True
    _reversed: bool = False

    # What subclasses write.

    def function(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, a tensor or a tuple.

        Runs twice in a training step: in the forward pass (:func:`recollect.in_dry_mode` is true) and in backward
        (:func:`recollect.in_backward` is true).
        """
        raise NotImplementedError(f"{type(self).__name__} must define function(*args)")

    def inverse(self, *args: Any, **kwargs: Any) -> Any:
        """Return the arguments of :meth:`function`, in their order, less its conditions, for outputs and conditions."""
        raise NotImplementedError(f"{type(self).__name__} must define inverse(*outputs)")

    @property
    def reversible(self) -> bool:
        """Whether function and inverse can be switched; override it to return ``True`` where they can."""
        return False

    @property
    def num_outputs(self) -> int | None:
        """How many of :attr:`call_function`'s outputs :meth:`forward` returns; ``None``: all.

        The others are hidden: they are kept for the inverse. Negative numbers count from the end, as in slices.
        """
        return None

    @property
    def num_inputs(self) -> int | None:
        """How many of :attr:`call_inverse`'s outputs are inputs again when inverses are composed; ``None``: all."""
        return None

    @property
    def num_conditions(self) -> int | None:
        """How many of the last positional arguments are conditions.

        ``None``: as many as :meth:`inverse` needs beyond what :meth:`function` returns, and as both take by default
        values of theirs. Override it where one of them takes ``*args``.
        """
        return None

    def function_and_log_det(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the outputs of :meth:`function`, and last the logarithm of |det dy/dx|, one for each batch element."""
        raise NotImplementedError(
            f"{type(self).__name__} has no log-determinant; if it can have one, define function_and_log_det(*args) "
            "returning (*outputs, log_det of shape [batch])"
        )

    def inverse_and_log_det(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the outputs of :meth:`inverse`, and last the logarithm of |det dx/dy|, one for each batch element."""
        inputs = pack(self.inverse(*args, **kwargs))
        conditions = args[len(args) - self._conditions(self.inverse, self.function, inputs, len(args)) :]
        return (*inputs, -self.function_and_log_det(*inputs, *conditions, **kwargs)[-1])

    # What users call.

    def forward(self, *args: Any, keep: Iterable[Tensor] = (), **kwargs: Any) -> Any:
        """Return what :attr:`call_function` returns, less its hidden outputs.

        Args:
            *args: positional arguments: inputs, then conditions.
            keep: input tensors that stay in memory, although the inverse could bring them back.
            **kwargs: conditions by keyword; function and inverse both get them.
        """
        return self.process(self._run(self.call_function, self.call_inverse, args, kwargs, keep))

    def forward_and_log_det(self, *args: Any, keep: Iterable[Tensor] = (), **kwargs: Any) -> tuple[Any, Tensor]:
        """Return :meth:`forward`'s result and the logarithm of its Jacobian determinant's absolute value.

        Args:
            *args: positional arguments, of which the first dimension is the batch.
            keep: input tensors that stay in memory.
            **kwargs: as in :meth:`forward`.

        Returns:
            The outputs, and log|det| of shape [batch].

        Raises:
            NotImplementedError: the module has no log-determinant.
        """
        run = self.call_function_and_log_det
        *outputs, log_det = self._run(run, self.call_inverse, args, kwargs, keep, log_det=True)
        return self.process(tuple(outputs)), log_det

    def check(self, *args: Any, rtol: float = 1e-3, atol: float = 1e-5, **kwargs: Any) -> bool:
        """Check that the module is what it says: its inverse, its repetition, its gradients.

        The module, its gradients, its buffers and the random state are left as they were.

        Args:
            *args: inputs to try it on.
            rtol: relative tolerance, against the largest value of each tensor.
            atol: absolute tolerance.
            **kwargs: keyword arguments of function and inverse.

        Returns:
            ``True``.

        Raises:
            AssertionError: the inverse does not give back the inputs, or a second run gives other outputs, or the
                gradients are not those of plain autograd; the message says which, and by how much.
        """
        return check_subject(self._subject(kwargs), args, rtol, atol, lambda duplicate: duplicate._subject(kwargs))

    def _subject(self, kwargs: Mapping[str, Any]) -> Subject:
        """What is checked: the module in its present direction, with its present flags."""

        def plain(*args: Any, **keywords: Any) -> Any:
            with self.temp_mode(checkpoint=False):
                return plainly(self, *args, **keywords)

        carried = Carried(self, self.call_function, self.call_inverse)
        runs: list[Callable[..., Any]] = [carried, carried.inverse, self, plain]
        function, inverse, framed, plain = (functools.partial(run, **kwargs) if kwargs else run for run in runs)
        return Subject(self, function, inverse, framed, plain, self.seed)

    def _run(
        self,
        function: Callable[..., Any],
        inverse: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        keep: Iterable[Tensor],
        log_det: bool = False,
    ) -> Any:
        self._forget_drift()
        if not self.checkpoint or not frames_apply():
            return function(*args, **kwargs)
        if not self.invertible:
            run = functools.partial(function, **kwargs) if kwargs else function
            return self._kept(run, args)
        self._check_inverse("set its attribute invertible to False: it is then a checkpoint, which keeps its inputs")
        carried = Carried(self, function, inverse, log_det) if len(args) > 1 else None
        outputs = run_invertible(
            function if carried is None else carried,
            inverse if carried is None else carried.inverse,
            args,
            dict(kwargs),
            seed=self.seed,
            keep=keep,
            takes=-1 if log_det else None,
            gauge=self._gauge,
            anchor_every=self.anchor_every,
            moves=self._moves,
            certify=self.certify,
            certificate=self.certificate,
        )
        return outputs if carried is None else carried.without(outputs)

    def _conditions(
        self, function: Callable[..., Any], inverse: Callable[..., Any], outputs: tuple[Any, ...], given: int
    ) -> int:
        """Return how many of so many arguments of ``function`` are conditions; see :attr:`num_conditions`."""
        if given < 2:
            return 0
        takes, back, declared = Takes.of(function), Takes.of(inverse), self.num_conditions
        if declared is not None:
            return min(declared, given - 1) if takes.most is None else max(0, given - max(takes.most - declared, 1))
        number = back.least - len(outputs)
        if takes.most is not None and back.most is not None:
            number = max(number, min(given - takes.least, back.most - len(outputs)))
        return min(max(number, 0), given - 1)

    def _takes_most(self, function: Callable[..., Any]) -> int | None:
        """Return how many positional arguments ``function`` takes; ``None``: any number."""
        return Takes.of(function).most

    def _named(self, function: Callable[..., Any], kwargs: Mapping[str, Any], given: int) -> dict[str, Any]:
        """Return the keyword arguments that ``function`` takes behind so many positional ones."""
        return Takes.of(function).named(kwargs, given)

    def _takes_further(self, function: Callable[..., Any], inverse: Callable[..., Any], given: int) -> int | None:
        """Return how many conditions ``function`` takes behind so many other arguments; ``None``: any number."""
        takes, back, declared = Takes.of(function), Takes.of(inverse), self.num_conditions
        if takes.most is None:
            return declared or 0
        numbers = [takes.most - given, *([] if back.most is None else [back.most - 1])]
        return max(0, min(numbers if declared is None else [*numbers, declared]))

    def _kept(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a checkpoint, which keeps its inputs."""
        if not frames_apply():
            return run(*args)
        return run_frame(run, args, {}, Kept(), seed=self.seed, certify=self.certify, certificate=self.certificate)

    def process(self, args: Any, inverse: bool = False) -> Any:
        """Cut off what is hidden.

        Args:
            args: outputs of :attr:`call_function`, or with ``inverse`` those of :attr:`call_inverse`.
            inverse: which of the two.

        Returns:
            A tensor if one is left, else a tuple.
        """
        args = pack(args)
        visible = self.num_inputs if inverse else self.num_outputs
        shown = args[:visible]
        if not shown or (visible is not None and visible > len(args)):
            name = "num_inputs" if inverse else "num_outputs"
            raise ValueError(f"{type(self).__name__}: {name} is {visible}, of {len(args)} value(s)")
        return unpack(shown)

    # The direction.

    @property
    def call_function(self) -> Callable[..., Any]:
        """What :meth:`forward` runs: :meth:`function`, or :meth:`inverse` when reversed."""
        return self.inverse if self.reversed else self.function

    @property
    def call_inverse(self) -> Callable[..., Any]:
        """The inverse of :attr:`call_function`."""
        return self.function if self.reversed else self.inverse

    @property
    def call_function_and_log_det(self) -> Callable[..., Any]:
        """What :meth:`forward_and_log_det` runs."""
        return self.inverse_and_log_det if self.reversed else self.function_and_log_det

    def reverse(self, mode: bool | None = None) -> Module:
        """Switch function and inverse, so that :meth:`forward` runs the inverse and trains.

        Args:
            mode: whether the module shall be reversed; ``None`` changes what it is.

        Returns:
            The module itself.

        Raises:
            RuntimeError: the module is not reversible.
        """
        mode = not self.reversed if mode is None else bool(mode)
        if mode and not self.reversible:
            raise RuntimeError(
                f"{type(self).__name__} is not reversible: its function and inverse do not take each other's outputs "
                "alone. Override the property `reversible` to return True if they do"
            )
        self._reversed = mode
        return self

    @property
    def reversed(self) -> bool:
        """Whether function and inverse are switched."""
        return self._reversed

    @reversed.setter
    def reversed(self, mode: bool) -> None:
        self.reverse(mode)

    # The flags.

    @property
    def checkpoint(self) -> bool:
        """Whether what backward needs is dropped."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, enabled: bool) -> None:
        self._checkpoint = bool(enabled)

    @property
    def invertible(self) -> bool:
        """Whether the inputs are dropped too; never without ``checkpoint``."""
        return self._checkpoint and self._invertible

    @invertible.setter
    def invertible(self, enabled: bool) -> None:
        self._invertible = bool(enabled)
        self._checkpoint = self._checkpoint or self._invertible

    @contextmanager
    def temp_mode(self, **flags: bool) -> Iterator[Module]:
        """Set flags for the body of a ``with`` statement.

        Args:
            **flags: of ``seed``, ``checkpoint``, ``invertible`` and ``reversed``.

        Raises:
            TypeError: another name.
            ValueError: ``checkpoint=False`` together with ``invertible=True``.
        """
        unknown = [name for name in flags if name not in _FLAGS]
        if unknown:
            raise TypeError(f"temp_mode takes {', '.join(_FLAGS)} (got {', '.join(unknown)})")
        if flags.get("invertible") and not flags.get("checkpoint", True):
            raise ValueError("invertible=True needs checkpoint=True: without it, everything is kept")
        before = (self.seed, self._checkpoint, self._invertible, self.reversed)
        try:
            for name in _FLAGS:
                if name in flags and getattr(self, name) != bool(flags[name]):
                    setattr(self, name, bool(flags[name]))
            yield self
        finally:
            self.seed, self._checkpoint, self._invertible, reversed_before = before
            if self.reversed != reversed_before:
                self.reverse(reversed_before)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        flags = state_dict.get(f"{prefix}_extra_state")
        if isinstance(flags, dict) and set(flags) == set(_FLAGS):  # of versions that saved them
            del state_dict[f"{prefix}_extra_state"]
            self.seed, self._checkpoint, self._invertible = (bool(flags[name]) for name in _FLAGS[:3])
            if self.reversed != flags["reversed"]:
                self.reverse(flags["reversed"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Return the module's own settings and the flags."""
        flags = f"reversed={self.reversed}, checkpoint={self.checkpoint}"
        if self.checkpoint:
            flags += f", invertible={self.invertible}, seed={self.seed}"
        own = super().extra_repr()
        return f"{own}, {flags}" if own else flags
