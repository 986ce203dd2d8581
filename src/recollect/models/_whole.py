"""What networks are called with that know no mini-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_whole"]

_WHOLE = "this network is for whole graphs and knows no mini-batches: call model(data.x, data.edge_index)"


def check_whole(x: Any = None, edge_index: Any = None, *_: Any, **__: Any) -> None:
    """Refuse what cannot be a whole graph; of other arguments nothing is known here.

    Raises:
        TypeError: ``x`` is no tensor.
        ValueError: a sparse adjacency has another size than [num_nodes, num_nodes].
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor (got {type(x).__name__}); {_WHOLE}")
    if not isinstance(edge_index, Tensor) or edge_index.layout == torch.strided:
        return
    if not x.size(0) == edge_index.size(0) == edge_index.size(1):
        raise ValueError(f"the adjacency is {list(edge_index.shape)} and x has {x.size(0)} rows; {_WHOLE}")
