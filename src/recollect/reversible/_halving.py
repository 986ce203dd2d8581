"""Halving that can be undone: X' = γ (X + s 2^-k) + q(f), with γ = ±1/2 and one kept bit s for each value.

BDIA (arXiv 2407.09093). Half of a multiple of 2^-k is one itself where the multiple is even; s is what makes it so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recollect._util._bits import pack_bits, unpack_bits
from recollect.frames import Lattice

__all__ = ["Gamma", "Halving", "Mixed"]


class Gamma:
    """1/2 or -1/2 for each sample, drawn when this is made; a bit for each is kept.

    Args:
        x: [batch, ...].
    """

    __slots__ = ("_bits", "_number")

    def __init__(self, x: Tensor) -> None:
        self._number = x.size(0) if x.dim() else 1
        self._bits = pack_bits(torch.randint(2, (self._number,), device=x.device))

    def like(self, x: Tensor) -> Tensor:
        """Return γ [batch, 1, ...] for an ``x`` [batch, ...], in its type."""
        shape = [self._number, *[1] * (x.dim() - 1)] if x.dim() else []
        return unpack_bits(self._bits, self._number).view(shape).to(x.dtype) - 0.5


class Mixed:
    """A block's output and its input, weighed: (1 - γ) x + (1 + γ) f(x)."""

    __slots__ = ("_gamma", "owner")

    def __init__(self, block: nn.Module, gamma: Gamma) -> None:
        self.owner = block
        self._gamma = gamma

    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.owner(z, *args, **kwargs)
        if not isinstance(output, Tensor) or output.shape != z.shape:
            return output  # refused by the coupling
        gamma = self._gamma.like(z)
        output = (1 + gamma) * output.to(z.dtype)
        return torch.addcmul(output, z, 1 - gamma)


class Halving(Lattice):
    """X' = γ (X + s 2^-k) + q(f(z)), with γ = ±1/2 and s the parity of X 2^k, of which each value keeps one bit.

    Args:
        digits: k.
        gamma: γ.
    """

    saves = True

    def __init__(self, digits: int, gamma: Gamma) -> None:
        super().__init__(digits)
        self._gamma = gamma
        self._odd: Tensor | None = None  # packed, eight values in a byte

    def __call__(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the new activation, and note the parity of the old."""
        gamma = self._gamma.like(group[0]).unsqueeze(0)  # the group is [1, batch, ...]
        total = torch.addcmul(output, group, gamma)
        if self._odd is not None:
            return (total,)  # a rebuild, of which the graph alone counts
        with torch.no_grad():
            unit, old = 2.0**-self.digits, group.detach()
            odd = (old * 2.0**self.digits).remainder_(2.0)
            self._odd = pack_bits(odd.reshape(-1))
            exact = torch.add(old, odd, alpha=unit).mul_(gamma)
            exact.add_(self.steps(output, total.dtype), alpha=unit)
            total.detach().copy_(exact.add_(0.0))  # there is no -0.0 on the lattice
        return (total,)

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the old activation."""
        if self._odd is None:
            raise RuntimeError("the parity of the forward pass is not there")
        with torch.no_grad():
            unit = 2.0**-self.digits
            old = self.steps(output, group.dtype).contiguous().mul_(-unit).add_(group)
            old.div_(self._gamma.like(group[0]).unsqueeze(0))
            flat = old.view(-1)
            for start in range(0, flat.numel(), _PIECE):  # unpacked, bits are as large as the values
                piece = flat[start : start + _PIECE]
                piece.sub_(unpack_bits(self._odd[start // 8 :], piece.numel()).to(flat.dtype), alpha=unit)
        return (old.add_(0.0),)


_PIECE = 1 << 18  # divisible by 8
