"""The systems that `bench.depth` compares: one grouped additive coupling, five ways to train it.

All of them run the same block modules, with the same weights, on the same graph:
y_1 = x_1 + f_1(x_2 + ... + x_C), y_i = x_i + f_i(y_{i-1}).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_geometric.nn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recollect.models import RevGNN
from recollect.reversible import GroupAddRev

Blocks = Sequence[nn.ModuleList]
KEEPS_ACTIVATIONS = ("plain", "checkpoint")  # memory that grows with depth


class UnavailableError(Exception):
    """A system that cannot run here; the message says why."""


class System:
    """A stack of layers, and what can be learned of it after a step."""

    def __init__(self, layers: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def last_drift(self) -> float | None:
        """What the system itself says of its drift."""
        return None


class Recollect(System):
    def __init__(self, modules: Sequence[GroupAddRev], graph: Tensor) -> None:
        super().__init__([_bind(module, graph) for module in modules])
        self.modules = modules

    def last_drift(self) -> float | None:
        return max((m.last_drift for m in self.modules if m.last_drift is not None), default=None)


def build_blocks(depth: int, groups: int, channels: int, conv: str, norm: str, dropout: float) -> list[nn.ModuleList]:
    """The blocks of `RevGNN` ("norm, ReLU, dropout, conv"), or the bare convolutions with norm "bare"."""
    size = channels // groups
    if norm == "bare" and dropout:
        raise ValueError("bare convolutions have no dropout")
    # Taken from a RevGNN so that what is measured is what the library trains.
    model = RevGNN(1, channels, 1, depth, groups, conv, dropout, norm=None if norm == "bare" else norm)
    stacks = [layer.convs for layer in model.layers]
    if norm == "bare":
        stacks = [nn.ModuleList(block.conv for block in stack) for stack in stacks]
    assert size * groups == channels
    return stacks


def build(name: str, blocks: Blocks, graph: Tensor) -> System:
    """Make one of `SYSTEMS` over blocks that it shares with the others.

    Raises:
        UnavailableError: it cannot run here.
    """
    return SYSTEMS[name](blocks, graph)


def _bind(layer: Callable[..., Tensor], graph: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, graph)


def _plain(blocks: Blocks, graph: Tensor) -> System:
    layers = [torch_geometric.nn.GroupAddRev(stack, disable=True) for stack in blocks]
    return System([_bind(layer, graph) for layer in layers])


def _checkpoint(blocks: Blocks, graph: Tensor) -> System:
    def bind(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(layer, x, graph, use_reentrant=False)

    return System([bind(torch_geometric.nn.GroupAddRev(stack, disable=True)) for stack in blocks])


def _pyg(blocks: Blocks, graph: Tensor) -> System:
    return System([_bind(torch_geometric.nn.GroupAddRev(stack), graph) for stack in blocks])


class _OnGraph(nn.Module):
    """A block with its graph: memcnn's coupling hands on a single tensor."""

    def __init__(self, block: nn.Module, graph: Tensor) -> None:
        super().__init__()
        self.block = block
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.graph)


def _memcnn(blocks: Blocks, graph: Tensor) -> System:
    if any(len(stack) != 2 for stack in blocks):
        raise UnavailableError("memcnn's additive coupling has two groups")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it decorates with names that torch has deprecated
            import memcnn
    except Exception as error:  # whatever it is, the others are measured all the same
        raise UnavailableError(f"memcnn cannot be imported: {type(error).__name__}: {error}") from error

    def layer(stack: nn.ModuleList) -> Callable[[Tensor], Tensor]:
        coupling = memcnn.AdditiveCoupling(_OnGraph(stack[0], graph), _OnGraph(stack[1], graph), split_dim=-1)
        return memcnn.InvertibleModuleWrapper(coupling, keep_input=False, keep_input_inverse=False)

    return System([layer(stack) for stack in blocks])


def _recollect(blocks: Blocks, graph: Tensor) -> System:
    return Recollect([GroupAddRev(stack) for stack in blocks], graph)


SYSTEMS: dict[str, Callable[[Blocks, Tensor], System]] = {
    "plain": _plain,
    "checkpoint": _checkpoint,
    "pyg": _pyg,
    "memcnn": _memcnn,
    "recollect": _recollect,
}


class Step:
    """One training step of a system: forward from a fresh copy of the input, loss, backward.

    The copy is because some systems empty their input. They fill it again in backward, so after the step it holds
    what they reconstructed.
    """

    def __init__(self, system: System, x: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self.system = system
        self.x = x  # a leaf that requires grad
        self.leaves = [x, *parameters]

    def zero_gradients(self) -> None:
        """Allocate the gradients, or zero them: with them there, a step's peak is what comes beyond them."""
        for leaf in self.leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            else:
                leaf.grad.zero_()

    def __call__(self) -> None:
        """Run the step as a training loop does, without holding the input: who would keep it pays for it."""
        self._backward(self.system(self.x.clone()))

    def run(self) -> tuple[Tensor, Tensor]:
        """Return the input that the system was given, and its output."""
        given = self.x.clone()
        out = self.system(given)
        self._backward(out)
        return given, out.detach()

    @staticmethod
    def _backward(out: Tensor) -> None:
        F.mse_loss(out, torch.zeros((), dtype=out.dtype, device=out.device).expand_as(out)).backward()

    def gradients(self, seed: int) -> dict[str, Any]:
        """Run a step with its own random draws, and return its gradients, output and reconstructed input."""
        self.zero_gradients()
        torch.manual_seed(seed)
        given, out = self.run()
        return {
            "gradients": [leaf.grad.clone() for leaf in self.leaves if leaf.grad is not None],
            "output": out.clone() if out.untyped_storage().nbytes() else None,
            "input": given.detach(),
        }
