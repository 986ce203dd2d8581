"""What the tests of all parts do with a device: move things there, and compare with the CPU."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from device.emulation import NAME, watch

Module = TypeVar("Module", bound=nn.Module)


def there(value: Any) -> Any:
    """Return a tree of tensors on the device; leaves stay leaves."""
    return tree_map(lambda t: t.to(NAME) if isinstance(t, Tensor) else t, value)


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float = 1e-9) -> None:
    """Assert that tensors are on the device, and equal up to rounding to others, wherever those are."""
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert one.device.type == NAME
            torch.testing.assert_close(one.detach().cpu(), two.detach().cpu(), rtol=tolerance, atol=tolerance)


def gradients(
    module: nn.Module,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    within: AbstractContextManager[Any] | None = None,
) -> list[Tensor | None]:
    """Return the output, and the gradients of a weighting of it by the first input and the parameters.

    Args:
        module: is called, and has the parameters.
        inputs: of the call.
        call: is called instead.
        within: the forward pass runs in this context, and backward does not.
    """
    x = inputs[0].detach().requires_grad_()
    with within or nullcontext():
        output = (module if call is None else call)(x * 1.0, *inputs[1:])
    outputs = [output] if isinstance(output, Tensor) else [o for o in output if isinstance(o, Tensor)]
    total = sum((o * _weights(o)).sum() for o in outputs)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [*outputs, *torch.autograd.grad(total, leaves, allow_unused=True)]


def _weights(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)


def saved_and_loaded(module: Module, fresh: Module) -> Module:
    """Return a fresh module on the device with the state of another, by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = fresh.to(NAME)
    fresh.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return fresh


def waits(step: Callable[[], Any], times: int = 2) -> list[str]:
    """Return where a step waits for the device, or for a copy to it, when it is taken again after the first time."""
    step()
    with watch() as log:
        for _ in range(times):
            step()
    return log.where + log.sent
