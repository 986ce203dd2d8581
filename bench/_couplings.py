"""The systems that `bench.invertible` compares: one stack of additive couplings, trained in six ways.

All of them run the same block modules with the same weights: y_1 = x_1 + f(x_2), y_2 = x_2 + g(y_1), halves along
dimension 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from bench._systems import UnavailableError
from recollect import invertible

Pairs = Sequence[tuple[nn.Module, nn.Module]]
System = Callable[[Tensor], Tensor]


class _Plain(nn.Module):
    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.f(x2)
        return torch.cat([y1, x2 + self.g(y1)], 1)


def _plain(pairs: Pairs) -> System:
    return nn.Sequential(*(_Plain(f, g) for f, g in pairs))


def _checkpoint(pairs: Pairs) -> System:
    layers, segments = _plain(pairs), max(1, round(len(pairs) ** 0.5))
    return lambda x: checkpoint_sequential(layers, segments, x, use_reentrant=False)


def _invtorch(pairs: Pairs) -> System:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import invtorch.nn
    except Exception as error:  # whatever it is, the others are measured all the same
        raise UnavailableError(f"invtorch cannot be imported: {type(error).__name__}: {error}") from error

    class Coupling(invtorch.nn.Module):
        def __init__(self, f: nn.Module, g: nn.Module) -> None:
            super().__init__()
            self.f, self.g = f, g
            self.seed = True

        def function(self, x: Tensor) -> Tensor:
            x1, x2 = x.chunk(2, 1)
            y1 = x1 + self.f(x2)
            return torch.cat([y1, x2 + self.g(y1)], 1)

        def inverse(self, y: Tensor) -> Tensor:
            y1, y2 = y.chunk(2, 1)
            x2 = y2 - self.g(y1)
            return torch.cat([y1 - self.f(x2), x2], 1)

    return nn.Sequential(*(Coupling(f, g) for f, g in pairs))


def _memcnn(pairs: Pairs) -> System:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import memcnn
    except Exception as error:  # whatever it is, the others are measured all the same
        raise UnavailableError(f"memcnn cannot be imported: {type(error).__name__}: {error}") from error

    def layer(f: nn.Module, g: nn.Module) -> Any:
        coupling = memcnn.AdditiveCoupling(f, g, split_dim=1)
        return memcnn.InvertibleModuleWrapper(
            coupling, keep_input=False, keep_input_inverse=False, preserve_rng_state=True
        )

    return nn.Sequential(*(layer(f, g) for f, g in pairs))


def _recollect(pairs: Pairs) -> System:
    return invertible.Sequential(*(invertible.AdditiveCoupling(f, g) for f, g in pairs))


COUPLINGS: dict[str, Callable[[Pairs], System]] = {
    "plain": _plain,
    "checkpoint_sequential": _checkpoint,
    "invtorch": _invtorch,
    "memcnn": _memcnn,
    "recollect": _recollect,
}
