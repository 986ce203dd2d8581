"""Graphs that the literature trains inductively: Reddit, Flickr, Yelp and PPI, through torch_geometric.

Each comes as one graph with masks. Who trains inductively takes the subgraph of the training nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._foreign import require
from recollect.data._raw import RawSource, read
from recollect.data._stored import distrustful

_SAINT_FILES = ("raw/adj_full.npz", "raw/feats.npy", "raw/class_map.json", "raw/role.json")
_PPI_FILES = ("feats.npy", "graph_id.npy", "graph.json", "labels.npy")


def reddit(root: Path, seed: int, *, download: bool = False) -> GraphDataset:
    """Posts of one month, joined if the same user commented on both (Hamilton et al. 2017, arXiv 1706.02216).

    Args:
        root: Folder that has, or will have, the files.
        seed: Not used.
        download: Whether to fetch missing files.

    Raises:
        MissingRawFilesError: The files are not there.
        InvalidRawFilesError: The files cannot be read.
        MissingDependencyError: torch_geometric or scipy is not installed.
    """
    dataset_class = distrustful(require("torch_geometric.datasets", extra="graph").Reddit)
    source = RawSource(
        name="reddit",
        folder="Reddit",
        files=("raw/reddit_data.npz", "raw/reddit_graph.npz"),
        processed=("data.pt",),
        origin=f"the Deep Graph Library's data server ({dataset_class.url}, unpacked)",
        url=dataset_class.url,
    )
    return _whole(source, dataset_class, root, download=download)


def saint(name: str, root: Path, seed: int, *, download: bool = False) -> GraphDataset:
    """Flickr (one class per image) and Yelp (100 labels per user) of GraphSAINT (arXiv 1907.04931).

    Args:
        name: ``"flickr"`` or ``"yelp"``.
        root: Folder that has, or will have, the files.
        seed: Not used.
        download: Whether to fetch missing files.

    Raises:
        MissingRawFilesError: The files are not there.
        InvalidRawFilesError: The files cannot be read.
        MissingDependencyError: torch_geometric or scipy is not installed.
    """
    folder = name.capitalize()
    dataset_class = distrustful(getattr(require("torch_geometric.datasets", extra="graph"), folder))
    source = RawSource(
        name=name,
        folder=folder,
        files=_SAINT_FILES,
        processed=("data.pt",),
        origin="GraphSAINT/GraphSAINT on GitHub (its data folder on Google Drive)",
        url=f"https://drive.usercontent.google.com/download?id={dataset_class.role_id}&confirm=t",
    )
    return _whole(source, dataset_class, root, download=download)


def ppi(root: Path, seed: int, *, download: bool = False) -> GraphDataset:
    """Proteins of 24 tissues with 121 labels (Zitnik and Leskovec 2017, arXiv 1707.04638).

    The tissues' graphs become one graph of as many parts: no edge leads from one to another, and every
    tissue is whole in training, in validation or in testing.

    Args:
        root: Folder that has, or will have, the files.
        seed: Not used.
        download: Whether to fetch missing files.

    Raises:
        MissingRawFilesError: The files are not there.
        InvalidRawFilesError: The files cannot be read.
        MissingDependencyError: torch_geometric or networkx is not installed.
    """
    dataset_class = distrustful(require("torch_geometric.datasets", extra="graph").PPI)
    source = RawSource(
        name="ppi",
        folder="PPI",
        files=tuple(f"raw/{part}_{file}" for part in ("train", "valid", "test") for file in _PPI_FILES),
        processed=("train.pt", "val.pt", "test.pt"),
        origin=f"the Deep Graph Library's data server ({dataset_class.url}, unpacked)",
        url=dataset_class.url,
    )

    def open_view(view: Path) -> list[tuple[int, Any]]:
        parts = [dataset_class(str(view / "PPI"), split) for split in ("train", "val", "test")]
        return [(part, graph) for part, dataset in enumerate(parts) for graph in dataset]

    graphs = read(source, root, open_view, download=download)
    sizes = [graph.num_nodes for _, graph in graphs]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    edges = [graph.edge_index + start for (_, graph), start in zip(graphs, starts, strict=True)]
    part = torch.tensor([part for part, _ in graphs]).repeat_interleave(torch.tensor(sizes))
    y = torch.cat([graph.y for _, graph in graphs])
    return assemble(
        "ppi",
        x=torch.cat([graph.x for _, graph in graphs]),
        edge_index=torch.cat(edges, dim=1),
        y=y,
        masks=(part == 0, part == 1, part == 2),
        num_classes=y.size(1),
        task="multilabel",
        metric="micro_f1",
    )


def _whole(source: RawSource, dataset_class: Any, root: Path, *, download: bool) -> GraphDataset:
    """A dataset that holds one graph with masks; labels of two dimensions are multilabel."""

    def open_view(view: Path) -> tuple[Any, int]:
        dataset = dataset_class(str(view / source.folder))
        return dataset[0], dataset.num_classes

    data, num_classes = read(source, root, open_view, download=download)
    several = data.y.dim() == 2
    return assemble(
        source.name,
        x=data.x,
        edge_index=data.edge_index,
        y=data.y,
        masks=(data.train_mask, data.val_mask, data.test_mask),
        num_classes=num_classes,
        task="multilabel" if several else "multiclass",
        metric="micro_f1" if several else "accuracy",
    )
