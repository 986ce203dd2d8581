"""The base of invertible modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from recollect._arguments import pack, unpack
from recollect.frames import checkpoint, frames_apply, run_invertible
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

    Attributes:
        checkpoint: ``False`` makes it an ordinary module that keeps everything.
        invertible: ``False`` makes it a checkpoint, which keeps its inputs.
        seed: whether a rebuild draws the same random numbers as the forward pass; without it the gradient of
            modules with randomness inside is wrong. It costs nothing where none are drawn.

    All three can be changed at any time between steps, travel in ``state_dict`` and show in ``repr``.

    Args:
        *args: of the next class, for modules that extend one of torch's.
        anchor_every: in a chain, keep every s-th activation, which bounds numerical drift; ``None`` keeps none.
        drift_threshold: relative reconstruction error above which a :class:`~recollect.frames.DriftWarning` is given.
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
        >>> Scale().check(torch.randn(10, 3))
        True
    """

    _written: ClassVar[tuple[str, str] | None] = ("function", "inverse")
    seed: bool = True
    _checkpoint: bool = True
    _invertible: bool = True
    _reversed: bool = False

    # What subclasses write.

    def function(self, *args: Any) -> Any:
        """Return the outputs, a tensor or a tuple, for positional arguments.

        Runs twice in a training step: in the forward pass (:func:`recollect.in_dry_mode` is true) and in backward
        (:func:`recollect.in_backward` is true).
        """
        raise NotImplementedError(f"{type(self).__name__} must define function(*args)")

    def inverse(self, *args: Any) -> Any:
        """Return the arguments of :meth:`function`, in their order, for its outputs."""
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

    def function_and_log_det(self, *args: Any) -> tuple[Any, ...]:
        """Return the outputs of :meth:`function`, and last the logarithm of |det dy/dx|, one for each batch element."""
        raise NotImplementedError(f"{type(self).__name__} has no log-determinant")

    def inverse_and_log_det(self, *args: Any) -> tuple[Any, ...]:
        """Return the outputs of :meth:`inverse`, and last the logarithm of |det dx/dy|, one for each batch element."""
        inputs = pack(self.inverse(*args))
        return (*inputs, -self.function_and_log_det(*inputs)[-1])

    # What users call.

    def forward(self, *args: Any, keep: Iterable[Tensor] = ()) -> Any:
        """Return what :attr:`call_function` returns, less its hidden outputs.

        Args:
            *args: positional arguments.
            keep: input tensors that stay in memory, although the inverse could bring them back.
        """
        return self.process(self._run(self.call_function, self.call_inverse, args, keep))

    def forward_and_log_det(self, *args: Any, keep: Iterable[Tensor] = ()) -> tuple[Any, Tensor]:
        """Return :meth:`forward`'s result and the logarithm of its Jacobian determinant's absolute value.

        Args:
            *args: positional arguments, of which the first dimension is the batch.
            keep: input tensors that stay in memory.

        Returns:
            The outputs, and log|det| of shape [batch].

        Raises:
            NotImplementedError: the module has no log-determinant.
        """
        *outputs, log_det = self._run(self.call_function_and_log_det, self.call_inverse, args, keep, takes=-1)
        return self.process(tuple(outputs)), log_det

    def check(self, *args: Any, rtol: float = 1e-3, atol: float = 1e-5) -> bool:
        """Check that the module is what it says: its inverse, its repetition, its gradients.

        The module, its gradients, its buffers and the random state are left as they were.

        Args:
            *args: inputs to try it on.
            rtol: relative tolerance, against the largest value of each tensor.
            atol: absolute tolerance.

        Returns:
            ``True``.

        Raises:
            AssertionError: the inverse does not give back the inputs, or a second run gives other outputs, or the
                gradients are not those of plain autograd; the message says which, and by how much.
        """
        return check_subject(self._subject(), args, rtol, atol, lambda duplicate: duplicate._subject())

    def _subject(self) -> Subject:
        """What is checked: the module in its present direction, with its present flags."""

        def plain(*args: Any) -> Any:
            with self.temp_mode(checkpoint=False):
                return plainly(self, *args)

        return Subject(self, self.call_function, self.call_inverse, self, plain, self.seed)

    def _run(
        self,
        function: Callable[..., Any],
        inverse: Callable[..., Any],
        args: tuple[Any, ...],
        keep: Iterable[Tensor],
        takes: int | None = None,
    ) -> Any:
        self._forget_drift()
        if not self.checkpoint or not frames_apply():
            return function(*args)
        if not self.invertible:
            return checkpoint(function, *args, seed=self.seed)
        self._check_inverse("set its attribute invertible to False: it is then a checkpoint, which keeps its inputs")
        return run_invertible(
            function,
            inverse,
            args,
            seed=self.seed,
            keep=keep,
            takes=takes,
            gauge=self._gauge,
            anchor_every=self.anchor_every,
        )

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

    def get_extra_state(self) -> dict[str, bool]:
        """Return the flags, for ``state_dict``."""
        return {
            "seed": self.seed,
            "checkpoint": self._checkpoint,
            "invertible": self._invertible,
            "reversed": self.reversed,
        }

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Take the flags out of a ``state_dict``."""
        self.seed, self._checkpoint, self._invertible = state["seed"], state["checkpoint"], state["invertible"]
        if self.reversed != state["reversed"]:
            self.reverse(state["reversed"])

    def extra_repr(self) -> str:
        """Return the module's own settings and the flags."""
        flags = f"reversed={self.reversed}, checkpoint={self.checkpoint}"
        if self.checkpoint:
            flags += f", invertible={self.invertible}, seed={self.seed}"
        own = super().extra_repr()
        return f"{own}, {flags}" if own else flags
