"""Couplings: invertible whatever their blocks compute."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recollect.frames import Add, Lattice, Transform, check_exact, couple_by, digits_of, frames_apply, uncouple_by
from recollect.invertible._algebra import values_log_det, zero_log_det
from recollect.invertible._conditions import Takes
from recollect.invertible._measured import under_autocast
from recollect.invertible._module import Module

__all__ = ["AdditiveCoupling", "AffineCoupling"]


Parts = list[tuple[Tensor, ...]]


class _Coupling(Module):
    """What additive and affine couplings share; subclasses say what the blocks' outputs do to the groups.

    Args:
        *blocks: f_1..f_C, at least two; or one ``ModuleList`` of them.
        dim: the dimension that is split into C groups.
        sizes: of the groups in ``dim``; ``None``: equal ones.
        **options: of :class:`Module`.
    """

    def __init__(self, *blocks: nn.Module, dim: int = 1, sizes: Sequence[int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        given = blocks[0] if len(blocks) == 1 and isinstance(blocks[0], nn.ModuleList) else nn.ModuleList(blocks)
        if len(given) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least two blocks, one for each group (got {len(given)}): a lone group "
                "has no other group to take its block's input from"
            )
        self.blocks = given
        self.dim = dim
        self.sizes = None if sizes is None else self._checked(sizes, len(given))

    @classmethod
    def _checked(cls, sizes: Sequence[int], number: int) -> tuple[int, ...]:
        found = tuple(map(operator.index, sizes))
        if len(found) != number or min(found) < 1:
            raise ValueError(
                f"{cls.__name__}: sizes must be {number} positive numbers, one for each block (got {found})"
            )
        if number > 2 and len(set(found)) > 1:
            raise ValueError(
                f"{cls.__name__}: sizes={found} of {number} groups: the first block gets the sum of all groups but the "
                "first, and groups of different sizes have none; use two blocks, or equal sizes"
            )
        return found

    def _transform(self, log_det: bool, dtype: torch.dtype) -> Transform:
        raise NotImplementedError

    @property
    def reversible(self) -> bool:
        """Always."""
        return True

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    @property
    def num_inputs(self) -> int:
        """One: what follows x are conditions."""
        return 1

    def forward(self, *args: Any, keep: Iterable[Tensor] = (), **kwargs: Any) -> Any:
        """Return the coupled features.

        Args:
            *args: x, whose size in ``dim`` is that of all groups; then further arguments of the blocks, which are kept
                for backward. Each block gets as many of them as its signature takes.
            **kwargs: keyword arguments of the blocks; each gets those that its signature takes.
            keep: input tensors that stay inside :func:`recollect.eager_release`; elsewhere a coupling frees nothing
                that somebody holds.
        """
        if not self._in_one_evaluation:
            return self._from_inputs(self.call_function, args, kwargs)
        return self._coupled(args, kwargs, keep, log_det=False)[0]

    def forward_and_log_det(self, *args: Any, keep: Iterable[Tensor] = (), **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the coupled features and log|det| of shape [batch]; see :meth:`forward`."""
        if not self._in_one_evaluation:
            y, log_det = self._from_inputs(self.call_function_and_log_det, args, kwargs)
            return y, log_det
        y, parts = self._coupled(args, kwargs, keep, log_det=True)
        return y, _sum(parts, y)

    def function(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return X'_1 || ... || X'_C for x."""
        return self._function(args, kwargs, log_det=False)[0]

    def inverse(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return x for X'_1 || ... || X'_C."""
        return self._inverse(args, kwargs, log_det=False)[0]

    def function_and_log_det(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return X'_1 || ... || X'_C and log|det| of shape [batch]."""
        y, parts = self._function(args, kwargs, log_det=True)
        return y, _sum(parts, y)

    def inverse_and_log_det(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return x and the inverse's log|det| of shape [batch]."""
        x, parts = self._inverse(args, kwargs, log_det=True)
        return x, _sum(parts, x)

    def _function(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], log_det: bool) -> tuple[Tensor, Parts]:
        x, extra, keywords = self._split(args, kwargs)
        return couple_by(
            self._transform(log_det, x.dtype),
            list(self.blocks),
            x,
            extra,
            kwargs=keywords,
            sizes=self.sizes,
            dim=self.dim,
            enabled=False,
        )

    def _inverse(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], log_det: bool) -> tuple[Tensor, Parts]:
        y, extra, keywords = self._split(args, kwargs)
        return uncouple_by(
            self._transform(log_det, y.dtype),
            list(self.blocks),
            y,
            extra,
            kwargs=keywords,
            sizes=self.sizes,
            dim=self.dim,
        )

    @property
    def _in_one_evaluation(self) -> bool:
        """Whether inverse and rebuild can be one evaluation.

        The inverse of a coupling of two groups is one too, from the other end. With more groups it is not, and its
        blocks run in another order than in the function, so that what they draw could not be replayed.
        """
        return self.invertible and frames_apply() and (not self.reversed or len(self.blocks) == 2)

    def _coupled(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: Iterable[Tensor], log_det: bool
    ) -> tuple[Tensor, Parts]:
        self._forget_drift()
        x, extra, keywords = self._split(args, kwargs)
        order = slice(None, None, -1) if self.reversed else slice(None)
        transform, blocks = self._transform(log_det, x.dtype), list(self.blocks)
        return couple_by(
            _swapped(transform) if self.reversed else transform,
            blocks[order],
            x,
            extra[order],
            kwargs=keywords[order],
            sizes=self.sizes,
            dim=self.dim,
            flip=self.reversed,
            gauge=self._gauge,
            anchor_every=self._anchors(x),
            seed=self.seed,
            keep=keep,
            certify=self.certify,
            certificate=self.certificate,
        )

    def _anchors(self, x: Tensor) -> int | None:
        """Return how often the chain's activations are kept."""
        return self.anchor_every

    def _from_inputs(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        run = functools.partial(function, **kwargs) if kwargs else function
        return self._kept(run, args) if self.checkpoint else run(*args)

    def _split(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, list[tuple[Any, ...]], list[dict[str, Any]]]:
        """Return x, and for each block its further arguments, positional and keyword."""
        if not args or not isinstance(args[0], Tensor):
            found = type(args[0]).__name__ if args else "nothing"
            raise TypeError(f"{type(self).__name__} takes a tensor, then further arguments of its blocks (got {found})")
        x, number, sizes = args[0], len(self.blocks), self.sizes
        if (
            not -x.dim() <= self.dim < x.dim()
            or (sizes is None and x.size(self.dim) % number)
            or (sizes is not None and x.size(self.dim) != sum(sizes))
        ):
            allowed = f"be divisible by {number}" if sizes is None else f"be {sum(sizes)}"
            hint = "; sizes=(...) allows two groups of different sizes" if sizes is None and number == 2 else ""
            raise ValueError(
                f"{type(self).__name__} splits dimension {self.dim} into {number} groups{_of(sizes)}: it must exist, "
                f"and its size {allowed} (got shape {list(x.shape)}){hint}"
            )
        x, further = self._widened(x), args[1:]
        if not further and not kwargs:
            return x, [()] * number, [{}] * number
        return x, *self._further(further, kwargs)

    def _further(
        self, further: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
        """Return for each block what it takes of the further arguments."""
        rooms = [_room(block) for block in self.blocks]
        extra = [further if room is None else further[:room] for room in rooms]
        keywords = [_named(block, kwargs, 1 + len(own)) for block, own in zip(self.blocks, extra, strict=True)]
        most = max(map(len, extra))
        if most < len(further):
            raise TypeError(
                f"{type(self).__name__}: its blocks take {most} positional argument(s) behind x (got {len(further)})"
            )
        unknown = [name for name in kwargs if not any(name in own for own in keywords)]
        if unknown:
            raise TypeError(f"{type(self).__name__}: none of its blocks takes the keyword argument(s) {unknown}")
        return extra, keywords

    def _conditions(
        self, function: Callable[..., Any], inverse: Callable[..., Any], outputs: tuple[Any, ...], given: int
    ) -> int:
        return given - 1

    def _takes_further(self, function: Callable[..., Any], inverse: Callable[..., Any], given: int) -> int | None:
        rooms = [_room(block) for block in self.blocks]
        return None if None in rooms else max(room for room in rooms if room is not None)

    def _named(self, function: Callable[..., Any], kwargs: Mapping[str, Any], given: int) -> dict[str, Any]:
        found = [_named(block, kwargs, given) for block in self.blocks]
        return {name: value for name, value in kwargs.items() if any(name in own for own in found)}

    def extra_repr(self) -> str:
        """Return the dimension, the sizes where they are given, and the flags."""
        sizes = "" if self.sizes is None else f"sizes={self.sizes}, "
        return f"dim={self.dim}, {sizes}{super().extra_repr()}"


def _of(sizes: tuple[int, ...] | None) -> str:
    return "" if sizes is None else f" of sizes {sizes}"


def _room(block: nn.Module) -> int | None:
    """Return how many positional arguments a block takes behind its group; ``None``: any number."""
    if isinstance(block, Module):
        return block._takes_further(block.call_function, block.call_inverse, 1)
    most = Takes.of(block).most
    return None if most is None else max(most - 1, 0)


def _named(block: nn.Module, kwargs: Mapping[str, Any], given: int) -> dict[str, Any]:
    """Return the keyword arguments that a block takes behind so many positional ones."""
    if isinstance(block, Module):
        return block._named(block.call_function, kwargs, given)
    return Takes.of(block).named(kwargs, given)


def _sum(parts: Parts, x: Tensor) -> Tensor:
    """Return the sum of the groups' log-determinants; zeros where they have none."""
    values = [value for part in parts for value in part]
    return torch.stack(values).sum(0) if values else zero_log_det(x)


def _swapped(transform: Transform) -> Transform:
    return transform.swapped() if isinstance(transform, Lattice) else _Inverse(transform)


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
        *blocks: f_1..f_C, at least two, or one ``ModuleList``. Each is called as ``f(z, *args, **kwargs)`` with what it
            takes of the coupling's further arguments, and returns a tensor of ``z``'s shape; what it computes is free.
        dim: the dimension that is split into C groups.
        sizes: of the groups in ``dim``, for two blocks: f_1 maps the size of the second group, n_2, to that of the
            first, n_1, and f_2 maps n_1 to n_2. ``None``: equal ones. More than two groups have equal sizes: X'_0 is a
            sum of all but the first.
        exact: keep the stream on the multiples of 2^-k, so that it comes back bit for bit at any depth: k, or ``True``
            for 16 in float32 and 40 in float64. Values must stay below 2^(24-k), in float64 below 2^(53-k). Each block
            must then compute the same bits twice.
        **options: ``anchor_every`` and ``drift_threshold``; see :class:`Module`.

    Shapes:
        - x: any, with a size in ``dim`` that C divides, or that is the sum of ``sizes``; output: the same. Under
          autocast x is widened to float32, or to the parameters' type if that is wider: a stream in half precision
          does not come back.

    Raises:
        TypeError: a further argument that no block takes.
        ValueError: fewer than two blocks; a size that C does not divide; a block whose output has another shape;
            ``sizes`` that are not positive, do not add up, or differ for more than two groups.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> block = lambda: torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> coupling = inn.AdditiveCoupling(block(), block())
        >>> coupling.check(torch.randn(10, 8))
        True
    """

    exact: bool | int = False  # modules that were pickled before there was such a stream have none

    def __init__(
        self,
        *blocks: nn.Module,
        dim: int = 1,
        sizes: Sequence[int] | None = None,
        exact: bool | int = False,
        **options: Any,
    ) -> None:
        super().__init__(*blocks, dim=dim, sizes=sizes, **options)
        self.exact = check_exact(exact)

    def _transform(self, log_det: bool, dtype: torch.dtype) -> Transform:
        digits = digits_of(self.exact, dtype)
        return Add() if digits is None else Lattice(digits)

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return super().extra_repr() if self.exact is False else f"exact={self.exact}, {super().extra_repr()}"


class AffineCoupling(_Coupling):
    """The coupling X'_i = X_i * exp(s_i) + t_i with (s_i, t_i) from f_i(X'_{i-1}) (RealNVP, arXiv 1605.08803, eq. 7).

    The block's output is split into two along ``dim``: t_i is the second half, and s_i = m * tanh(h / m) for the first
    half h with m = ``max_log_scale``, so that scales stay between exp(-m) and exp(m) and the inverse is stable.
    The log-determinant is the sum of all s_i.

    Args:
        *blocks: f_1..f_C, at least two, or one ``ModuleList``. Each is called as ``f(z, *args, **kwargs)`` with what it
            takes of the coupling's further arguments, and returns a tensor that is twice as large as ``z`` in ``dim``.
        dim: the dimension that is split into C groups.
        max_log_scale: m, positive.
        sizes: as in :class:`AdditiveCoupling`; f_1 maps n_2 to 2 n_1, and f_2 maps n_1 to 2 n_2.
        **options: ``anchor_every`` and ``drift_threshold``; see :class:`Module`.

    Shapes:
        - x: [batch, ...], with a size in ``dim`` that C divides, or that is the sum of ``sizes``; output: the same;
          log-determinant: [batch]. Under autocast as :class:`AdditiveCoupling`; scales and shifts are computed in the
          stream's type. A chain of them then keeps its activations (as with ``anchor_every=1``) unless ``anchor_every``
          is given: what blocks in half precision make of rounding errors, the inverses would multiply from layer to
          layer.

    Raises:
        TypeError: as :class:`AdditiveCoupling`.
        ValueError: as :class:`AdditiveCoupling`; ``max_log_scale`` not positive.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> flow = inn.AffineCoupling(torch.nn.Linear(1, 2), torch.nn.Linear(1, 2))
        >>> y, log_det = flow.forward_and_log_det(torch.randn(10, 2))
        >>> y.shape, log_det.shape
        (torch.Size([10, 2]), torch.Size([10]))
    """

    def __init__(
        self,
        *blocks: nn.Module,
        dim: int = 1,
        max_log_scale: float = 2.0,
        sizes: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*blocks, dim=dim, sizes=sizes, **options)
        if not max_log_scale > 0:
            raise ValueError(f"max_log_scale must be positive (got {max_log_scale})")
        self.max_log_scale = max_log_scale

    def _anchors(self, x: Tensor) -> int | None:
        # A block in half precision turns an error in the last digit of its reconstructed input into one of its output's
        # few digits, which the inverse multiplies by up to exp(max_log_scale), in every layer of a chain.
        return 1 if self.anchor_every is None and under_autocast(x) else self.anchor_every

    def _transform(self, log_det: bool, dtype: torch.dtype) -> Transform:
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
        log_scale, shift = self._parameters(group, output)
        return torch.addcmul(shift, group, log_scale.exp()), *self._sums(log_scale)

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        log_scale, shift = self._parameters(group, output)
        return (group - shift) * (-log_scale).exp(), *self._sums(-log_scale)

    def _parameters(self, group: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        # Under autocast a block returns half precision, in which tanh and exp would lose the digits that the inverse
        # divides by.
        raw, shift = output.to(torch.promote_types(output.dtype, group.dtype)).chunk(2, self._dim)
        return self._limit * torch.tanh(raw / self._limit), shift

    def _sums(self, log_scale: Tensor) -> tuple[Tensor, ...]:
        return (values_log_det(log_scale),) if self._log_det else ()
