"""Files of `torch.save`, read without running what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recollect.data._errors import InvalidFileError
from recollect.data._foreign import foreign_code, require


def load_stored(path: Path, remedy: str) -> Any:
    """Load tensors, containers and graphs of torch_geometric onto the CPU, and nothing else.

    Args:
        path: The file.
        remedy: How it should have been written, for messages.

    Raises:
        InvalidFileError: It is damaged, or holds something else; nothing of it was run.
    """
    try:
        with foreign_code(), torch.serialization.safe_globals(stored_classes()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load of a damaged file raises half a dozen unrelated types
        reason = str(error).strip().partition("\n")[0]
        unsafe = next((line for line in str(error).splitlines() if "Unsupported global" in line), "")
        if unsafe:
            reason = unsafe.strip().removeprefix("WeightsUnpickler error: ")[:160]
        raise InvalidFileError(
            f"{path} cannot be read as tensors and nothing else ({type(error).__name__}: {reason[:200]}); write it by "
            f"{remedy}"
        ) from error


def stored_classes() -> list[Any]:
    """What graphs of torch_geometric are made of, beside tensors and containers.

    Not those that torch_geometric has allowed for good: `safe_globals` forbids all of its own at its end.
    """
    data = require("torch_geometric.data.data", extra="graph")
    storage = require("torch_geometric.data.storage", extra="graph")
    classes = [data.Data, data.DataEdgeAttr, data.DataTensorAttr, storage.GlobalStorage]
    allowed = torch.serialization.get_safe_globals()
    return [stored for stored in classes if stored not in allowed]


def distrustful(dataset_class: Any) -> Any:
    """A dataset class of torch_geometric whose processed files are read by `torch.load(weights_only=True)` alone.

    Its own reader reads again without that limit a file that holds more than tensors and containers.
    """

    class Distrustful(dataset_class):  # type: ignore[misc]  # a class that is known when a graph is loaded
        def load(self, path: str, data_cls: Any = None) -> None:
            stored = load_stored(Path(path), "torch_geometric")
            data, self.slices = stored[0], stored[1]
            if isinstance(data, dict):
                kind = (
                    stored[2] if len(stored) == 3 else data_cls or require("torch_geometric.data", extra="graph").Data
                )
                data = kind.from_dict(data)
            self.data = data

    Distrustful.__name__ = Distrustful.__qualname__ = dataset_class.__name__
    return Distrustful
