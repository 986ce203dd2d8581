"""What a Gramian must be, and the forms of it that the methods compute with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from recollect._devices import forms_of

__all__ = [
    "check_tensor",
    "checked",
    "checked_cross",
    "cholesky",
    "correlations",
    "flattened",
    "normalized",
    "regularized",
]

_NAMED = 8  # so many objectives are named in an error; of the rest there is a count
# Columns that are compared with rows at a time. (Measured on an Intel Xeon, 1,024 rows: 0.8 ms, all columns at once
# 4.6 ms; up to 256 rows as long.)
_COLUMNS = 128


def check_tensor(name: str, value: object) -> None:
    """Raise a TypeError that names the value unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, as torch.as_tensor makes one; found {type(value).__name__}")


def checked(gramian: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return a Gramian as a symmetric matrix, or raise a ValueError that says what is wrong with it.

    Args:
        gramian: ``[m, m]``.
        shape: how the m objectives are laid out, for the names in errors; by default they are counted.

    Raises:
        ValueError: it is not square, empty, of another type than floating point, not finite, not symmetric, or its
            diagonal, which holds squared norms, has a negative entry.
    """
    _check_form(gramian)
    if _is_plain(gramian):
        return gramian.clone()
    exact = gramian.double()
    norms = exact.diagonal().sqrt()
    # Rounding may tell G[i, j] from G[j, i], but by little beside the two norms, or beside themselves where a norm's
    # square is too small for the type, or by some of the type's least numbers. What is not finite, and the root of what
    # is negative, fails this too.
    sizes = torch.maximum(norms[:, None] * norms, exact.abs())
    info = torch.finfo(gramian.dtype)
    alike = (exact - exact.T).abs() <= max(1e-3, 16 * info.eps) * sizes + 16 * info.tiny * info.eps
    if not bool(alike.all()):
        _refuse(exact, ~alike, shape or [gramian.shape[0]])
    return (exact / 2 + exact.T / 2).to(gramian)  # halves first: a sum of two may be beyond the range


def _is_plain(gramian: Tensor) -> bool:
    """Whether a matrix is symmetric to the last bit, its diagonal not negative, and its sum finite, hence all of it.

    Where somebody would have to wait for each of these answers, nobody asks.
    """
    return (
        forms_of(gramian.device).reads_at_once
        and _is_symmetric(gramian)
        and gramian.diagonal().amin().item() >= 0
        and math.isfinite(gramian.sum(dtype=torch.float64).item())
    )


def _is_symmetric(matrix: Tensor) -> bool:
    """Whether a matrix is its transpose to the last bit; of columns together, as many as stay in the cache."""
    return all(
        torch.equal(matrix[start:, start : start + _COLUMNS], matrix[start : start + _COLUMNS, start:].mT)
        for start in range(0, len(matrix), _COLUMNS)
    )


def checked_cross(gramian: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return a cross-Gramian J₁ J₂ᵀ of two batches in float64, or raise a ValueError that says what is wrong with it.

    Beside rounding errors, sampling tells [i, j] from [j, i], and the diagonal may be negative.

    Args:
        gramian: ``[m, m]``, rows for the first batch.
        shape: how the m objectives are laid out, for the names in errors; by default they are counted.

    Raises:
        ValueError: it is not square, empty, of another type than floating point, or not finite.
    """
    _check_form(gramian)
    exact = gramian.double()
    infinite = ~exact.isfinite()
    if bool(infinite.any()):
        # A gradient of the first batch spoils its row, one of the second its column.
        whole = infinite.all(0) | infinite.all(1)
        rows = whole if bool(whole.any()) else infinite.any(0) | infinite.any(1)
        _refuse_infinite(rows, shape or [gramian.shape[0]])
    return exact


def _check_form(gramian: Tensor) -> None:
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
        raise ValueError(
            f"a Gramian is a square matrix, [m, m]; found {list(gramian.shape)}. Of a Jacobian J give J @ J.T; wrap "
            "the weighting in Flattening for losses of another shape than [m]"
        )
    if not gramian.is_floating_point():
        raise ValueError(f"a Gramian is of floating-point numbers; found {gramian.dtype}: give gramian.to(torch.float)")
    if gramian.shape[0] == 0:
        raise ValueError("the Gramian is empty, [0, 0]: there must be at least one objective")


def _refuse(gramian: Tensor, crooked: Tensor, shape: Sequence[int]) -> None:
    infinite, negative = ~gramian.isfinite(), gramian.diagonal() < 0
    if bool(infinite.any()):
        # A gradient that is not finite spoils its row and its column; its square on the diagonal tells which it is.
        rows = infinite.diagonal() if bool(infinite.diagonal().any()) else infinite.any(1)
        _refuse_infinite(rows, shape)
    if bool(negative.any()):
        raise ValueError(f"the diagonal of a Gramian holds squared norms; it is negative at {_names(negative, shape)}")
    i, j = divmod(int(crooked.flatten().double().argmax()), len(crooked))
    raise ValueError(
        f"a Gramian is symmetric; found {gramian[i, j].item():g} at [{i}, {j}] and {gramian[j, i].item():g} at "
        f"[{j}, {i}]. Give J Jᵀ, not the Jacobian J"
    )


def _refuse_infinite(rows: Tensor, shape: Sequence[int]) -> NoReturn:
    raise ValueError(
        f"the Gramian is not finite: look at the losses and gradients of {_names(rows, shape)} "
        "(NaN or infinity; a float32 Gramian overflows where a gradient's norm exceeds 1e19)"
    )


def _names(rows: Tensor, shape: Sequence[int]) -> str:
    """Say which objectives: "objective 3", "objectives (0, 1), (2, 1)"."""
    places = torch.unravel_index(rows.nonzero()[:, 0], tuple(shape))
    names = [", ".join(map(str, place)) for place in zip(*(axis.tolist() for axis in places), strict=True)]
    if len(shape) > 1:
        names = [f"({name})" for name in names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"objective{'s' if len(names) > 1 else ''} {', '.join(names[:_NAMED])}{more}"


def flattened(gramian: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return a generalised Gramian ``[m1..mk, mk..m1]`` as a matrix ``[m, m]``, and ``(m1, .., mk)``.

    The second half of its axes mirrors the first. A 0-D Gramian, a squared norm, becomes ``[1, 1]``.

    Raises:
        TypeError: it is no tensor.
        ValueError: the second half of the shape is not the first one mirrored.
    """
    check_tensor("the Gramian", gramian)
    half = gramian.ndim // 2
    shape = tuple(gramian.shape[:half])
    if gramian.ndim % 2 or tuple(gramian.shape[half:]) != shape[::-1]:
        raise ValueError(
            f"a generalised Gramian has the shape [m1, .., mk, mk, .., m1], its second half mirroring the first; "
            f"found {list(gramian.shape)}"
        )
    count = math.prod(shape)
    order = (*range(half), *range(gramian.ndim - 1, half - 1, -1))
    return gramian.permute(order).reshape(count, count), shape


def normalized(gramian: Tensor) -> Tensor:
    """Return the Gramian in float64, divided by its trace: that of the Jacobian divided by its Frobenius norm.

    Zeros stay zeros.
    """
    exact = gramian.double()
    trace = exact.diagonal().sum()
    return exact / torch.where(trace > 0, trace, 1.0)


def correlations(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines between all gradients, ``[m, m]``, and the gradients' norms, ``[m]``, both in float64.

    Rows and columns of gradients that are zero are zero.
    """
    exact = gramian.double()
    norms = exact.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    cosines = exact * inverse[:, None] * inverse
    return cosines.clamp(-1, 1), norms


def cholesky(
    matrix: Tensor, size: float = 1.0, added: Tensor | float = 0.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, bool]:
    """Return the lower Cholesky factor ``[m, m]`` of matrix / size + added I, and whether there is none.

    Rows whose distance is a multiple of 512 bytes fall on one another in the cache, which doubles the time. (Measured
    on an Intel Xeon in float64: 256 rows 0.50 ms, 264 rows 0.20 ms; 1,024 rows 17 ms, 1,032 rows 9 ms.) Then some of
    the unit matrix come behind the others, which change none of their numbers.

    Args:
        matrix: ``[m, m]``.
        size: a number.
        added: a number, may be 0-D.
        dtype: of the factor; None: the matrix'.
    """
    m = len(matrix)
    more = 8 if m % 64 == 0 and m > 64 else 0
    room = torch.empty(m + more, m + more, dtype=dtype or matrix.dtype, device=matrix.device)
    inner = room[:m, :m].copy_(matrix)
    if size != 1:
        inner.div_(size)
    inner.diagonal().add_(added)
    if more:
        room[:m, m:], room[m:] = 0, 0
        room.diagonal()[m:] = 1
    factor, failed = torch.linalg.cholesky_ex(room)
    return factor[:m, :m], bool(failed)


def regularized(matrix: Tensor, added: float) -> tuple[Tensor, Tensor]:
    """Add a positive number to the diagonal; eigenvalues that rounding has made negative are set to zero before.

    Returns:
        The positive definite matrix and its Cholesky factor.
    """
    diagonal = torch.full_like(matrix[0], added).diag()
    enough = matrix + diagonal
    factor, failed = cholesky(enough)
    if failed:
        values, vectors = torch.linalg.eigh(matrix)
        enough = (vectors * values.clamp(min=0)) @ vectors.T + diagonal
        factor = cholesky(enough)[0]
    return enough, factor
