"""Aligned-MTL: gradients made orthogonal and equally long."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from recollect.aggregation._gramian import normalized
from recollect.aggregation._settings import Choice
from recollect.aggregation._weighting import PreferenceWeighting

__all__ = ["AlignedMTLWeighting"]

ScaleMode = Literal["min", "median", "rmse"]


class AlignedMTLWeighting(PreferenceWeighting, settings={"scale_mode": Choice(get_args(ScaleMode))}):
    r"""Give all principal components of the gradients one size, and combine what comes out by preference.

    Algorithm 1 of "Independent Component Alignment for Multi-Task Learning" (Senushkin et al. 2023, arXiv 2305.19000):
    :math:`w = \sigma V \Lambda^{-1/2} V^\top p` for the eigenvalues :math:`\Lambda` of G that are not zero up to
    rounding and their eigenvectors V. If all are zero, w = p.

    Args:
        pref_vector: p ``[m]``, finite and not negative; None: 1 / m each.
        scale_mode: :math:`\sigma^2` is the smallest of these eigenvalues (``"min"``, the paper's), the lower median
            (``"median"``) or their mean (``"rmse"``).

    Raises:
        TypeError: ``pref_vector`` is no tensor.
        ValueError: a wrong ``pref_vector``, or another ``scale_mode``.

    Example:
        >>> import torch
        >>> from recollect.aggregation import AlignedMTLWeighting
        >>> jacobian = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> weights = AlignedMTLWeighting()(jacobian @ jacobian.T)
        >>> weights
        tensor([0.5000, 0.2500])
        >>> weights @ jacobian  # the mean of two gradients of the length 1
        tensor([0.5000, 0.5000])
    """

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: ScaleMode = "min") -> None:
        super().__init__(pref_vector)
        self.scale_mode = scale_mode

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        preference = self.preference(gramian)
        values, vectors = torch.linalg.eigh(normalized(gramian))
        there = values > values[-1] * len(values) * torch.finfo(gramian.dtype).eps
        if not bool(there.any()):
            return preference
        values, vectors = values[there], vectors[:, there]
        size = {"min": values[0], "median": values.median(), "rmse": values.mean()}[self.scale_mode]
        weights: Tensor = vectors @ ((vectors.T @ preference) * (size / values).sqrt())
        return weights
