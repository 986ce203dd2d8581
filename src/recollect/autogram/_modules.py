"""What an engine is made for: modules, none inside another, and those of their parameters that count."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["check_modules", "counted_parameters"]


def check_modules(modules: Sequence[nn.Module]) -> None:
    """Raise if there is no module, something is none, or one contains another."""
    if not modules:
        raise ValueError("Engine was given no module; give the modules whose parameters count")
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"Engine takes modules, and was given {type(module).__name__}; give each module as an argument of its "
                "own, and the dimension of the batch by its name: Engine(*modules, batch_dim=0)"
            )
    inside = {id(child): module for module in modules for child in module.modules() if child is not module}
    for k, module in enumerate(modules):
        if id(module) in inside or any(module is other for other in modules[:k]):
            outer = type(inside.get(id(module), module)).__name__
            raise ValueError(
                f"{type(module).__name__} is given to the engine and is part of {outer}, which is given too; give the "
                "outer module alone: the parameters of all its submodules count"
            )


def counted_parameters(modules: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Return the parameters that require a gradient and have any elements, by their ids.

    Raises:
        TypeError: one is complex.
    """
    counted: dict[int, Tensor] = {}
    waiting, seen = list(modules), set()
    while waiting:  # named_parameters takes ten times as long
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        waiting.extend(child for child in module._modules.values() if child is not None)
        for parameter in module._parameters.values():
            if parameter is None or not parameter.requires_grad:
                continue
            if parameter.is_complex():
                names = {id(p): name for given in modules for name, p in given.named_parameters()}
                raise TypeError(
                    f"{names[id(parameter)]!r} is complex, and the Gramian is of real gradients; keep its real and "
                    "imaginary parts in a parameter [..., 2], and use torch.view_as_complex of it in the forward pass"
                )
            if parameter.numel() > 0:
                counted[id(parameter)] = parameter
    return counted
