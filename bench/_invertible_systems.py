"""The systems that `bench.invertible` compares: one additive coupling of two groups, six ways to train a stack.

All of them run the same block modules with the same weights: y_1 = x_1 + f(x_2), y_2 = x_2 + g(y_1), split along the
second dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from bench._step import Step, System, imported
from recollect import invertible

Pairs = Sequence[tuple[nn.Module, nn.Module]]

NOTES = {
    "plain": "everything is kept",
    "checkpoint": "torch.utils.checkpoint.checkpoint_sequential, about sqrt(layers) segments, use_reentrant=False",
    "invtorch": "invtorch.nn.Module in torch.nn.Sequential; seed=True where there is dropout",
    "invtorch_seq": "the same modules in invtorch.nn.Sequential, which runs them as one checkpoint",
    "memcnn": "AdditiveCoupling in InvertibleModuleWrapper(keep_input=False), preserve_rng_state=True where there is "
    "dropout",
    "recollect": "recollect.invertible.Sequential of AdditiveCoupling",
}


class PlainCoupling(nn.Module):
    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.g = g

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.f(x2)
        return torch.cat([y1, x2 + self.g(y1)], 1)


class Recollect(System):
    def __init__(self, pairs: Pairs) -> None:
        self.stack = invertible.Sequential(*(invertible.AdditiveCoupling(f, g) for f, g in pairs))
        super().__init__([self.stack])

    def last_drift(self) -> float | None:
        return self.stack.last_drift


def _plain(pairs: Pairs) -> System:
    return System([PlainCoupling(f, g) for f, g in pairs])


def _checkpoint(pairs: Pairs) -> System:
    layers = nn.Sequential(*(PlainCoupling(f, g) for f, g in pairs))
    segments = max(1, round(math.sqrt(len(layers))))
    return System([lambda x: checkpoint_sequential(layers, segments, x, use_reentrant=False)])


@functools.cache
def _invtorch_coupling() -> type[nn.Module]:
    base: type[nn.Module] = imported("invtorch.nn").Module

    class Coupling(base):  # type: ignore[valid-type,misc]  # a package that may be missing
        """Written as invtorch's README writes its module."""

        def __init__(self, f: nn.Module, g: nn.Module) -> None:
            super().__init__()
            self.f = f
            self.g = g
            self.seed = _draws(self)

        def function(self, inputs: Tensor) -> Tensor:
            x1, x2 = inputs.chunk(2, 1)
            y1 = x1 + self.f(x2)
            return torch.cat([y1, x2 + self.g(y1)], 1)

        def inverse(self, outputs: Tensor) -> Tensor:
            y1, y2 = outputs.chunk(2, 1)
            x2 = y2 - self.g(y1)
            return torch.cat([y1 - self.f(x2), x2], 1)

    return Coupling


def _invtorch(pairs: Pairs) -> System:
    coupling = _invtorch_coupling()
    return System([coupling(f, g) for f, g in pairs], refills=True)


def _invtorch_seq(pairs: Pairs) -> System:
    coupling = _invtorch_coupling()
    stack = imported("invtorch.nn").Sequential(*(coupling(f, g) for f, g in pairs))
    stack.seed = _draws(stack)
    return System([stack], refills=True)


def _memcnn(pairs: Pairs) -> System:
    memcnn = imported("memcnn")

    def layer(f: nn.Module, g: nn.Module) -> nn.Module:
        coupling = memcnn.AdditiveCoupling(f, g)
        wrapped: nn.Module = memcnn.InvertibleModuleWrapper(
            coupling, keep_input=False, preserve_rng_state=_draws(coupling)
        )
        return wrapped

    return System([layer(f, g) for f, g in pairs], refills=True)


def _draws(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) for part in module.modules())


SYSTEMS: dict[str, Callable[[Pairs], System]] = {
    "plain": _plain,
    "checkpoint": _checkpoint,
    "invtorch": _invtorch,
    "invtorch_seq": _invtorch_seq,
    "memcnn": _memcnn,
    "recollect": Recollect,
}


@dataclass(frozen=True)
class Stack:
    """Random inputs, and pairs of blocks for the couplings.

    Attributes:
        blocks: "mlp" for (Linear, GELU, Linear), "conv" for (3x3 convolution, ReLU, 3x3 convolution) of images; both
            as wide inside as outside.
        batch: number of inputs.
        channels: of both groups together.
        side: height and width of images.
    """

    blocks: str
    batch: int
    channels: int
    side: int = 16

    def steps(
        self, depth: int, device: torch.device, dtype: torch.dtype = torch.float32, dropout: float = 0.0
    ) -> dict[str, Callable[[], Step]]:
        """How to make a step of each system, all on the same inputs and weights."""
        torch.manual_seed(0)
        shape = [self.batch, self.channels] + [self.side, self.side] * (self.blocks == "conv")
        x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        blocks = [self._block(dropout).to(device, dtype) for _ in range(2 * depth)]
        pairs = list(zip(blocks[::2], blocks[1::2], strict=True))
        parameters = [p for pair in pairs for block in pair for p in block.parameters()]
        return {name: functools.partial(_make_step, name, pairs, x, parameters) for name in SYSTEMS}

    def _block(self, dropout: float) -> nn.Module:
        width = self.channels // 2
        draw = [nn.Dropout(dropout)] if dropout else []
        if self.blocks == "mlp":
            return nn.Sequential(nn.Linear(width, width), nn.GELU(), *draw, nn.Linear(width, width))
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        return nn.Sequential(convolutions[0], nn.ReLU(), *draw, convolutions[1])

    def __str__(self) -> str:
        if self.blocks == "mlp":
            return f"additive couplings of (Linear, GELU, Linear), {self.batch:,} x {self.channels} channels"
        size = f"{self.batch:,} images of {self.side} x {self.side}, {self.channels} channels"
        return f"additive couplings of (3x3 convolution, ReLU, 3x3 convolution), {size}"


def _make_step(name: str, pairs: Pairs, x: Tensor, parameters: Sequence[nn.Parameter]) -> Step:
    return Step(SYSTEMS[name](pairs), x, parameters)
