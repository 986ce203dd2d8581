"""A training step that can be tried, and left as if it had not been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recollect._util._tree import ATOMS, Tree, tensors_of
from recollect.frames import Others, backward_mode, gradients_of, settle, trial
from recollect.memory import peak_memory

__all__ = ["Shapes", "Step", "apart", "is_within"]


class Shapes(NamedTuple):
    """What the peak of a step depends on.

    Attributes:
        sizes: dimensions of the inputs' tensors.
        numbers: whole numbers among the arguments.
        rest: types and flags of inputs and parameters, and other plain arguments.
    """

    sizes: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]
    rest: tuple[Any, ...]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return (*tensor.shape, *(() if tensor.layout is torch.strided else (tensor.values().numel(),)))


def is_within(shapes: Shapes, known: Shapes) -> bool:
    """Whether no dimension of any input and no number is larger than it was, and nothing else has changed."""
    if shapes.rest != known.rest or len(shapes.numbers) != len(known.numbers):
        return False
    if [len(shape) for shape in shapes.sizes] != [len(shape) for shape in known.sizes]:
        return False
    pairs = [(shapes.numbers, known.numbers), *zip(shapes.sizes, known.sizes, strict=True)]
    return all(size <= most for one, other in pairs for size, most in zip(one, other, strict=True))


@dataclass(frozen=True)
class Step:
    """A training step that can be tried."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor] | None
    device: torch.device
    whole: Callable[..., Tensor] | None = None  # from the arguments to the loss, in place of both
    noted: Callable[[], AbstractContextManager[None]] = nullcontext  # around the loss, which may run other modules

    def forward(self) -> Tensor:
        """Run the forward pass, and return what is differentiated; in :meth:`tried`."""
        if self.whole is not None:
            return self.whole(*self.args, **self.kwargs)
        output = self.model(*self.args, **self.kwargs)
        if self.loss is not None:
            with self.noted():
                return self.loss(output)
        parts = [t.sum() for t in tensors_of(output) if t.requires_grad]
        if not parts:
            raise ValueError(f"{type(self.model).__name__}: no output requires a gradient; give loss=")
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def peak(self) -> int:
        """Run a whole step, and return the peak of what it allocates, in bytes."""
        with self.tried() as step, peak_memory(self.device) as memory:
            loss = step.forward()
            with gradients_of(loss):
                loss.backward()  # type: ignore[no-untyped-call]
            del loss
        settle()
        return memory.peak_bytes

    @contextmanager
    def tried(self) -> Iterator[Step]:
        """Return a context after which the model is what it was, with the step on inputs of its own."""
        others = Others(self.model)
        tree = Tree((self.args, self.kwargs))  # with other containers, and the same tensors: caches know them
        own = [t.detach().requires_grad_() if t.requires_grad and not t.is_leaf else t for t in tree.tensors]
        args, kwargs = tree.build(own)
        step = replace(self, args=args, kwargs=kwargs, noted=others.noted)
        values = [(t, t._version, t.detach().clone()) for t in own if not t.is_inference()]
        leaves = [t for t in own if t.requires_grad]
        torch.clear_autocast_cache()  # a step makes its casts itself, and they count
        try:
            # What must happen once per step, such as pushes to histories, happens in none of these.
            with trial(self.model, {self.device}, leaves), backward_mode():
                yield step
        finally:
            others.put_back()
            with torch.no_grad():
                for tensor, version, value in values:
                    if tensor._version != version:
                        tensor.copy_(value)
            torch.clear_autocast_cache()

    def size(self) -> int:
        """Return the bytes of the inputs."""
        return sum(t.nbytes for t in tensors_of((self.args, self.kwargs)) if t.layout is torch.strided)

    def shapes(self) -> Shapes:
        """Return the shapes of the inputs, of what is sparse with the number of its entries, and what else counts."""
        tensors = list(tensors_of((self.args, self.kwargs)))
        plain = [value for value in (*self.args, *self.kwargs.values()) if type(value) in ATOMS]
        flags = [(t.dtype, t.requires_grad) for t in (*tensors, *self.model.parameters())]
        return Shapes(
            tuple(map(_shape, tensors)),
            tuple(value for value in plain if type(value) is int),
            (*flags, *(value for value in plain if type(value) in (bool, str, type(None)))),
        )


def apart(value: Any) -> Any:
    """Return arguments whose tensors are leaves of their own, for a step that is tried."""
    tree = Tree(value)
    tree.tensors = [t.detach().clone().requires_grad_(t.requires_grad) for t in tree.tensors]
    return tree.build(tree.tensors)
