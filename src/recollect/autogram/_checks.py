"""What an engine is asked: of which modules, about which losses, and how they are weighted."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autogram._choice import BatchDim

__all__ = [
    "check_modules",
    "check_overflow",
    "check_settings",
    "check_weighting",
    "check_weights",
    "checked_dim",
    "checked_features",
    "counted_parameters",
    "head_parameters",
    "is_sharded",
    "joined",
    "on_one_device",
]


def joined(losses: Tensor | Sequence[Tensor]) -> Tensor:
    """Return a list of losses as one vector ``[m]``, each flattened; what is no list stays what it is.

    Raises:
        TypeError: an element is no tensor of floating point, or they have several dtypes.
        ValueError: the list is empty, an element has no graph, or they are on several devices.
    """
    if not isinstance(losses, (list, tuple)):
        return losses  # type: ignore[return-value]  # checked_dim tells
    if not losses:
        raise ValueError("there are no losses in the list; give at least one")
    for k, loss in enumerate(losses):
        _check_floating(f"losses[{k}]", loss)
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{k}] has no graph: nothing that it was computed from requires a gradient, or it was computed "
                "under no_grad or detached; leave it out of the list"
            )
        if loss.dtype != losses[0].dtype:
            raise TypeError(
                f"losses[0] is of {losses[0].dtype} and losses[{k}] of {loss.dtype}; give all of one dtype, as "
                f"losses[{k}].to(losses[0].dtype)"
            )
        if loss.device != losses[0].device:
            raise ValueError(
                f"losses[0] is on {losses[0].device} and losses[{k}] on {loss.device}; give all on one device, as "
                f"losses[{k}].to(losses[0].device)"
            )
    with torch.enable_grad():
        return torch.cat([loss.reshape(-1) for loss in losses])


def on_one_device(rows: Tensor, columns: Tensor) -> None:
    """Raise if the losses of the rows and those of the columns are not on one device."""
    if rows.device != columns.device:
        raise ValueError(
            f"the losses of the rows are on {rows.device} and those of the columns on {columns.device}; give both on "
            "one device"
        )


def _check_floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of a floating-point type, and is {found}")


def check_overflow(on_overflow: object) -> None:
    """Raise if this does not say what becomes of a Gramian that is not finite."""
    if on_overflow not in ("raise", "pass"):
        raise ValueError(
            f"on_overflow is {on_overflow!r}; allowed are 'raise', with which the weighting refuses a Gramian that is "
            "not finite, and 'pass', with which the gradients are then not finite, for a GradScaler to see"
        )


def check_settings(batch_dim: object, certify_every: object, row_bytes: object) -> None:
    """Raise if an engine's settings are none."""
    if batch_dim not in ("auto", None) and (not isinstance(batch_dim, int) or isinstance(batch_dim, bool)):
        raise ValueError(f"batch_dim is {batch_dim!r}; allowed are 'auto', a dimension of the losses, and None")
    if not isinstance(row_bytes, int) or row_bytes <= 0:
        raise ValueError(f"row_bytes is {row_bytes!r}; allowed is a number of bytes above zero")
    if not isinstance(certify_every, int) or certify_every < 0:
        raise ValueError(f"certify_every is {certify_every!r}; allowed are 0, for never, and any number of calls")


def checked_dim(output: Tensor, batch_dim: BatchDim) -> BatchDim:
    """Return the batch dimension of losses, counted from the first one, or raise if they have no Gramian."""
    _check_floating("output", output)
    if not output.requires_grad:
        raise ValueError(
            "output has no graph: nothing that it was computed from requires a gradient, or it was computed under "
            "no_grad or detached"
        )
    if batch_dim is None or batch_dim == "auto":
        return batch_dim
    if not -output.dim() <= batch_dim < output.dim():
        raise ValueError(
            f"batch_dim is {batch_dim}, and output has the shape {list(output.shape)}; compute the Gramian of losses "
            "that have the batch dimension (reduction='none'), or leave batch_dim out"
        )
    return batch_dim % output.dim()


def check_weighting(weighting: object) -> None:
    """Raise if this is nothing to call with a Gramian."""
    if isinstance(weighting, type) or not callable(weighting):
        found = f"the class {weighting.__name__}" if isinstance(weighting, type) else repr(weighting)
        raise TypeError(f"weighting must be an object that can be called, such as UPGradWeighting() (got {found})")


def check_weights(weights: object, losses: Tensor) -> None:
    """Raise if what a weighting returned is not one weight for each loss."""
    if not isinstance(weights, Tensor):
        raise TypeError(
            f"the weighting returned {type(weights).__name__}; it must return a tensor of one weight for each loss, of "
            f"shape {list(losses.shape)}"
        )
    if weights.is_complex():
        raise TypeError(
            f"the weighting returned weights of {weights.dtype}, and losses are weighed by real numbers; return "
            "weights.real if imaginary parts mean nothing"
        )
    if weights.shape != losses.shape:
        raise ValueError(
            f"the weighting returned weights of shape {list(weights.shape)} for losses of shape {list(losses.shape)}; "
            "it must return one weight for each loss"
        )


def checked_features(features: Tensor | Sequence[Tensor] | None, modules: Sequence[object]) -> tuple[Tensor, ...]:
    """Return features as a tuple, empty for None.

    Raises:
        TypeError: one is no tensor of floating point.
        ValueError: one has no gradient, there are none, or there are modules too.
    """
    if features is None:
        return ()
    given = (features,) if isinstance(features, Tensor) else tuple(features)
    if not given:
        raise ValueError("features is empty; give the tensors that gradients are taken with respect to, or None")
    if modules:
        raise ValueError("gradients are with respect to features or to parameters; give Engine(features=z) or modules")
    for k, feature in enumerate(given):
        _check_floating(f"features[{k}]", feature)
        if not feature.requires_grad:
            raise ValueError(
                f"features[{k}] requires no gradient; compute it from parameters, or call requires_grad_()"
            )
    return given


def head_parameters(
    heads: Sequence[nn.Module | Sequence[nn.Module]], losses: Tensor, shared: Mapping[int, Tensor]
) -> list[list[Tensor]]:
    """Return the parameters of each task's head that require a gradient.

    Args:
        heads: for each loss, a module or several.
        losses: [m].
        shared: what no head may have, by id.

    Raises:
        TypeError: a head is no module.
        ValueError: losses are no vector, heads are not as many, or a head has shared parameters.
    """
    if losses.dim() != 1 or len(heads) != len(losses):
        raise ValueError(
            f"there are {len(heads)} heads for losses of shape {list(losses.shape)}; give one loss for each task, [m], "
            "and one head for each loss"
        )
    found = []
    for k, head in enumerate(heads):
        modules: Sequence[Any] = head if isinstance(head, (list, tuple)) else [head]
        wrong = next((module for module in modules if not isinstance(module, nn.Module)), None)
        if wrong is not None:
            raise TypeError(f"heads[{k}] must be a module, or a list of modules, and has {type(wrong).__name__}")
        named = [pair for module in modules for pair in module.named_parameters() if pair[1].requires_grad]
        both = [name for name, parameter in named if id(parameter) in shared]
        if both:
            raise ValueError(
                f"heads[{k}] has parameters of the engine's modules ({', '.join(both[:3])}); give the engine what tasks"
                " share, and each head what its task has for itself"
            )
        found.append([parameter for _, parameter in named])
    return found


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


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which ranks have pieces."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    kinds = sys.modules.get("torch.distributed.tensor")
    return kinds is not None and isinstance(tensor, kinds.DTensor)


def name_of(modules: Sequence[nn.Module], parameter: Tensor) -> str:
    """Return what a parameter of these modules is called."""
    return next(name for module in modules for name, p in module.named_parameters() if p is parameter)


def counted_parameters(modules: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Return the parameters that require a gradient and have any elements, by their ids.

    Raises:
        TypeError: one is complex, or sharded.
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
                raise TypeError(
                    f"{name_of(modules, parameter)!r} is complex, and the Gramian is of real gradients; keep its real "
                    "and imaginary parts in a parameter [..., 2], and use torch.view_as_complex of it in the forward "
                    "pass"
                )
            if is_sharded(parameter):
                raise TypeError(
                    f"{name_of(modules, parameter)!r} is a DTensor: the graph has what was gathered of it, or pieces, "
                    "and not this. With fully_shard, make the engine with the group of its mesh, as Engine(model, "
                    "process_group=mesh.get_group()); layers of tensor parallelism are not covered: keep them "
                    "out of the engine's modules"
                )
            if parameter.numel() > 0:
                counted[id(parameter)] = parameter
    return counted
