"""The bases of weightings: of all, of those with preferences, and of those with a memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect._transfer import sent
from recollect.aggregation._gramian import check_tensor, checked
from recollect.aggregation._settings import Configurable, Vector

__all__ = ["PreferenceWeighting", "StatefulWeighting", "Weighting", "checked_weights", "fitted"]


class Weighting(Configurable, ABC):
    """A callable from the Gramian of m gradients to m weights.

    The update is then Jᵀ w for weights w, that is the gradient of ``losses @ w``. To write a method of your own,
    extend this class and define :meth:`weigh`. As with any module, ``register_forward_hook`` tells what a weighting
    returns in the midst of training. Settings can be assigned anew, and are checked then as in the constructor.

    Weights are computed in host memory, in float64: the Gramian is copied there, and the weights to its device. That is
    the only time a call waits for the device. No gradients flow through the weights.

    Example:
        >>> import torch
        >>> from recollect.aggregation import Weighting
        >>> class UnitGradients(Weighting):
        ...     def weigh(self, gramian):
        ...         return gramian.diagonal().rsqrt()
        >>> UnitGradients()(torch.diag(torch.tensor([1.0, 4.0])))
        tensor([1.0000, 0.5000])
    """

    if TYPE_CHECKING:  # a module's own takes and returns anything

        def __call__(self, gramian: Tensor) -> Tensor: ...

    @torch.no_grad()
    def forward(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``, in the Gramian's type and on its device.

        Where a weight is beyond the range of the Gramian's
        type (a float16 ends at 65504), all weights are divided by one number: the update keeps its direction.

        Args:
            gramian: J Jᵀ ``[m, m]``: symmetric, positive semi-definite up to rounding.

        Raises:
            TypeError: it is no tensor, or :meth:`weigh` returns none.
            ValueError: it is no Gramian (not square, empty, not symmetric, a negative diagonal) or not finite; the
                error names the objectives at fault. Or :meth:`weigh` returns another shape than [m].
        """
        (host,) = self.on_host(gramian)
        matrix = self.check_gramian(host)
        with torch.autocast("cpu", enabled=False):
            weights = self.weigh(matrix)
        return fitted(checked_weights(weights, len(matrix), f"{type(self).__name__}.weigh"), gramian)

    def check_gramian(self, gramian: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return the matrix as :meth:`weigh` takes it, or raise what :meth:`forward` raises.

        Args:
            gramian: ``[m, m]``.
            shape: how the m objectives are laid out, for the names in errors; by default they are counted.
        """
        check_tensor("the Gramian", gramian)
        return checked(gramian, shape)

    @abstractmethod
    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]`` for a Gramian ``[m, m]`` in host memory that has passed the checks.

        Buffers are in host memory too. Weights on another device are as good, but are fetched if the Gramian given to
        :meth:`forward` is not there.
        """


def checked_weights(weights: Tensor, count: int, giver: str) -> Tensor:
    """Return what gives weights has given, or raise if it is not one for each of so many objectives."""
    check_tensor(f"what {giver} returns", weights)
    if weights.shape != (count,):
        raise ValueError(
            f"{giver} returned weights of shape {list(weights.shape)}; there are {count} objectives, and it must "
            f"return one weight for each, [{count}]"
        )
    return weights


def fitted(weights: Tensor, like: Tensor) -> Tensor:
    """Return weights in the type and on the device of another tensor, all of them shrunk if one would overflow."""
    most = torch.finfo(like.dtype).max
    if not weights.is_floating_point() or torch.promote_types(weights.dtype, like.dtype) != like.dtype:
        exact = weights.double()
        largest = exact.abs().amax()
        if not forms_of(largest.device).reads_at_once:
            beyond = (largest > most) & largest.isfinite()
            weights = exact * torch.where(beyond, most / largest, 1.0)
        elif most < (found := largest.item()) < math.inf:
            weights = exact * (most / found)
    return sent(weights.to(like.dtype), like.device)


class PreferenceWeighting(Weighting, settings={"pref_vector": Vector()}):
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
        self.pref_vector = pref_vector

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


class StatefulWeighting(Weighting):
    """A weighting that remembers something from call to call.

    What it remembers is in ``state_dict()``. A module that moves to a device takes it there; the next call brings it
    back, in one copy with the Gramian. A call that raises leaves it as it was.

    Attributes:
        state: what is remembered, in float64; None before the first call.

    Example:
        >>> import torch
        >>> from recollect.aggregation import StatefulWeighting
        >>> class Calls(StatefulWeighting):
        ...     def weigh(self, gramian):
        ...         self.state = self.recalled(torch.zeros_like(gramian[0])) + 1
        ...         return self.state.clone()
        >>> calls = Calls()
        >>> calls(torch.eye(2)), calls(torch.eye(2))
        (tensor([1., 1.]), tensor([2., 2.]))
        >>> calls.reset()
        >>> calls(torch.eye(3))
        tensor([1., 1., 1.])
    """

    state: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", None)
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Forget everything: the next call is a first one."""
        self.state = None

    def recalled(self, first: Tensor) -> Tensor:
        """Return the state, or what it is before the first call.

        Raises:
            ValueError: it is of another number of objectives.
        """
        if self.state is None:
            return first
        if self.state.shape != first.shape:
            raise ValueError(
                f"{type(self).__name__} remembers {len(self.state)} objectives, and the Gramian has {len(first)}: call "
                "reset() when objectives change"
            )
        return sent(self.state.to(first.dtype), first.device)


def _make_room(module: StatefulWeighting, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the state the shape of the one that is about to be loaded, whatever was there."""
    loaded = state_dict.get(f"{prefix}state")
    module.state = torch.empty_like(loaded, device="cpu") if isinstance(loaded, Tensor) else None
