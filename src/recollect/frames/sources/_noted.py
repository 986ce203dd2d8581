"""A computation that is repeated outside of frames, compared as theirs are: a row of numbers is all that is kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recollect.frames._certificate import Figures, check_block, tolerance_of
from recollect.frames._fingerprint import PROJECTIONS, Fingerprint, difference, fingerprint
from recollect.frames.sources._inverse import amplified, moved

__all__ = ["check_noted", "noted"]


def noted(given: Tensor, returned: Tensor) -> Tensor:
    """Return what is to be known of a computation [8] float64: fingerprints of what it was given and returned.

    Args:
        given: floating-point, on the CPU.
        returned: the same.

    Example:
        >>> import torch
        >>> from recollect.frames import noted
        >>> x = torch.randn(4, 3)
        >>> noted(x, x.sin()).shape
        torch.Size([8])
    """
    marks = [fingerprint(each.detach().contiguous()) for each in (given, returned)]
    return torch.tensor([list(mark.projections) for mark in marks if mark is not None], dtype=torch.float64).flatten()


def check_noted(name: str, note: Tensor, given: Tensor, returned: Tensor, again: Callable[[Tensor], Tensor]) -> None:
    """Tell a repetition that drifts by rounding from one that computed something else.

    Args:
        name: whose repetition it is.
        note: of the computation, by :func:`noted`.
        given: what the repetition was given.
        returned: what it returned.
        again: computes what is returned, for what is given; called only where the errors alone do not tell.

    Raises:
        RebuildError: it computed something else.

    Example:
        >>> import torch
        >>> from recollect.frames import check_noted, noted
        >>> x = torch.randn(4, 3)
        >>> note = noted(x, x.sin())
        >>> check_noted("sine", note, x, x.sin(), torch.sin)
        >>> check_noted("sine", note, x, x.cos(), torch.cos)
        Traceback (most recent call last):
        ...
        recollect.frames._errors.RebuildError: sine: running it again for backward differs from the forward pass: ...
    """
    given, returned = given.detach().contiguous(), returned.detach().contiguous()
    then = [Fingerprint(half.tolist(), 0) for half in (note[:PROJECTIONS], note[PROJECTIONS:])]
    errors = [difference(mark, tensor) for mark, tensor in zip(then, (given, returned), strict=True)]
    tolerance = tolerance_of(returned.dtype)

    def amplification() -> float | None:
        return amplified(returned, lambda by: again(moved(given, by)), max(errors[0], tolerance))

    check_block(name, errors[0], errors[1], tolerance, amplification, True, Figures())
