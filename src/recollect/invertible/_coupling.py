"""Couplings: invertible whatever their blocks compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recollect.frames import Add, Transform, checkpoint, couple_by, frames_apply, uncouple_by
from recollect.invertible._algebra import values_log_det, zero_log_det
from recollect.invertible._module import Module
from recollect.invertible.checks import Subject

__all__ = ["AdditiveCoupling", "AffineCoupling"]


class _Coupling(Module):
    """What additive and affine couplings share; subclasses say what the blocks' outputs do to the groups.

    Args:
        *blocks: f_1..f_C, at least two; or one ``ModuleList`` of them.
        dim: the dimension that is split into C groups.
        **options: of :class:`Module`.
    """

    def __init__(self, *blocks: nn.Module, dim: int = 1, **options: Any) -> None:
        super().__init__(**options)
        given = blocks[0] if len(blocks) == 1 and isinstance(blocks[0], nn.ModuleList) else nn.ModuleList(blocks)
        if len(given) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least two blocks, one for each group (got {len(given)}): a lone group "
                "has no other group to take its block's input from"
            )
        self.blocks = given
        self.dim = dim

    def _transform(self, log_det: bool) -> Transform:
        raise NotImplementedError

    @property
    def reversible(self) -> bool:
        """Always."""
        return True

    def forward(self, *args: Any, keep: Iterable[Tensor] = ()) -> Any:
        """Return the coupled features.

        Args:
            *args: x, whose size in ``dim`` is divisible by the number of groups; then further arguments of every block,
                which are kept for backward.
            keep: input tensors that stay inside :func:`recollect.eager_release`; elsewhere a coupling frees nothing
                that somebody holds.
        """
        if not self._in_one_evaluation:
            return self._from_inputs(self.call_function, args)
        return self._coupled(args, keep, log_det=False)[0]

    def forward_and_log_det(self, *args: Any, keep: Iterable[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Return the coupled features and log|det| of shape [batch]; see :meth:`forward`."""
        if not self._in_one_evaluation:
            y, log_det = self._from_inputs(self.call_function_and_log_det, args)
            return y, log_det
        y, parts = self._coupled(args, keep, log_det=True)
        return y, _sum(parts, y)

    def function(self, *args: Any) -> Tensor:
        """Return X'_1 || ... || X'_C for x."""
        return self._function(args, log_det=False)[0]

    def inverse(self, *args: Any) -> Tensor:
        """Return x for X'_1 || ... || X'_C."""
        return self._inverse(args, log_det=False)[0]

    def function_and_log_det(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Return X'_1 || ... || X'_C and log|det| of shape [batch]."""
        y, parts = self._function(args, log_det=True)
        return y, _sum(parts, y)

    def inverse_and_log_det(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Return x and the inverse's log|det| of shape [batch]."""
        x, parts = self._inverse(args, log_det=True)
        return x, _sum(parts, x)

    def _function(self, args: tuple[Any, ...], log_det: bool) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        x, extra = self._split(args)
        return couple_by(self._transform(log_det), list(self.blocks), x, extra, dim=self.dim, enabled=False)

    def _inverse(self, args: tuple[Any, ...], log_det: bool) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        y, extra = self._split(args)
        return uncouple_by(self._transform(log_det), list(self.blocks), y, extra, dim=self.dim)

    def _subject(self) -> Subject:
        """What is checked; the inverse takes the blocks' further arguments too."""

        def function(x: Any, *extra: Any) -> Any:
            return (self.call_function(x, *extra), *extra)

        def inverse(y: Any, *extra: Any) -> Any:
            return (self.call_inverse(y, *extra), *extra)

        return replace(super()._subject(), function=function, inverse=inverse)

    @property
    def _in_one_evaluation(self) -> bool:
        """Whether inverse and rebuild can be one evaluation.

        The inverse of a coupling of two groups is one too, from the other end. With more groups it is not, and its
        blocks run in another order than in the function, so that what they draw could not be replayed.
        """
        return self.invertible and frames_apply() and (not self.reversed or len(self.blocks) == 2)

    def _coupled(
        self, args: tuple[Any, ...], keep: Iterable[Tensor], log_det: bool
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        self._forget_drift()
        x, extra = self._split(args)
        transform, blocks = self._transform(log_det), list(self.blocks)
        return couple_by(
            _Inverse(transform) if self.reversed else transform,
            blocks[::-1] if self.reversed else blocks,
            x,
            extra,
            dim=self.dim,
            flip=self.reversed,
            gauge=self._gauge,
            anchor_every=self.anchor_every,
            seed=self.seed,
            keep=keep,
        )

    def _from_inputs(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return checkpoint(function, *args, seed=self.seed) if self.checkpoint else function(*args)

    def _split(self, args: tuple[Any, ...]) -> tuple[Tensor, list[tuple[Any, ...]]]:
        """Return x, and for each block its further arguments."""
        if not args or not isinstance(args[0], Tensor):
            found = type(args[0]).__name__ if args else "nothing"
            raise TypeError(f"{type(self).__name__} takes a tensor, then further arguments of its blocks (got {found})")
        x, number = args[0], len(self.blocks)
        if not -x.dim() <= self.dim < x.dim() or x.size(self.dim) % number:
            raise ValueError(
                f"{type(self).__name__} splits dimension {self.dim} into {number} groups: it must exist, and its size "
                f"be divisible by {number} (got shape {list(x.shape)})"
            )
        return x, [args[1:]] * number

    def extra_repr(self) -> str:
        """Return the dimension and the flags."""
        return f"dim={self.dim}, {super().extra_repr()}"


def _sum(parts: list[tuple[Tensor, ...]], x: Tensor) -> Tensor:
    """Return the sum of the groups' log-determinants; zeros where they have none."""
    values = [value for part in parts for value in part]
    return torch.stack(values).sum(0) if values else zero_log_det(x)


class _Inverse:
    """A transform with its two directions exchanged."""

    saves = True

    def __init__(self, transform: Transform) -> None:
        self.factor = transform.factor
        self._transform = transform

    def __call__(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        return self._transform.inverse(group, output)

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        return self._transform(group, output)


class AdditiveCoupling(_Coupling):
    """The coupling X'_i = X_i + f_i(X'_{i-1}), with X'_0 = X_2 + ... + X_C, whose determinant is one.

    With two groups the coupling of NICE (Dinh et al. 2014, arXiv 1410.8516, section 3.2) for both halves in turn, and
    of RevNets (Gomez et al. 2017, arXiv 1707.04585, equation 6); with more, that of "Training Graph Neural Networks
    with 1000 Layers" (Li et al. 2021, arXiv 2106.07476, equations 3 and 4), as in
    :class:`recollect.reversible.GroupAddRev`.

    Args:
        *blocks: f_1..f_C, at least two, or one ``ModuleList``. Each is called as ``f(z, *args)`` and returns a tensor
            of ``z``'s shape; what it computes is free.
        dim: the dimension that is split into C groups.
        **options: ``anchor_every`` and ``drift_threshold``; see :class:`Module`.

    Shapes:
        - x: any, with a size in ``dim`` that C divides; output: the same.

    Raises:
        ValueError: fewer than two blocks; a size that C does not divide; a block whose output has another shape.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> block = lambda: torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> coupling = inn.AdditiveCoupling(block(), block())
        >>> coupling.check(torch.randn(10, 8))
        True
    """

    def _transform(self, log_det: bool) -> Transform:
        return Add()


class AffineCoupling(_Coupling):
    """The coupling X'_i = X_i * exp(s_i) + t_i with (s_i, t_i) from f_i(X'_{i-1}) (RealNVP, arXiv 1605.08803, eq. 7).

    The block's output is split into two along ``dim``: t_i is the second half, and s_i = m * tanh(h / m) for the first
    half h with m = ``max_log_scale``, so that scales stay between exp(-m) and exp(m) and the inverse is stable.
    The log-determinant is the sum of all s_i.

    Args:
        *blocks: f_1..f_C, at least two, or one ``ModuleList``. Each is called as ``f(z, *args)`` and returns a tensor
            that is twice as large as ``z`` in ``dim``.
        dim: the dimension that is split into C groups.
        max_log_scale: m, positive.
        **options: ``anchor_every`` and ``drift_threshold``; see :class:`Module`.

    Shapes:
        - x: [batch, ...], with a size in ``dim`` that C divides; output: the same; log-determinant: [batch].

    Raises:
        ValueError: fewer than two blocks; a size that C does not divide; a block whose output has another shape;
            ``max_log_scale`` not positive.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> flow = inn.AffineCoupling(torch.nn.Linear(1, 2), torch.nn.Linear(1, 2))
        >>> y, log_det = flow.forward_and_log_det(torch.randn(10, 2))
        >>> y.shape, log_det.shape
        (torch.Size([10, 2]), torch.Size([10]))
    """

    def __init__(self, *blocks: nn.Module, dim: int = 1, max_log_scale: float = 2.0, **options: Any) -> None:
        super().__init__(*blocks, dim=dim, **options)
        if not max_log_scale > 0:
            raise ValueError(f"max_log_scale must be positive (got {max_log_scale})")
        self.max_log_scale = max_log_scale

    def _transform(self, log_det: bool) -> Transform:
        return _Affine(self.dim, self.max_log_scale, log_det)

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return f"max_log_scale={self.max_log_scale}, {super().extra_repr()}"


class _Affine:
    """X' = X * exp(s) + t, with s and t from the block's output.

    Args:
        dim: along which the output holds s and t.
        limit: of the absolute value of s.
        log_det: whether the sums of s are returned too.
    """

    factor = 2
    saves = True

    def __init__(self, dim: int, limit: float, log_det: bool) -> None:
        self._dim = dim
        self._limit = limit
        self._log_det = log_det

    def __call__(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        log_scale, shift = self._parameters(output)
        return torch.addcmul(shift, group, log_scale.exp()), *self._sums(log_scale)

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        log_scale, shift = self._parameters(output)
        return (group - shift) * (-log_scale).exp(), *self._sums(-log_scale)

    def _parameters(self, output: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = output.chunk(2, self._dim)
        return self._limit * torch.tanh(raw / self._limit), shift

    def _sums(self, log_scale: Tensor) -> tuple[Tensor, ...]:
        return (values_log_det(log_scale),) if self._log_det else ()
