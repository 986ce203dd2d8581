"""Stacks of residual blocks that are reversible at full width: two activations take the place of two halves.

A stack of L blocks f_0..f_(L-1) is a grouped coupling whose two groups are the activations of two layers, so that the
seam needs nothing new. Both begin as x_0; each stage makes the next two layers' of them::

    x_1 = x_0 + f_0(x_0),    x_(l+1) = T(x_(l-1), f_l(x_l))
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from recollect._arguments import Certify
from recollect._parameters import reset_parameters
from recollect.frames import DRIFT_THRESHOLD, Add, Lattice, Transform, check_exact, couple_by, digits_of
from recollect.invertible import Measured
from recollect.reversible._halving import Gamma, Halving, Mixed

__all__ = ["BDIA", "Midpoint"]


class _Stream(Measured):
    """What both stacks share; subclasses say what a block does to the activation before the last one.

    Args:
        blocks: f_0..f_(L-1).
        exact: k, ``True`` or ``False``.
        disable: keep everything.
        **options: of :class:`Measured`.
    """

    def __init__(self, blocks: Iterable[nn.Module], exact: bool | int, disable: bool, **options: Any) -> None:
        super().__init__(**options)
        self.blocks = nn.ModuleList(blocks)
        if not self.blocks:
            raise ValueError(f"{type(self).__name__} needs at least one block (got none)")
        self.exact = check_exact(exact)
        self.disable = disable

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x_L, of the shape of ``x``.

        Args:
            x: x_0, of any shape.
            *args: further arguments of every block.
            **kwargs: keyword arguments of every block.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: x must be a tensor (got {type(x).__name__})")
        x = self._widened(x)
        self._forget_drift()
        blocks = list(self.blocks)
        digits = digits_of(self.exact, x.dtype)
        stream = torch.stack([x, x])  # x_(l-1) and x_l
        for first in range(0, len(blocks), 2):
            pair: list[Any] = [
                self._branch(block, layer, digits, x) for layer, block in enumerate(blocks[first : first + 2], first)
            ]
            alone = len(pair) == 1
            if alone:
                pair.append((_nothing, _adding(digits)))
            run, transforms = zip(*pair, strict=True)
            try:
                stream, _ = couple_by(
                    transforms,
                    [_Unstacked(block) for block in run],
                    stream,
                    [args] * 2,
                    kwargs=[kwargs] * 2,
                    dim=0,
                    gauge=self._gauge,
                    anchor_every=self.anchor_every,
                    enabled=not self.disable,
                    certify=self.certify,
                    certificate=self.certificate,
                )
            except Exception as error:
                which = f"block {first}" if alone else f"blocks {first} and {first + 1}"
                error.add_note(f"{type(self).__name__}: this is of {which}, of {len(blocks)}.")
                raise
        return stream[0 if alone else 1]

    def _branch(self, block: nn.Module, layer: int, digits: int | None, x: Tensor) -> tuple[Any, Transform]:
        """Return what is computed of x_l, and what it does to x_(l-1)."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw all parameters anew, in blocks that can."""
        for block in self.blocks:
            reset_parameters(block)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"exact={self.exact}"


def _adding(digits: int | None) -> Transform:
    return Add() if digits is None else Lattice(digits)


class _Unstacked:
    """A block for a group [1, ...] that is one activation."""

    __slots__ = ("_block", "owner")

    def __init__(self, block: Any) -> None:
        self._block = block
        self.owner = getattr(block, "owner", block)  # whom messages name

    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._block(z[0], *args, **kwargs)
        return output.unsqueeze(0) if isinstance(output, Tensor) else output


def _nothing(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Add nothing: the last stage of an odd number of blocks has one."""
    return torch.zeros_like(z)


class _Scaled:
    """A block whose output is doubled."""

    __slots__ = ("owner",)

    def __init__(self, block: nn.Module) -> None:
        self.owner = block

    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.owner(z, *args, **kwargs)


class Midpoint(_Stream):
    """A stack of residual blocks in the explicit midpoint (leapfrog) form, reversible at full width.

    x_1 = x_0 + f_0(x_0), and then x_(l+1) = x_(l-1) + 2 f_l(x_l): a two-step method for dx/dt = f(x), of which the
    residual network x_(l+1) = x_l + f_l(x_l) is the one-step method (Chang et al. 2018, "Reversible Architectures for
    Arbitrarily Deep Residual Neural Networks", arXiv 1709.03698, section 3.2). No activation is kept but the last two.

    Args:
        blocks: f_0..f_(L-1): residual branches, called as ``f(x, *args, **kwargs)``, which return a tensor of ``x``'s
            shape, without ``x`` added.
        exact: keep the stream on the multiples of 2^-k, so that it comes back bit for bit at any depth; see
            :class:`GroupAddRev`. ``False``: it comes back up to rounding.
        disable: run plain, keeping everything.
        anchor_every: keep every s-th pair of activations.
        drift_threshold: relative reconstruction error above which a warning is given.
        certify: as in :class:`GroupAddRev`.

    Shapes:
        - ``x``: any; output: the same. Under autocast x is widened to float32.

    Raises:
        ValueError: there are no blocks; a block returns another shape.
        LatticeError: a value of an exact stream is out of range.

    Example:
        >>> import torch
        >>> from recollect.reversible import Midpoint
        >>> make = lambda: torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Tanh())
        >>> stack = Midpoint(make() for _ in range(5))
        >>> x = torch.randn(3, 8, requires_grad=True)
        >>> stack(x).sum().backward()
        >>> stack.last_drift
        0.0
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        *,
        exact: bool | int = True,
        disable: bool = False,
        anchor_every: int | None = None,
        drift_threshold: float = DRIFT_THRESHOLD,
        certify: Certify = True,
    ) -> None:
        super().__init__(
            blocks, exact, disable, anchor_every=anchor_every, drift_threshold=drift_threshold, certify=certify
        )

    def _branch(self, block: nn.Module, layer: int, digits: int | None, x: Tensor) -> tuple[Any, Transform]:
        return (_Scaled(block) if layer else block), _adding(digits)


class BDIA(_Stream):
    """A stack of residual blocks that trains reversibly at full width, and infers as the ordinary residual network.

    In training (BDIA, arXiv 2407.09093): x_1 = x_0 + f_0(x_0), and then

        x_(l+1) = γ (x_(l-1) + s 2^-k) + q((1 - γ) x_l + (1 + γ) f_l(x_l))

    with γ = 1/2 or -1/2, drawn for each sample and layer, and s the parity of x_(l-1) 2^k. Of each layer one bit for
    each value is kept, beside the last two activations of the stack. As γ is 0 in the mean, the network in evaluation
    mode is x_(l+1) = x_l + f_l(x_l): blocks of a trained residual network can go on with it.

    Args:
        blocks: f_0..f_(L-1): residual branches, called as ``f(x, *args, **kwargs)``, which return a tensor of ``x``'s
            shape, without ``x`` added.
        exact: k, or ``True`` for 16 in float32 and 40 in float64.
        disable: run plain, keeping everything.
        anchor_every: keep every s-th pair of activations.
        certify: as in :class:`GroupAddRev`.

    Shapes:
        - ``x``: [batch, ...]; output: the same. Under autocast x is widened to float32.

    Raises:
        ValueError: there are no blocks; ``exact=False``; a block returns another shape.
        LatticeError: a value is out of range.

    Example:
        >>> import torch
        >>> from recollect.reversible import BDIA
        >>> make = lambda: torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Tanh())
        >>> stack = BDIA(make() for _ in range(4))
        >>> stack(torch.randn(3, 8, requires_grad=True)).sum().backward()
        >>> stack.last_drift
        0.0
        >>> x = h = torch.randn(3, 8)
        >>> for block in stack.blocks:
        ...     h = h + block(h)
        >>> torch.allclose(stack.eval()(x), h, atol=1e-3)
        True
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        *,
        exact: bool | int = True,
        disable: bool = False,
        anchor_every: int | None = None,
        certify: Certify = True,
    ) -> None:
        if exact is False:
            raise ValueError("BDIA halves activations, and so is exact or not at all: exact must be True or k")
        super().__init__(blocks, exact, disable, anchor_every=anchor_every, certify=certify)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x_L, of the shape of ``x``; see :class:`BDIA` for training and evaluation mode.

        Args:
            x: x_0 [batch, ...].
            *args: further arguments of every block.
            **kwargs: keyword arguments of every block.
        """
        if self.training:
            return super().forward(x, *args, **kwargs)
        for block in self.blocks:
            x = x + block(x, *args, **kwargs)
        return x

    def _branch(self, block: nn.Module, layer: int, digits: int | None, x: Tensor) -> tuple[Any, Transform]:
        if digits is None:
            raise ValueError("BDIA needs a lattice")
        if layer == 0:
            return block, Lattice(digits)
        gamma = Gamma(x)
        return Mixed(block, gamma), Halving(digits, gamma)
