"""A step is run plainly and with frames from the same seed, in float64, and what it returns is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recollect
from recollect.frames import FrameError, couple

RIGHT = 1e-9
SOURCES = ("checkpoint", "inverse", "coupling")
each_source = pytest.mark.parametrize("source", SOURCES)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


class Wrap:
    """Runs regions with frames, or plainly.

    Args:
        framed: with frames.
        **options: of :func:`recollect.checkpoint`.
    """

    def __init__(self, framed: bool, **options: Any) -> None:
        self.framed = framed
        self.options = options if framed else {}

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return (
            recollect.checkpoint(function, *args, **kwargs, **self.options)
            if self.framed
            else function(*args, **kwargs)
        )

    def over(self, source: str, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run ``block`` as a region of the source: on ``x`` ``[n, c]``, or on a half of its channels."""
        if source == "checkpoint":
            return self(block, x)
        if source == "inverse":

            def swap(x: Tensor) -> Tensor:
                a, b = x.chunk(2, -1)
                return torch.cat([b + block(a), a], -1)

            def unswap(y: Tensor) -> Tensor:
                b, a = y.chunk(2, -1)
                return torch.cat([a, b - block(a)], -1)

            return recollect.checkpoint(swap, x, inverse=unswap, **self.options) if self.framed else swap(x)
        if self.framed:
            return couple([block, torch.sin], x, [(), ()], **self.options)
        a, b = x.chunk(2, -1)
        a = a + block(b.clone())
        return torch.cat([a, b + a.sin()], -1)


def width(source: str) -> int:
    """Return the channels of an input whose block has four."""
    return 4 if source == "checkpoint" else 8


def data(source: str = "checkpoint", rows: int = 16) -> Tensor:
    return torch.randn(rows, width(source), requires_grad=True) * 1


def results(*modules: nn.Module) -> list[Tensor]:
    """Return the gradients of all parameters, and all buffers."""
    found = []
    for module in modules:
        found += [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        found += [buffer.to(torch.float64) for buffer in module.buffers()]
    return found


Step = Callable[[Wrap], Sequence[Tensor]]


def both(step: Step) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of the step's tensors, plain and with frames."""
    runs = []
    for framed in (False, True):
        torch.manual_seed(0)
        runs.append([t.detach().clone() for t in step(Wrap(framed))] + [torch.get_rng_state()])
    return list(zip(*runs, strict=True))


def assert_equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for i, (expected, found) in enumerate(pairs):
        assert expected.shape == found.shape
        if expected.is_floating_point():
            error = float((expected - found).abs().max()) if expected.numel() else 0.0
            assert torch.allclose(expected, found, rtol=RIGHT, atol=RIGHT), f"result {i} differs by {error:.1e}"
        else:
            assert torch.equal(expected, found), f"result {i}"


def assert_right(step: Step) -> None:
    assert_equal(both(step))


def assert_right_or_refused(step: Step) -> None:
    try:
        pairs = both(step)
    except FrameError as error:
        refusal = str(error)
    else:
        assert_equal(pairs)
        return
    assert len(refusal) > 40, refusal
