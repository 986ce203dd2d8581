"""What weightings that project onto the dual cone have in common."""

from __future__ import annotations

from torch import Tensor

from recollect.aggregation._dual_cone import project
from recollect.aggregation._settings import NOT_NEGATIVE
from recollect.aggregation._weighting import PreferenceWeighting

__all__ = ["ProjectingWeighting"]


class ProjectingWeighting(PreferenceWeighting, settings={"reg_eps": NOT_NEGATIVE}):
    """Preferences, a regularisation, and how well the last programs were solved."""

    def __init__(self, pref_vector: Tensor | None = None, *, reg_eps: float = 1e-4) -> None:
        super().__init__(pref_vector)
        self.reg_eps = reg_eps
        self.last_residual: float | None = None

    def project(self, gramian: Tensor, vectors: Tensor) -> Tensor:
        """Return the weights of the projections of Jᵀ u, for every row u of ``vectors``."""
        found = project(gramian, vectors, self.reg_eps)
        self.last_residual = found.residual
        return found.weights
