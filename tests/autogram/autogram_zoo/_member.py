"""What every member of the zoo is, and its Gramian by the slow, obvious way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

WIDTH = 6
BATCHES = (1, 3, 32)


class Member(nn.Module):
    """A tiny network with one hazard, said by its name and its docstring; it draws its own inputs.

    Attributes:
        batch_dims: those that it allows: the dimension of all its inputs and outputs over whose elements it is
            independent; None asks for no independence.
        aligned: element i of the inputs is element i of the losses.
        batches: the sizes of a batch that it is tried with.
        refused: what the error for a batch dimension that it does not allow must name, "" where no module is to
            blame; None: not tried.
        reruns: it calls its modules again in backward, by other means than a frame.
        dtype: of parameters and inputs.
    """

    batch_dims: ClassVar[tuple[int | None, ...]] = (0, 1, None)
    aligned: ClassVar[bool] = True
    batches: ClassVar[tuple[int, ...]] = BATCHES
    refused: ClassVar[str | None] = None
    reruns: ClassVar[bool] = False
    dtype = torch.float64

    def inputs(self, batch: int, batch_dim: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments and keyword arguments; by default one tensor [batch, 6], or [2, batch, 6]."""
        return (self.features(batch, batch_dim),), {}

    def losses(self, output: Any) -> Tensor:
        """Return the losses of an output; by default one for each but the last of its dimensions."""
        factors = torch.linspace(0.5, 2, output.shape[-1], dtype=output.dtype)  # sums of what a norm returns are fixed
        loss: Tensor = (factors * output.square() + output).sum(-1)
        return loss

    def targets(self) -> Sequence[nn.Module]:
        """The modules over which the Gramian is taken."""
        return [self]

    def features(self, batch: int, batch_dim: int | None, width: int = WIDTH) -> Tensor:
        return self.draw(2, batch, width) if batch_dim == 1 else self.draw(batch, width)

    def draw(self, *shape: int) -> Tensor:
        """Return normal values that depend on the shape alone, and not on torch's random state."""
        generator = torch.Generator().manual_seed(sum(n * 7**i for i, n in enumerate(shape)))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def draw_index(self, high: int, *shape: int) -> Tensor:
        """Return integers below `high`, in the same way."""
        return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


MEMBERS: dict[str, type[Member]] = {}
Kind = TypeVar("Kind", bound=type[Member])


def member(kind: Kind) -> Kind:
    """Put a class into the zoo; two of one name are refused."""
    if kind.__name__ in MEMBERS:
        raise ValueError(f"there are two members named {kind.__name__}")
    MEMBERS[kind.__name__] = kind
    return kind


def build(kind: type[Member], dtype: torch.dtype = torch.float64) -> Member:
    """Return a member with weights that are the same each time, whatever the dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = kind().to(dtype)
    made.dtype = dtype
    return made


def run(made: Member, batch: int, batch_dim: int | None, *, call: Callable[..., Any] | None = None) -> Tensor:
    """Return the losses of one forward pass with random draws of its own."""
    args, kwargs = made.inputs(batch, batch_dim)
    torch.manual_seed(1)
    return made.losses((call or made)(*args, **kwargs))


def trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that require a gradient, each once."""
    return list({p: None for module in modules for p in module.parameters() if p.requires_grad})


def explicit_jacobian(losses: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the Jacobian [number of losses, number of scalars] in float64: one backward pass for each row."""
    rows = []
    for loss in losses.flatten():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, grads, strict=True)]
        rows.append(torch.cat([part.flatten().double() for part in parts]))
    return torch.stack(rows)


def as_generalised(gramian: Tensor, shape: Sequence[int]) -> Tensor:
    """Lay a Gramian [m, m] out as [m1..mk, mk..m1]."""
    k = len(shape)
    return gramian.reshape([*shape, *shape]).permute([*range(k), *reversed(range(k, 2 * k))])


def explicit_gramian(losses: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the Gramian of the explicit Jacobian as [m1..mk, mk..m1], in float64."""
    jacobian = explicit_jacobian(losses, parameters)
    return as_generalised(jacobian @ jacobian.T, losses.shape)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error of an entry over the norms of the two gradients that it is the product of.

    Gradients much smaller than the largest are measured against a millionth of that: rounding is no better.
    """
    k = expected.dim() // 2
    squares = torch.einsum(expected.double(), [*range(k), *reversed(range(k))], [*range(k)])
    norms = squares.clamp_min(0).sqrt()
    norms = norms.clamp_min(1e-6 * float(norms.max()) or 1.0)
    scale = torch.einsum(norms, [*range(k)], norms, [*range(k, 2 * k)], [*range(k), *reversed(range(k, 2 * k))])
    return float(((found.double() - expected.double()).abs() / scale).max())
