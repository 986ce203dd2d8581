"""Partitions that are kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["cached"]

_FORM = 1  # of the files and of what they hold


def cached(
    folder: str | Path | None, adj_t: Tensor, settings: Mapping[str, Any], compute: Callable[[], Tensor]
) -> Tensor:
    """Compute the part of each node, unless a file in ``folder`` holds it for the same graph and settings.

    Args:
        folder: Made if need be; None: nothing is kept.
        adj_t: The graph.
        settings: All else that the result depends on, ``num_parts`` among it.
        compute: Gives the part of each node, [N] int64.
    """
    if folder is None:
        return compute()
    file = Path(folder, f"partition-{_digest(adj_t, settings)}.pt")
    if file.is_file():
        return _load(file, adj_t.size(0), int(settings["num_parts"]))
    clusters = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as stream:
        try:
            torch.save(clusters, stream)
        except BaseException:
            os.unlink(stream.name)
            raise
    os.replace(stream.name, file)  # whole or not at all
    return clusters


def _digest(adj_t: Tensor, settings: Mapping[str, Any]) -> str:
    weighted = bool(settings.get("weighted"))
    pieces = [adj_t.crow_indices().long(), adj_t.col_indices().long(), *([adj_t.values().double()] if weighted else [])]
    state = hashlib.sha256(json.dumps([_FORM, sorted(settings.items())], default=str).encode())
    for piece in pieces:
        state.update(piece.detach().cpu().contiguous().numpy().data)
    return state.hexdigest()[:32]


def _load(file: Path, num_nodes: int, num_parts: int) -> Tensor:
    try:
        clusters = torch.load(file, weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a partition ({error}); delete it to have it made anew") from error
    if not isinstance(clusters, Tensor) or clusters.dtype != torch.int64 or clusters.layout != torch.strided:
        raise ValueError(f"{file} holds no partition, which is a tensor of int64; delete it to have it made anew")
    if clusters.shape != (num_nodes,):
        raise ValueError(f"{file} holds {clusters.numel()} nodes, but the graph has {num_nodes}; delete it")
    if num_nodes and not 0 <= int(clusters.min()) <= int(clusters.max()) < num_parts:
        raise ValueError(f"{file} names parts beyond the {num_parts} of the graph; delete it to have it made anew")
    return clusters
