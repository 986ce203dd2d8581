"""Additions that can be undone bit for bit: a stream on the multiples of 2^-k.

Float addition rounds, so that (x + f) - f is not x. Where x and what is added to it are both multiples of 2^-k, and
the sum is below 2^(24-k) in float32 (2^(53-k) in float64), nothing is rounded: the sum needs no more digits than the
type has. So the stream is rounded once, where it begins, and each block's output where it is added:

    q(t) = round(t 2^k) 2^-k,    y = x + q(f),    x = y - q(f)

The gradient passes the rounding, as that of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect._arguments import as_count
from recollect._devices import forms_of
from recollect._torch import is_fake, is_in_transform, is_recorded
from recollect._verdicts import later
from recollect.frames._chain import slot_of
from recollect.frames._errors import LatticeError, naming

__all__ = ["Lattice", "check_exact", "digits_of"]

_DIGITS = {torch.float32: 24, torch.float64: 53}
_DEFAULTS = {torch.float32: 16, torch.float64: 40}


def check_exact(value: bool | int) -> bool | int:
    """Return what ``exact`` may be.

    Args:
        value: ``True``, ``False``, or k.

    Raises:
        ValueError: it is neither a boolean nor an integer from 1 to 52.

    Example:
        >>> from recollect.frames import check_exact
        >>> check_exact(True), check_exact(16)
        (True, 16)
        >>> try:
        ...     check_exact(53)
        ... except ValueError as error:
        ...     print(error)
        exact must be below 53, the digits of float64 (got 53)
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

    Example:
        >>> import torch
        >>> from recollect.frames import digits_of
        >>> digits_of(True, torch.float32), digits_of(True, torch.float64), digits_of(10, torch.float32)
        (16, 40, 10)
        >>> digits_of(False, torch.float32) is None
        True
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

    Example:
        >>> import torch
        >>> from recollect.frames import Lattice
        >>> lattice = Lattice(16)
        >>> x, f = lattice.enter(torch.randn(1000)), torch.randn(1000)
        >>> (y,) = lattice(x, f)
        >>> torch.equal(lattice.inverse(y, f)[0], x), torch.equal((x + f) - f, x)
        (True, False)
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
        """Return a stream on the lattice: ``x`` itself where it is there, as a chain knows, else ``x`` rounded.

        Raises:
            TypeError: a type with too few digits.
            ValueError: k leaves the type no digits before the point.
            LatticeError: a value is out of range.
        """
        if x.dtype not in _DIGITS:
            raise TypeError(
                f"an exact stream is in float32 or float64 (got {x.dtype}): convert the input with .float(), and let "
                "autocast run the blocks in half precision"
            )
        digits_of(self.digits, x.dtype)
        slot = None if is_recorded() or is_in_transform() else slot_of(x)
        if slot is not None and slot.digits == self.digits:
            return x  # made by a coupling, or by a stage that moves values about
        rounded = x.clone()
        with torch.no_grad():
            values = rounded.detach().mul_(2.0**self.digits).round_().mul_(2.0**-self.digits)
            values += 0.0  # there is no -0.0 on the lattice: it would come back as 0.0
        self.check(rounded, [rounded], [type(self)], "the input of an exact stream")
        return rounded

    def __call__(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the sum."""
        return (self._sum(group, output, self.sign),)

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the difference."""
        return (self._sum(group, output, -self.sign),)

    def _sum(self, group: Tensor, output: Tensor, sign: int) -> Tensor:
        unit = sign * 2.0**-self.digits
        in_place = not is_recorded() and not is_in_transform() and type(group) is type(output) is Tensor
        if not torch.is_grad_enabled():
            steps = self.steps(output, torch.promote_types(group.dtype, output.dtype))
            in_place = in_place and group.shape == output.shape
            return torch.add(group, steps, alpha=unit, out=steps) if in_place else group + unit * steps
        total = torch.add(group, output, alpha=sign)
        with torch.no_grad():
            # The exact sum in the place of the rounded one, of which autograd keeps nothing.
            old, new, values = group.detach(), output.detach(), total.detach()
            if not in_place:
                values.copy_(torch.add(old, self.steps(new, total.dtype), alpha=unit))
            else:  # without another tensor beside it
                if new.dtype is values.dtype:
                    torch.mul(new, 2.0**self.digits, out=values)
                else:  # not in the block's type, which may overflow
                    values.copy_(new).mul_(2.0**self.digits)
                torch.add(old, values.round_(), alpha=unit, out=values)
        return total

    def steps(self, output: Tensor, dtype: torch.dtype) -> Tensor:
        """Return round(f 2^k), for the stream's type."""
        return output.detach().to(dtype).mul(2.0**self.digits).round_()

    def check(
        self, stream: Tensor, groups: Sequence[Tensor], makers: Sequence[Callable[..., Any]], form: str = "{}"
    ) -> None:
        """Raise unless all values of a stream are in range; on devices other than the CPU, when they have arrived.

        Args:
            stream: what is on the lattice, as a whole.
            groups: its groups, to say in which one a value is out of range.
            makers: for each group the block that made it.
            form: how messages name one, for ``str.format``.

        Raises:
            LatticeError: a value is not, or is not finite.
        """
        if not _has_values(stream):
            return
        if forms_of(stream.device).reads_at_once:
            if _largest(*torch.aminmax(stream.detach())) < self.limit(stream.dtype):  # some times faster than a norm
                return
            for group, maker in zip(groups, makers, strict=True):
                self._judge(_largest(*torch.aminmax(group.detach())), group.dtype, form.format(naming(maker)()))
            return
        dtype, names = stream.dtype, [naming(maker) for maker in makers]
        ends = [end for group in groups for end in torch.aminmax(group.detach())]

        def come(numbers: list[list[float]]) -> None:
            values = [number for (number,) in numbers]
            for low, high, name in zip(values[::2], values[1::2], names, strict=True):
                self._judge(_largest(low, high), dtype, form.format(name()))

        later(ends, come)

    def limit(self, dtype: torch.dtype) -> float:
        """Return what all values of a stream are below."""
        return float(2.0 ** (_DIGITS[dtype] - self.digits))

    def _judge(self, largest: float, dtype: torch.dtype, name: str) -> None:
        if largest < self.limit(dtype):
            return
        if not math.isfinite(largest):
            raise LatticeError(f"{name}: a stream that is exact has finite values alone (got {largest})")
        holds = _DIGITS[dtype] - math.frexp(largest)[1]
        remedy = f"exact={holds} holds it" if holds > 0 else "no number of digits holds it"
        more = ", a stream in float64 holds 2^29 times more" if dtype is torch.float32 else ""
        raise LatticeError(
            f"{name}: with exact={self.digits} the stream holds |x| < {self.limit(dtype):g} in {dtype} (got "
            f"{largest:.4g}); {remedy}{more}, and blocks that normalise, or end in small weights, keep it small"
        )


def _largest(low: Tensor | float, high: Tensor | float) -> float:
    """Return the largest magnitude; NaN if one is."""
    low, high = float(low), float(high)
    return max(-low, high) if low == low else math.nan


def _has_values(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read."""
    if is_recorded() or is_in_transform() or tensor.device.type == "meta":
        return False
    return tensor.numel() > 0 and not is_fake(tensor)
