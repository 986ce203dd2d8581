"""A training step that can be tried, and left as if it had not been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recollect._util._tree import Tree, tensors_of
from recollect.frames import backward_mode, settle, trial
from recollect.memory import peak_memory

__all__ = ["Shapes", "Step", "apart", "is_within"]

Shapes = tuple[tuple[int, ...], ...]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return (*tensor.shape, *(() if tensor.layout is torch.strided else (tensor.values().numel(),)))


def is_within(shapes: Shapes, known: Shapes) -> bool:
    """Whether no dimension of any input is larger than it was."""
    if [len(shape) for shape in shapes] != [len(shape) for shape in known]:
        return False
    return all(
        size <= most for one, other in zip(shapes, known, strict=True) for size, most in zip(one, other, strict=True)
    )


@dataclass(frozen=True)
class Step:
    """A training step that can be tried."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor] | None
    device: torch.device
    whole: Callable[..., Tensor] | None = None  # from the arguments to the loss, in place of both

    def forward(self) -> Tensor:
        """Run the forward pass, and return what is differentiated."""
        if self.whole is not None:
            return self.whole(*self.args, **self.kwargs)
        output = self.model(*self.args, **self.kwargs)
        if self.loss is not None:
            return self.loss(output)
        parts = [t.sum() for t in tensors_of(output) if t.requires_grad]
        if not parts:
            raise ValueError(f"{type(self.model).__name__}: no output requires a gradient; give loss=")
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def peak(self) -> int:
        """Run a whole step, and return the peak of what it allocates, in bytes."""
        with self.tried(), peak_memory(self.device) as memory:
            self.forward().backward()  # type: ignore[no-untyped-call]
        settle()
        return memory.peak_bytes

    @contextmanager
    def tried(self) -> Iterator[None]:
        """Return a context after which the model is what it was."""
        leaves = [t for t in tensors_of((self.args, self.kwargs)) if t.requires_grad and t.is_leaf]
        torch.clear_autocast_cache()  # a step makes its casts itself, and they count
        try:
            # What must happen once per step, such as pushes to histories, happens in none of these.
            with trial(self.model, {self.device}, leaves), backward_mode():
                yield
        finally:
            torch.clear_autocast_cache()

    def size(self) -> int:
        """Return the bytes of the inputs."""
        return sum(t.nbytes for t in tensors_of((self.args, self.kwargs)) if t.layout is torch.strided)

    def shapes(self) -> Shapes:
        """Return the shapes of the inputs; of what is sparse, with the number of its entries."""
        return tuple(_shape(t) for t in tensors_of((self.args, self.kwargs)))


def apart(value: Any) -> Any:
    """Return arguments whose tensors are leaves of their own, for a step that is tried."""
    tree = Tree(value)
    tree.tensors = [t.detach().clone().requires_grad_(t.requires_grad) for t in tree.tensors]
    return tree.build(tree.tensors)
