"""The citation graphs of Yang et al. 2016 (arXiv 1603.08861).

torch_geometric fetches the files and keeps what was computed; the files are pickles, and are read here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._foreign import require
from recollect.data._raw import RawSource, read
from recollect.data._stored import distrustful

_FOLDERS = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}
_NUM_VAL = 500
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
    dataset_class = _dataset_class()
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


def _dataset_class() -> Any:
    """torch_geometric's class, with a reader of the raw files that runs nothing of what is in them."""

    class Planetoid(distrustful(require("torch_geometric.datasets", extra="graph").Planetoid)):  # type: ignore[misc]
        def process(self) -> None:
            self.save([_read(Path(self.raw_dir), self.name.lower())], self.processed_paths[0])

    return Planetoid


def _read(raw: Path, name: str) -> Any:
    """The graph of eight files: first the known nodes, then those for testing, in the order of their indices."""
    import numpy as np

    from recollect.data._pickles import read_pickle

    tx, allx, y, ty, ally, graph = (
        read_pickle(raw / f"ind.{name}.{part}") for part in ("tx", "allx", "y", "ty", "ally", "graph")
    )
    test = np.loadtxt(raw / f"ind.{name}.test.index", dtype=np.int64, ndmin=1)
    known = len(allx)
    size = known + len(test)
    if name == "citeseer":  # some nodes are in no file but the graph's: they have neither features nor a class
        size = int(test.max()) + 1
    if len(tx) != len(test) or test.min() < known or test.max() >= size or len(set(test.tolist())) != len(test):
        raise ValueError(f"the test nodes are not those that follow the {known} others")
    x, labels = (np.zeros((size, part.shape[1]), dtype=np.float32) for part in (allx, ally))
    x[:known], labels[:known] = allx, ally
    x[test], labels[test] = tx, ty
    edges = torch.tensor([(a, b) for a, neighbours in graph.items() for b in neighbours if a != b]).reshape(-1, 2)
    keys = torch.unique(edges[:, 1] * size + edges[:, 0])  # by target, then source, each once
    masks = torch.zeros(3, size, dtype=torch.bool)
    masks[0, : len(y)] = True
    masks[1, len(y) : len(y) + _NUM_VAL] = True
    masks[2, torch.from_numpy(test)] = True
    return require("torch_geometric.data", extra="graph").Data(
        x=torch.from_numpy(x),
        edge_index=torch.stack([keys % size, keys // size]),
        y=torch.from_numpy(labels.argmax(1)),
        **dict(zip(("train_mask", "val_mask", "test_mask"), masks, strict=True)),
    )
