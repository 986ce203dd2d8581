"""The base of all weightings."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from recollect.aggregation._gramian import check_tensor, checked

__all__ = ["PreferenceWeighting", "Weighting", "checked_weights"]


class Weighting(nn.Module, ABC):
    """A callable from the Gramian of m gradients to m weights.

    The update is then Jᵀ w for weights w, that is the gradient of ``losses @ w``. To write a method of your own,
    extend this class and define :meth:`weigh`. As with any module, ``register_forward_hook`` tells what a weighting
    returns in the midst of training.

    No gradients flow through the weights.
    """

    if TYPE_CHECKING:  # a module's own takes and returns anything

        def __call__(self, gramian: Tensor) -> Tensor: ...

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Refuse what the method has no setting of this name for, and list those that it has."""
        _, *known = inspect.signature(cls.__init__).parameters.values() if settings else (None,)
        names = [parameter.name for parameter in known]
        wrong = [name for name in settings if name not in names]
        if wrong and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in known):
            raise TypeError(f"{cls.__name__} has no setting {wrong[0]!r}; those that it has: {', '.join(names)}")
        return super().__new__(cls)

    @torch.no_grad()
    def forward(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``, in the Gramian's type and on its device.

        Args:
            gramian: J Jᵀ ``[m, m]``: symmetric, positive semi-definite up to rounding.

        Raises:
            TypeError: it is no tensor, or :meth:`weigh` returns none.
            ValueError: it is no Gramian (not square, empty, not symmetric, a negative diagonal) or not finite; the
                error names the objectives at fault. Or :meth:`weigh` returns another shape than [m].
        """
        check_tensor("the Gramian", gramian)
        with torch.autocast(gramian.device.type, enabled=False):
            weights = self.weigh(checked(gramian))
        return checked_weights(weights, len(gramian), f"{type(self).__name__}.weigh").to(gramian)

    @abstractmethod
    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]`` for a Gramian ``[m, m]`` that has passed the checks."""

    def extra_repr(self) -> str:
        """Show what the weighting was made with."""
        settings = {k: v for k, v in {**vars(self), **self._buffers}.items() if not k.startswith("_")}
        return ", ".join(f"{k}={v}" for k, v in settings.items() if k not in ("training", "last_residual"))


def checked_weights(weights: Tensor, count: int, giver: str) -> Tensor:
    """Return what gives weights has given, or raise if it is not one for each of so many objectives."""
    check_tensor(f"what {giver} returns", weights)
    if weights.shape != (count,):
        raise ValueError(
            f"{giver} returned weights of shape {list(weights.shape)}; there are {count} objectives, and it must "
            f"return one weight for each, [{count}]"
        )
    return weights


class PreferenceWeighting(Weighting):
    """A weighting that starts from how much each objective is preferred.

    Args:
        pref_vector: ``[m]``, finite and not negative; None: 1 / m each.

    Raises:
        TypeError: it is no tensor.
        ValueError: another shape, or numbers that are negative or not finite.
    """

    pref_vector: Tensor | None

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__()
        if pref_vector is not None:
            check_tensor("pref_vector", pref_vector)
            if pref_vector.ndim != 1 or not len(pref_vector):
                raise ValueError(f"pref_vector has one number for each objective, [m]; found {list(pref_vector.shape)}")
            if not bool((pref_vector.isfinite() & (pref_vector >= 0)).all()):
                raise ValueError(f"pref_vector must be finite and not negative; found {pref_vector.tolist()}")
        self.register_buffer("pref_vector", pref_vector, persistent=False)

    def preference(self, gramian: Tensor) -> Tensor:
        """Return the preferences for this Gramian's objectives, ``[m]`` in float64.

        Raises:
            ValueError: their numbers differ.
        """
        count = len(gramian)
        if self.pref_vector is None:
            return torch.full((count,), 1 / count, dtype=torch.float64, device=gramian.device)
        if len(self.pref_vector) != count:
            raise ValueError(f"pref_vector is for {len(self.pref_vector)} objectives; the Gramian has {count}")
        return self.pref_vector.to(gramian.device, torch.float64)
