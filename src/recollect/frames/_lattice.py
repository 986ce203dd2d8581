"""Additions that can be undone bit for bit: a stream on the multiples of 2^-k.

Float addition rounds, so that (x + f) - f is not x. Where x and what is added to it are both multiples of 2^-k, and
the sum is below 2^(24-k) in float32 (2^(53-k) in float64), nothing is rounded: the sum needs no more digits than the
type has. So the stream is rounded once, where it begins, and each block's output where it is added:

    q(t) = round(t 2^k) 2^-k,    y = x + q(f),    x = y - q(f)

The gradient passes the rounding, as that of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recollect._arguments import as_count
from recollect._torch import is_in_transform
from recollect.frames._chain import slot_of
from recollect.frames._errors import LatticeError

__all__ = ["Lattice", "check_exact", "digits_of"]

_DIGITS = {torch.float32: 24, torch.float64: 53}
_DEFAULTS = {torch.float32: 16, torch.float64: 40}


def check_exact(value: bool | int) -> bool | int:
    """Return what ``exact`` may be.

    Raises:
        ValueError: it is neither a boolean nor an integer from 1 to 52.
    """
    if isinstance(value, bool):
        return value
    digits = as_count("exact", value, ", the number k of binary digits behind the point, or True or False")
    if digits >= _DIGITS[torch.float64]:
        raise ValueError(f"exact must be below 53, the digits of float64 (got {digits})")
    return digits


def digits_of(exact: bool | int, dtype: torch.dtype) -> int | None:
    """Return k for a stream of a type; ``None`` for one that rounds.

    Args:
        exact: k; ``True``: 16 in float32, for values below 256, and 40 in float64, for values below 8,192.
        dtype: of the stream.

    Raises:
        ValueError: k leaves the type no digits before the point.
    """
    if exact is False:
        return None
    if exact is True:
        return _DEFAULTS.get(dtype, _DEFAULTS[torch.float32])
    if exact >= _DIGITS.get(dtype, exact + 1):
        raise ValueError(f"exact must be below {_DIGITS[dtype]} for a stream in {dtype} (got {exact})")
    return exact


class Lattice:
    """X' = X + q(f(z)), exactly.

    Args:
        digits: k: the stream consists of multiples of 2^-k.
        sign: -1 for X' = X - q(f(z)).
    """

    factor = 1
    saves = False

    def __init__(self, digits: int, sign: int = 1) -> None:
        self.digits = digits
        self.sign = sign

    def swapped(self) -> Lattice:
        """Return the transform with its two directions exchanged."""
        return Lattice(self.digits, -self.sign)

    def enter(self, x: Tensor) -> Tensor:
        """Return a stream on the lattice: ``x`` itself where a coupling on it made it, else ``x`` rounded.

        Raises:
            TypeError: a type with too few digits.
            LatticeError: a value is out of range.
        """
        if x.dtype not in _DIGITS:
            raise TypeError(
                f"an exact stream is in float32 or float64 (got {x.dtype}): convert the input with .float(), and let "
                "autocast run the blocks in half precision"
            )
        slot = slot_of(x)
        if slot is not None and slot.digits == self.digits:
            return x
        rounded = x.clone()
        with torch.no_grad():
            values = rounded.detach().mul_(2.0**self.digits).round_().mul_(2.0**-self.digits)
            values += 0.0  # there is no -0.0 on the lattice: it would come back as 0.0
            if slot is not None and x.is_cpu and torch.equal(values, x.detach()):
                rounded = x  # made by a stage that moves values about: the chain goes on
        self.check([rounded], "the input of an exact stream")
        return rounded

    def __call__(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the sum."""
        return (self._sum(group, output, self.sign),)

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the difference."""
        return (self._sum(group, output, -self.sign),)

    def _sum(self, group: Tensor, output: Tensor, sign: int) -> Tensor:
        total = torch.add(group, output, alpha=sign)
        with torch.no_grad():
            # The exact sum in the place of the rounded one, of which autograd keeps nothing.
            steps = output.detach().to(total.dtype).mul(2.0**self.digits).round_()
            unit = sign * 2.0**-self.digits
            if is_in_transform():
                total.detach().copy_(group.detach() + unit * steps)
            else:
                torch.add(group.detach(), steps, alpha=unit, out=total.detach())
        return total

    def check(self, tensors: Sequence[Tensor], name: str) -> None:
        """Raise unless all values are in range.

        Raises:
            LatticeError: one is not, or is not finite.
        """
        if torch.compiler.is_compiling():
            return  # plain: nothing is undone
        for tensor in tensors:
            values = tensor.detach()
            if values.numel() == 0 or not values.is_cpu:
                continue
            low, high = torch.aminmax(values)  # some times faster than a norm
            largest = max(-float(low), float(high))
            room = _DIGITS[values.dtype] - self.digits
            if largest < 2.0**room:
                continue
            if not math.isfinite(largest):
                raise LatticeError(f"{name}: a stream that is exact has finite values alone (got {largest})")
            holds = _DIGITS[values.dtype] - math.frexp(largest)[1]
            remedy = f"exact={holds} holds it" if holds >= 0 else "no number of digits holds it"
            raise LatticeError(
                f"{name}: with exact={self.digits} the stream holds |x| < {2.0**room:g} in {values.dtype} (got "
                f"{largest:.4g}); {remedy}, float64 holds 2^29 times more, and blocks that end in small weights or "
                "normalise keep it small"
            )
