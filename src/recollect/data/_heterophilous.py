"""The heterophilous graphs of Platonov et al. 2023 (arXiv 2302.11640)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._foreign import require
from recollect.data._raw import RawSource, read
from recollect.data._splits import check_split
from recollect.data._stored import distrustful

# The paper reports ROC AUC for the graphs with two classes.
_BINARY = ("minesweeper", "questions", "tolokers")
# Older graphs, with the paper's splits; of the first two without the nodes that are there twice.
_OLDER = {"chameleon": "chameleon_filtered", "squirrel": "squirrel_filtered", "actor": "actor"}
_ARRAYS = ("node_features", "node_labels", "edges", "train_masks", "val_masks", "test_masks")


def heterophilous(name: str, root: Path, seed: int, *, split: int = 0, download: bool = False) -> GraphDataset:
    """Graphs whose neighbours often differ in class, with both directions of each edge.

    Args:
        name: ``"amazon-ratings"``, ``"minesweeper"``, ``"questions"``, ``"roman-empire"`` or ``"tolokers"``, through
            torch_geometric; or ``"actor"``, ``"chameleon"`` or ``"squirrel"``, the last two in the paper's filtered
            form, without nodes that are there twice.
        root: Folder that has, or will have, the file.
        seed: Not used.
        split: Which of the published splits, from 0 to 9.
        download: Whether to fetch the missing file.

    Raises:
        ValueError: There is no such split.
        MissingRawFilesError: The file is not there.
        InvalidRawFilesError: The file cannot be read.
        MissingDependencyError: torch_geometric is not installed.
    """
    dataset_class = distrustful(require("torch_geometric.datasets", extra="graph").HeterophilousGraphDataset)
    folder = _OLDER.get(name, name.replace("-", "_"))
    url = f"{dataset_class.url}/{folder}.npz"
    source = RawSource(
        name=name,
        folder=f"HeterophilousGraphDataset/{folder}",
        files=(f"raw/{folder}.npz",),
        processed=() if name in _OLDER else ("data.pt",),
        origin="yandex-research/heterophilous-graphs on GitHub (folder data)",
        url=url,
        fetch=partial(_fetch, url=url, folder=folder) if name in _OLDER else None,
    )

    def open_view(view: Path) -> tuple[Any, int]:
        if name in _OLDER:
            return _read(view / source.folder / source.files[0])
        dataset = dataset_class(str(view / "HeterophilousGraphDataset"), name)
        return dataset[0], dataset.num_classes

    data, num_classes = read(source, root, open_view, download=download)
    num_splits = data.train_mask.size(1)
    check_split(name, split, num_splits)
    return assemble(
        name,
        x=data.x,
        edge_index=data.edge_index,
        y=data.y,
        masks=(data.train_mask[:, split], data.val_mask[:, split], data.test_mask[:, split]),
        num_classes=num_classes,
        metric="rocauc" if name in _BINARY else "accuracy",
        num_splits=num_splits,
    )


def _read(file: Path) -> tuple[Any, int]:
    """A graph that torch_geometric's class does not know, from a file of the same form."""
    import numpy as np

    with np.load(file, allow_pickle=False) as arrays:
        x, y, edges, *masks = (torch.from_numpy(arrays[name]) for name in _ARRAYS)
    both = require("torch_geometric.utils", extra="graph").to_undirected(edges.t().contiguous(), num_nodes=x.size(0))
    train, val, test = (mask.t().bool() for mask in masks)
    data = require("torch_geometric.data", extra="graph").Data(
        x=x, y=y, edge_index=both, train_mask=train, val_mask=val, test_mask=test
    )
    return data, int(y.max()) + 1


def _fetch(view: Path, *, url: str, folder: str) -> None:
    raw = view / "HeterophilousGraphDataset" / folder / "raw"
    require("torch_geometric.data", extra="graph").download_url(url, str(raw), log=False)
