"""What histories take, and whether there is room for it."""

from __future__ import annotations

from typing import Any

import torch

from recollect.autoscale import ScalableGNN, history_bytes
from recollect.train._errors import TrainingError
from recollect.train._memory import available_bytes
from recollect.train._settings import TrainingSettings
from recollect.train._text import bytes_text

__all__ = ["check_room", "histories_of"]


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
