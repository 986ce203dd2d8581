"""A graph that is given as an object, as the graph of a run."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from recollect.data import GraphDataset
from recollect.train._errors import UsageError

__all__ = ["as_dataset"]

_PARTS = ("train", "val", "test")
_SHARES = (0.6, 0.2)  # for training and validation; the rest is for testing


def as_dataset(data: Any, seed: int, console: Console) -> GraphDataset:
    """Check a graph, and draw its split if it has none.

    Args:
        data: a ``Data`` of torch_geometric, or a graph of `recollect.data`, which is returned as it is.
        seed: of the split.
        console: where the split is told.

    Raises:
        UsageError: something is missing or does not fit; the message says what and how it must be.
    """
    if isinstance(data, GraphDataset):
        return data
    x, y, edge_index = (_tensor(data, key) for key in ("x", "y", "edge_index"))
    n = int(x.size(0))
    if x.dim() != 2 or edge_index.dim() != 2 or edge_index.size(0) != 2 or y.size(0) != n or y.dim() > 2:
        found = f"x is {list(x.shape)}, edge_index {list(edge_index.shape)} and y {list(y.shape)}"
        raise UsageError(f"{found}, but must be [N, F], [2, E], and [N] or [N, K]")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < n:
        raise UsageError(f"edge_index names nodes from {int(edge_index.min())} to {int(edge_index.max())} of {n}")
    multilabel = y.dim() == 2
    if multilabel:
        y = y.float()
        if y.size(1) == 1:
            raise UsageError(
                f"y is {list(y.shape)}, a class for each node or one label that is there or not: give y.view(-1) for "
                "classes; one label alone is two classes"
            )
        if not bool((y.isnan() | (y == 0) | (y == 1)).all()):
            raise UsageError(f"y is {list(y.shape)}, a column for each label, which must be 0 or 1, or NaN if unknown")
    if not multilabel and y.is_floating_point():
        raise UsageError(f"y is {y.dtype}: classes are whole numbers from 0 on; labels are [N, K] of zeros and ones")
    masks = {part: data.get(f"{part}_mask") for part in _PARTS}
    given = [part for part, mask in masks.items() if mask is not None]
    labelled = y.isfinite().all(1) if multilabel else y >= 0
    if not given:
        masks = dict(zip(_PARTS, _split(labelled, seed), strict=True))
        counts = ", ".join(f"{int(mask.sum())} for {part}" for part, mask in masks.items())
        console.print(f"the graph has no split; one was drawn with seed {seed}: {counts}", highlight=False)
    elif len(given) < len(_PARTS):
        missing = ", ".join(f"{part}_mask" for part in _PARTS if part not in given)
        raise UsageError(
            f"the graph has {', '.join(f'{part}_mask' for part in given)} and no {missing}: give all or none"
        )
    copy = data.clone()
    copy.x, copy.y = x.float(), y if multilabel else y.long()
    for part, mask in masks.items():
        if mask is None or mask.shape != (n,) or mask.dtype != torch.bool:
            raise UsageError(f"{part}_mask must be [{n}] bool (got {'None' if mask is None else list(mask.shape)})")
        if not bool(mask.any()):
            raise UsageError(f"the split has no {part} nodes")
        copy[f"{part}_mask"] = mask & labelled.to(mask.device)
    classes = int(y.size(1)) if multilabel else int(y.max()) + 1
    task, metric = ("multilabel", "micro_f1") if multilabel else ("multiclass", "accuracy")
    return GraphDataset("data", copy.cpu(), task, classes, metric)  # type: ignore[arg-type]  # of these two pairs


def _tensor(data: Any, name: str) -> Tensor:
    value = getattr(data, name, None)
    if not isinstance(value, Tensor):
        found = "no" if value is None else f"a {type(value).__name__} as"
        raise UsageError(
            f"the graph has {found} {name}: a torch_geometric Data with x [N, F], edge_index [2, E] and y [N] or "
            f"[N, K] is wanted"
        )
    return value


def _split(labelled: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of 60, 20 and 20 percent of the nodes with a label, drawn anew for each seed."""
    nodes = labelled.nonzero().reshape(-1).cpu()
    nodes = nodes[torch.randperm(nodes.numel(), generator=torch.Generator().manual_seed(seed))]
    train, val = (round(share * nodes.numel()) for share in _SHARES)
    masks = []
    for chosen in (nodes[:train], nodes[train : train + val], nodes[train + val :]):
        mask = torch.zeros(labelled.numel(), dtype=torch.bool)
        mask[chosen] = True
        masks.append(mask)
    return masks[0], masks[1], masks[2]
