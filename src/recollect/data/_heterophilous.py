"""The heterophilous graphs of Platonov et al. 2023 (arXiv 2302.11640), through torch_geometric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._foreign import require
from recollect.data._raw import RawSource, read
from recollect.data._splits import check_split

# The paper reports ROC AUC for the graphs with two classes.
_BINARY = ("minesweeper", "questions", "tolokers")


def heterophilous(name: str, root: Path, seed: int, *, split: int = 0, download: bool = False) -> GraphDataset:
    """Graphs whose neighbours often differ in class, with both directions of each edge.

    Args:
        name: ``"amazon-ratings"``, ``"minesweeper"``, ``"questions"``, ``"roman-empire"`` or ``"tolokers"``.
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
    dataset_class = require("torch_geometric.datasets", extra="graph").HeterophilousGraphDataset
    folder = name.replace("-", "_")
    source = RawSource(
        name=name,
        folder=f"HeterophilousGraphDataset/{folder}",
        files=(f"raw/{folder}.npz",),
        processed=("data.pt",),
        origin="yandex-research/heterophilous-graphs on GitHub (folder data)",
        url=f"{dataset_class.url}/{folder}.npz",
    )

    def open_view(view: Path) -> tuple[Any, int]:
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
