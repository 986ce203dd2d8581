"""The citation graphs of Yang et al. 2016 (arXiv 1603.08861), through torch_geometric."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._foreign import require
from recollect.data._raw import RawSource, read

_FOLDERS = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}
_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")

PlanetoidSplit = Literal["public", "full"]


def planetoid(
    name: str, root: Path, seed: int, *, split: PlanetoidSplit = "public", download: bool = False
) -> GraphDataset:
    """Papers and their citations, in both directions; features are words, classes are fields.

    Args:
        name: ``"cora"``, ``"citeseer"`` or ``"pubmed"``.
        root: Folder that has, or will have, the files.
        seed: Not used.
        split: ``"public"``: 20 nodes of each class for training, 500 for validation, 1,000 for testing;
            ``"full"``: the same validation and test nodes, and all others for training.
        download: Whether to fetch missing files.

    Raises:
        ValueError: There is no such split.
        MissingRawFilesError: The files are not there.
        InvalidRawFilesError: The files cannot be read.
        MissingDependencyError: torch_geometric or scipy is not installed.
    """
    if split not in get_args(PlanetoidSplit):
        raise ValueError(f"{name}: split is {split!r}, but must be one of {', '.join(get_args(PlanetoidSplit))}")
    dataset_class = require("torch_geometric.datasets", extra="graph").Planetoid
    folder = _FOLDERS[name]
    source = RawSource(
        name=name,
        folder=f"Planetoid/{folder}",
        files=tuple(f"raw/ind.{name}.{part}" for part in _PARTS),
        processed=("data.pt",),
        origin="kimiyoung/planetoid on GitHub (folder data)",
        url=f"{dataset_class.url}/ind.{name}.graph",
    )

    def open_view(view: Path) -> tuple[Any, int]:
        dataset = dataset_class(str(view / "Planetoid"), folder)
        return dataset[0], dataset.num_classes

    data, num_classes = read(source, root, open_view, download=download)
    train = ~(data.val_mask | data.test_mask) if split == "full" else data.train_mask
    return assemble(
        name,
        x=data.x,
        edge_index=data.edge_index,
        y=data.y,
        masks=(train, data.val_mask, data.test_mask),
        num_classes=num_classes,
    )
