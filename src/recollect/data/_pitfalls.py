"""The graphs of "Pitfalls of Graph Neural Network Evaluation" (Shchur et al. 2018, arXiv 1811.05868)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._foreign import require
from recollect.data._raw import RawSource, read
from recollect.data._splits import balanced_masks, check_split
from recollect.data._stored import distrustful

_NUM_SPLITS = 20
_TRAIN_PER_CLASS, _VAL_PER_CLASS = 20, 30


@dataclass(frozen=True)
class _Facts:
    """The class of torch_geometric and its name for the graph, which is also its folder's, and the raw file."""

    dataset_class: str
    folder: str
    file: str


_FACTS = {
    "amazon-computers": _Facts("Amazon", "Computers", "amazon_electronics_computers.npz"),
    "amazon-photo": _Facts("Amazon", "Photo", "amazon_electronics_photo.npz"),
    "coauthor-cs": _Facts("Coauthor", "CS", "ms_academic_cs.npz"),
    "coauthor-physics": _Facts("Coauthor", "Physics", "ms_academic_phy.npz"),
}


def pitfalls(name: str, root: Path, seed: int, *, split: int = 0, download: bool = False) -> GraphDataset:
    """Goods that are bought together, and authors who wrote together, with both directions of each edge.

    These graphs have no published split, but a published way to draw one: 20 nodes of each class for training, 30 for
    validation, all others for testing, and results are means over many draws. Here 20 of them have numbers, each always
    the same.

    Args:
        name: ``"amazon-computers"``, ``"amazon-photo"``, ``"coauthor-cs"`` or ``"coauthor-physics"``.
        root: Folder that has, or will have, the file.
        seed: Not used.
        split: Which of the draws, from 0 to 19.
        download: Whether to fetch the missing file.

    Raises:
        ValueError: There is no such split.
        MissingRawFilesError: The file is not there.
        InvalidRawFilesError: The file cannot be read.
        MissingDependencyError: torch_geometric or scipy is not installed.
    """
    check_split(name, split, _NUM_SPLITS)
    facts = _FACTS[name]
    dataset_class = distrustful(getattr(require("torch_geometric.datasets", extra="graph"), facts.dataset_class))
    source = RawSource(
        name=name,
        folder=f"{facts.dataset_class}/{facts.folder}",
        files=(f"raw/{facts.file}",),
        processed=("data.pt",),
        origin="shchur/gnn-benchmark on GitHub (folder data/npz)",
        url=dataset_class.url + facts.file,
    )

    def open_view(view: Path) -> tuple[Any, int]:
        dataset = dataset_class(str(view / facts.dataset_class), facts.folder)
        return dataset[0], dataset.num_classes

    data, num_classes = read(source, root, open_view, download=download)
    return assemble(
        name,
        x=data.x,
        edge_index=data.edge_index,
        y=data.y,
        masks=balanced_masks(data.y, train=_TRAIN_PER_CLASS, val=_VAL_PER_CLASS, seed=split),
        num_classes=num_classes,
        num_splits=_NUM_SPLITS,
    )
