"""Fingerprints of several small tensors, taken in one go: one after the other, calls take longer than sums."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from recollect._torch import flattened, is_in_transform
from recollect.frames._fingerprint import PROJECTIONS, TAME, Fingerprint, error_between, plain_values

__all__ = ["FEWEST", "LARGEST", "MOST", "Joint", "is_small"]

LARGEST = 512
"""Elements of the largest tensor that is small."""
MOST = 8 * LARGEST
"""Elements that all tensors have together, at most."""
FEWEST = 6
"""Fewer tensors are faster one after the other."""

Numbers = list[list[float]]


def is_small(tensor: Tensor) -> bool:
    """Return whether a tensor's fingerprint can be taken together with others'."""
    dtype = tensor.dtype
    return (
        type(tensor) is Tensor
        and tensor.numel() <= LARGEST
        and (dtype is torch.float32 or dtype is torch.float64)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not is_in_transform()
        and tensor.untyped_storage().nbytes() > 0
    )


class Joint:
    """Fingerprints of several small tensors: four projections of each, on pseudo-random directions of its place.

    Products are summed up one after the other, so that a tensor's numbers do not depend on those beside it.

    Args:
        tensors: small ones (:func:`is_small`), of one dtype, by any numbers.
    """

    __slots__ = ("_indices", "_numbers", "_sizes")

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        self._indices = [*tensors]
        self._sizes = [tensor.numel() for tensor in tensors.values()]
        self._numbers = _projections([*tensors.values()], self._sizes, [*range(len(tensors))])

    def wild(self) -> list[int]:
        """Return which tensors have infinities, NaN, or numbers so large that they would hide the others."""
        rows = self._numbers
        # A sum of numbers among which there is a NaN is one; the largest of them is not.
        if max(map(max, rows)) < TAME and min(map(min, rows)) > -TAME and not math.isnan(sum(map(sum, rows))):
            return []
        columns = zip(self._indices, *rows, strict=True)
        return [index for index, *numbers in columns if not all(abs(number) < TAME for number in numbers)]

    def compare(self, tensors: Mapping[int, Tensor]) -> tuple[int, list[tuple[int, float]]]:
        """Compare those of the tensors that are among ``tensors``.

        Returns:
            How many are equal, and the others' numbers and relative errors.
        """
        places = [place for place, index in enumerate(self._indices) if index in tensors]
        present = [tensors[self._indices[place]] for place in places]
        if is_in_transform() or not all(map(_is_plain, present)):  # in a repetition some may be of another kind
            values = [plain_values(tensor) for tensor in present]
            places = [place for place, value in zip(places, values, strict=True) if value is not None]
            present = [value for value in values if value is not None]
        if not present:
            return 0, []
        now, then = _projections(present, self._sizes, places), self._numbers
        if len(places) < len(self._sizes):
            then = [[row[place] for place in places] for row in then]
        if now == then:
            return len(places), []
        pairs = zip(zip(*then, strict=True), zip(*now, strict=True), strict=True)
        errors = [error_between(Fingerprint([*a], 0), Fingerprint([*b], 0)) for a, b in pairs]
        unequal = [(self._indices[place], error) for place, error in zip(places, errors, strict=True) if error > 0.0]
        return len(places) - len(unequal), unequal


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.untyped_storage().nbytes() > 0
    )


def _projections(tensors: list[Tensor], sizes: list[int], places: list[int]) -> Numbers:
    """Return for each direction the projections of the tensors at some places of those with these sizes."""
    with torch.no_grad():
        flat = flattened(tensors)
        directions = _directions[flat.dtype][:, : sum(sizes)]
        if len(places) < len(sizes):
            parts = torch.split(directions, sizes, 1)
            directions = torch.cat([parts[place] for place in places], 1)
            sizes = [sizes[place] for place in places]
        lengths = torch.tensor([sizes] * PROJECTIONS, device="cpu")
        sums: Numbers = torch.segment_reduce(directions * flat, "sum", lengths=lengths, axis=1, unsafe=True).tolist()
        return sums


def _drawn() -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(PROJECTIONS, MOST, generator=generator, dtype=torch.float64)


_directions = {dtype: _drawn().to(dtype) for dtype in (torch.float32, torch.float64)}
