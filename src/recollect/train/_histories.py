"""What the histories of a run will take, known before they are there."""

from __future__ import annotations

from typing import Any

import torch

from recollect.autoscale import ScalableGNN, history_bytes
from recollect.train._errors import TrainingError, UsageError
from recollect.train._graph import TrainingGraph
from recollect.train._memory import available_bytes
from recollect.train._network import build_scalable
from recollect.train._settings import ScalableSettings, TrainingSettings
from recollect.train._text import bytes_text

__all__ = ["check_room", "expect_histories", "histories_of"]


def expect_histories(
    settings: ScalableSettings, graph: TrainingGraph, training: TrainingSettings, device: torch.device
) -> dict[str, Any]:
    """Return what `histories_of` will, of a network that is yet to be made; nothing is allocated.

    Args:
        settings: of the network.
        graph: prepared.
        training: on parts.
        device: of the network.
    """
    dtype = getattr(torch, training.history_dtype)
    try:
        with torch.device("meta"):
            network = build_scalable(settings, graph, history_dtype=dtype, keep_histories=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the model cannot be built: {error}") from error
    return histories_of(network, training, device)


def histories_of(network: ScalableGNN, training: TrainingSettings, device: torch.device) -> dict[str, Any]:
    """Return the number of a network's histories, their rows, type and place, and the bytes of all together."""
    tables: Any = network.histories
    return {
        "layers": len(tables),
        "rows": network.num_nodes,
        "dtype": training.history_dtype,
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
