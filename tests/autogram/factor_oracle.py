"""What a factor stands for, written out."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.autogram._factors import Blocks, Factor, Lookups, Outer, Picked, Rows
from recollect.autogram._square import wide


def dense(factor: Factor) -> Tensor:
    """The Jacobian that a factor stands for, [m, *shape]."""
    match factor:
        case Rows():
            return factor.values
        case Outer():
            left, right = (
                side.to(wide(side.dtype)).expand(factor.num_rows, -1, -1, -1) for side in (factor.left, factor.right)
            )
            return torch.einsum("mtga,mtgb->mgab", left, right).reshape(factor.num_rows, *factor.shape)
        case Picked():
            jacobian = factor.grad.new_zeros(factor.num_rows, *factor.shape)
            for row, index, grad in zip(jacobian, factor.index.expand(factor.num_rows, -1), factor.grad, strict=True):
                row.index_add_(0, index, grad)
            return jacobian
        case Lookups():
            jacobian = factor.grad.new_zeros(factor.num_rows, *factor.shape)
            return jacobian.index_put_((factor.owner, factor.index), factor.grad, accumulate=True)
        case Blocks():
            whole = slice(0, factor.shape[factor.axis])
            return torch.cat([factor.form(slice(i, i + 1), whole) for i in range(factor.num_rows)])
