"""What networks, histories and processes take at least, and whether there is room for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from recollect.autoscale import ScalableGNN, history_bytes
from recollect.train._errors import TrainingError
from recollect.train._memory import available_bytes
from recollect.train._settings import OptimizerSettings, Settings, TrainingSettings
from recollect.train._text import bytes_text

__all__ = ["at_depth", "check_network", "check_processes", "check_room", "histories_of", "shallow_depths"]

_SHALLOW = (2, 4)  # networks of these depths are made to know those of any
_MODULE, _TENSOR = 1024, 512  # bytes of the interpreter's own for each module and parameter; they are more
_PROCESS = 200 * 2**20  # bytes of its own that a process with torch has; they are more


def histories_of(network: ScalableGNN, training: TrainingSettings, device: torch.device) -> dict[str, Any]:
    """Return the number of a network's histories, their rows, type and place, and the bytes of all together."""
    tables: Any = network.histories
    return {
        "layers": len(tables),
        "rows": network.num_nodes,
        "dtype": str(tables[0].dtype).removeprefix("torch.") if len(tables) else training.history_dtype,
        "bytes": sum(history_bytes(table.num_embeddings, table.embedding_dim, table.dtype) for table in tables),
        "place": training.history_path or training.history_device or device.type,
    }


def check_room(histories: dict[str, Any], device: torch.device) -> None:
    """Refuse histories for which there is no memory.

    Raises:
        TrainingError: there is none; the message says what takes less.
    """
    if histories["place"] not in ("cpu", "cuda"):
        return  # in files
    free = available_bytes(device if histories["place"] == device.type else torch.device(histories["place"]))
    if free is not None and histories["bytes"] > free:
        raise TrainingError(
            f"the histories need {bytes_text(histories['bytes'])} on {histories['place']}, and {bytes_text(free)} are "
            f"free: try training.history_dtype=int8 (or float16), training.history_path=FOLDER (a file on disk), "
            f"training.history_device=cpu, or fewer channels or layers"
        )


def shallow_depths(layers: int) -> tuple[int, ...]:
    """Depths of the networks that tell what one of so many layers takes."""
    return _SHALLOW if layers > max(_SHALLOW) else (layers,)


def at_depth(known: Mapping[int, int], layers: int) -> int:
    """A number of a network of so many layers, on the straight line through those of `shallow_depths`."""
    first, last = min(known), max(known)
    each = (known[last] - known[first]) // max(last - first, 1)
    return known[last] + (layers - last) * each


class _Size(NamedTuple):
    """What a network takes at least: bytes of tensors while it is trained, and of objects on the host."""

    tensors: int
    objects: int


def check_network(
    settings: Settings, outline: Callable[[int], nn.Module], num_nodes: int, device: torch.device, any_depth: bool
) -> None:
    """Refuse a network that there is no memory for, before it is made.

    Its parameters, their gradients and the optimizer's numbers are counted, and activations that a plain step keeps.
    All grow with the layers as a straight line, which two shallow networks give.

    Args:
        settings: of the run.
        outline: from a number of layers to the network; called on torch's device ``meta``.
        num_nodes: of the graph.
        device: that the network will be on.
        any_depth: whether networks of ``measure.depths`` are made too.

    Raises:
        TrainingError: there is none; the message says how many layers there is room for.
    """
    layers = {"model.num_layers": settings.model.num_layers or 1}
    if any_depth and settings.measure.enabled and settings.measure.depths:
        layers["measure.depths"] = max(settings.measure.depths)
    with torch.device("meta"):
        sizes = {depth: _size(outline(depth), settings.optimizer) for depth in shallow_depths(max(layers.values()))}
    kept, host = _kept(settings, num_nodes), torch.device("cpu")

    def needed(key: str, depth: int, place: torch.device) -> int:
        tensors, objects = (at_depth({d: size[k] for d, size in sizes.items()}, depth) for k in (0, 1))
        tensors += depth * kept if key == "model.num_layers" else 0
        return tensors * (place == device) + objects * (place == host)

    for key, depth in layers.items():
        for place in dict.fromkeys([device, host]):
            least, free = needed(key, depth, place), available_bytes(place)
            if free is not None and least > free:
                slope = max((least - needed(key, 1, place)) // max(depth - 1, 1), 1)
                room = depth - -(-(least - free) // slope)
                most = f", {room:,} at most," if room > 0 else ""
                raise TrainingError(
                    f"{key}={depth}: a network of {depth:,} layers with model.hidden_channels="
                    f"{settings.model.hidden_channels} takes at least {bytes_text(least)} on {place.type} to be "
                    f"trained, and {bytes_text(free)} are free: choose fewer layers{most} or fewer channels, or "
                    "options of the model that take less"
                )


def check_processes(number: int) -> None:
    """Refuse more processes than there is memory for.

    Raises:
        TrainingError: there is none.
    """
    free = available_bytes(torch.device("cpu"))
    if free is not None and number * _PROCESS > free:
        raise TrainingError(
            f"devices={number}: so many processes take at least {bytes_text(number * _PROCESS)}, and "
            f"{bytes_text(free)} are free: choose {max(free // _PROCESS, 1)} or fewer"
        )


def _size(network: nn.Module, optimizer: OptimizerSettings) -> _Size:
    moments = 2 if optimizer.name != "sgd" else int(bool(optimizer.options.get("momentum")))
    parameters = list(network.parameters())
    tensors = (2 + moments) * sum(parameter.nbytes for parameter in parameters)
    return _Size(tensors, _TENSOR * len(parameters) + _MODULE * sum(1 for _ in network.modules()))


def _kept(settings: Settings, num_nodes: int) -> int:
    """Bytes of activations that a step keeps of each layer, at least; 0 where it need not."""
    model = settings.model
    plain = model.family == "histories" and model.kind != "appnp"  # whose layers are linear, and keep nothing
    plain |= model.family == "reversible" and getattr(model, "disable", False)
    if not plain or settings.training.name != "full" or settings.memory_budget is not None:
        return 0
    item = 4 if settings.precision == "32-true" else 2
    return item * num_nodes * (model.hidden_channels or 0)
