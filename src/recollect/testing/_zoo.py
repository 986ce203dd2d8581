"""A zoo of hazards: small invertible modules, each with one thing that could make a rebuild go wrong.

``ZOO[name](channels)`` returns a module and a function that makes inputs for it, ``inputs(batch) -> tuple``. The first
two inputs are floating-point tensors of shape [batch, channels], and so are the first two outputs: modules of the zoo
can follow one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.frames import in_backward
from recollect.invertible import Module

__all__ = ["ZOO", "Factory"]

Factory = Callable[[int], tuple[Module, Callable[[int], tuple[Any, ...]]]]

ZOO: dict[str, Factory] = {}


def _pair(channels: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda batch: (torch.randn(batch, channels), torch.randn(batch, channels))


def _zoo(name: str) -> Callable[[type[Module]], type[Module]]:
    """Register a class under ``name``; its inputs are a pair unless it has ``inputs(channels, batch)``."""

    def register(kind: type[Module]) -> type[Module]:
        def factory(channels: int) -> tuple[Module, Callable[[int], tuple[Any, ...]]]:
            module = kind(channels)
            make = getattr(module, "inputs", None)
            return module, make if make is not None else _pair(channels)

        if name in ZOO:
            raise ValueError(f"the zoo has two of {name!r}")
        ZOO[name] = factory
        return kind

    return register


class _Swap(Module):
    """(a, b) -> (b + f(a), a): what most of the zoo is made of; ``a`` is passed on as it is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def function(self, *args: Any) -> Any:
        a, b = args
        return b + self.block(a), a

    def inverse(self, *args: Any) -> Any:
        c, a = args
        return a, c - self.block(a)

    @property
    def reversible(self) -> bool:
        return True


@_zoo("plain")
class _Plain(_Swap):
    """No hazard, but that the second output is the first input."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Sequential(nn.Linear(channels, channels), nn.Tanh()))


@_zoo("shared parameters")
class _Shared(Module):
    """Two sub-functions with one weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, channels)
        self.second = nn.Linear(channels, channels)
        self.second.weight = self.first.weight

    def function(self, *args: Any) -> Any:
        a, b = args
        c = a + torch.tanh(self.first(b))
        return c, b + torch.sin(self.second(c))

    def inverse(self, *args: Any) -> Any:
        c, d = args
        b = d - torch.sin(self.second(c))
        return c - torch.tanh(self.first(b)), b


@_zoo("frozen branch")
class _Frozen(_Swap):
    """A block without trainable parameters before one with."""

    def __init__(self, channels: int) -> None:
        frozen = nn.Linear(channels, channels).requires_grad_(False)
        super().__init__(nn.Sequential(frozen, nn.Tanh(), nn.Linear(channels, channels), nn.Sigmoid()))


@_zoo("unused output")
class _Unused(Module):
    """A third output that nobody uses, with a parameter that gets no gradient then."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Linear(channels, channels)
        self.scale = nn.Parameter(torch.rand(()))

    def function(self, *args: Any) -> Any:
        a, b = args[:2]
        return b + self.block(a).tanh(), a * 2, (a * self.scale).exp()

    def inverse(self, *args: Any) -> Any:
        c, a = args[0], args[1] / 2
        return a, c - self.block(a).tanh()


@_zoo("side effect")
class _SideEffect(_Swap):
    """A counter of steps, guarded by ``in_backward``, and a running mean among the buffers, which is not."""

    calls: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Sequential(nn.Linear(channels, channels), nn.Softplus()))
        self.steps = 0
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def function(self, *args: Any) -> Any:
        if not in_backward():
            self.steps += 1
        self.calls += 1
        return super().function(*args)

    @property
    def reversible(self) -> bool:
        return False  # its inverse counts nothing


@_zoo("two dropouts")
class _Dropouts(Module):
    """Random numbers in two sub-functions, drawn by the inverse in the order of the function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.dropout = nn.Dropout(0.4)

    def _masks(self, like: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(like)
        return self.dropout(ones), self.dropout(ones)

    def function(self, *args: Any) -> Any:
        a, b = args
        p, q = self._masks(a)
        c = a + p * torch.tanh(self.first(b))
        return c, b + q * torch.tanh(self.second(c))

    def inverse(self, *args: Any) -> Any:
        c, d = args
        p, q = self._masks(c)
        b = d - q * torch.tanh(self.second(c))
        return c - p * torch.tanh(self.first(b)), b


@_zoo("batch norm")
class _Normalised(_Swap):
    """Running statistics inside a coupling: they change once a step."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.Tanh(), nn.Dropout(0.2))
        )


@_zoo("in-place relu")
class _InPlace(_Swap):
    """An operation that overwrites what another has made."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels))
        )


@_zoo("output is a view")
class _View(Module):
    """Outputs that are views of inputs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Linear(channels, channels)

    def function(self, *args: Any) -> Any:
        a, b = args
        return b + self.block(a).tanh().flip(-1), a.view(a.shape)

    def inverse(self, *args: Any) -> Any:
        c, a = args
        return a.view(a.shape), c - self.block(a).tanh().flip(-1)


@_zoo("output is the input")
class _Passed(Module):
    """Inputs that are passed on as they are, next to one that is not; they stay in their places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Linear(channels, channels)

    def function(self, *args: Any) -> Any:
        a, b = args
        return a, b * torch.sigmoid(self.block(a)).add(0.5)

    def inverse(self, *args: Any) -> Any:
        a, d = args
        return a, d / torch.sigmoid(self.block(a)).add(0.5)


@_zoo("called twice")
class _Twice(Module):
    """One block called twice in a forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(channels, channels), nn.Tanh())

    def function(self, *args: Any) -> Any:
        a, b = args
        c = a + self.block(b)
        return c, b + self.block(c)

    def inverse(self, *args: Any) -> Any:
        c, d = args
        b = d - self.block(c)
        return c - self.block(b), b


@_zoo("keywords")
class _Keywords(_Swap):
    """A block that takes keyword arguments, among them a tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Bilinear(channels, channels, channels))
        self.shift = nn.Parameter(torch.randn(channels))

    def function(self, *args: Any) -> Any:
        a, b = args
        return b + torch.tanh(self.block(input1=a, input2=a + self.shift)), a

    def inverse(self, *args: Any) -> Any:
        c, a = args
        return a, c - torch.tanh(self.block(input1=a, input2=a + self.shift))


@_zoo("not tensors")
class _NotTensors(Module):
    """None, a number, a string and a tuple among arguments and outputs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Linear(channels, channels)
        self._channels = channels

    def inputs(self, batch: int) -> tuple[Any, ...]:
        return (*_pair(self._channels)(batch), None, 0.5, ("tanh", 3))

    def function(self, *args: Any) -> Any:
        a, b, nothing, factor, name = args if len(args) > 2 else (*args, None, 0.5, ("tanh", 3))
        return b + factor * getattr(torch, name[0])(self.block(a)), a, nothing, factor, name

    def inverse(self, *args: Any) -> Any:
        c, a, nothing, factor, name = args if len(args) > 2 else (*args, None, 0.5, ("tanh", 3))
        return a, c - factor * getattr(torch, name[0])(self.block(a)), nothing, factor, name

    @property
    def reversible(self) -> bool:
        return True


@_zoo("integers")
class _Integers(Module):
    """An integer input that is passed on, and an integer and a boolean output that are made."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Linear(channels, channels)
        self.table = nn.Embedding(5, channels)
        self._channels = channels

    def inputs(self, batch: int) -> tuple[Any, ...]:
        return (*_pair(self._channels)(batch), torch.randint(0, 5, (batch,)))

    def _steer(self, a: Tensor, index: Tensor) -> Tensor:
        steering: Tensor = F.silu(self.block(a)) + self.table(index)
        return steering

    def function(self, *args: Any) -> Any:
        a, b, index = args[:3]
        c = b + self._steer(a, index)
        return c, a, index, c.argmax(-1), c > 0

    def inverse(self, *args: Any) -> Any:
        c, a, index = args[:3]
        return a, c - self._steer(a, index), index


@_zoo("hidden outputs")
class _Hidden(Module):
    """Its inverse needs the signs, which its forward hides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Linear(channels, channels)

    @property
    def num_outputs(self) -> int:
        return 2

    def function(self, *args: Any) -> Any:
        a, b = args
        return a.square() + 1e-3 * a.abs(), b + self.block(a).tanh(), a.sign()

    def inverse(self, *args: Any) -> Any:
        y, c, sign = args
        size = 2 * y / (1e-3 + (1e-6 + 4 * y).sqrt())  # the positive root, without cancellation
        a = sign * size
        return a, c - self.block(a).tanh()


@_zoo("no gradient")
class _NoGradient(Module):
    """An output without gradient beside one with, and a part of the function that is not differentiated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Linear(channels, channels)

    def function(self, *args: Any) -> Any:
        a, b = args[:2]
        with torch.no_grad():
            scale = a.std(0, keepdim=True, correction=0) + 1
        return b / scale + self.block(a).tanh(), a, scale

    def inverse(self, *args: Any) -> Any:
        c, a = args[:2]
        scale = a.std(0, keepdim=True, correction=0) + 1
        return a, (c - self.block(a).tanh()) * scale
