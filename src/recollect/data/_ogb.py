"""The Open Graph Benchmark's node graphs (Hu et al. 2020, arXiv 2005.00687), through ogb."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.data._dataset import GraphDataset, Metric, Task, assemble
from recollect.data._foreign import require
from recollect.data._raw import RawSource, read
from recollect.data._stored import stored_classes


@dataclass(frozen=True)
class _Facts:
    archive: str
    split: str
    num_classes: int
    files: tuple[str, ...]
    task: Task = "multiclass"
    metric: Metric = "accuracy"


_SERVER = "http://snap.stanford.edu/ogb/data/nodeproppred"
_OLD_SPECIES = "raw/species.csv.gz"  # what proteins' last file was once called; ogb renames it
_COMMON = ("edge", "num-node-list", "num-edge-list", "node-label")
_FACTS = {
    "ogbn-arxiv": _Facts("arxiv", "time", 40, (*_COMMON, "node-feat", "node_year")),
    "ogbn-products": _Facts("products", "sales_ranking", 47, (*_COMMON, "node-feat")),
    "ogbn-proteins": _Facts(
        "proteins", "species", 112, (*_COMMON, "edge-feat", "node_species"), "multilabel", "rocauc"
    ),
}


def ogbn(name: str, root: Path, seed: int, *, undirected: bool = True, download: bool = False) -> GraphDataset:
    """A node property graph with its standard split.

    The proteins have no features of their own: theirs are the means of their edges' features, as in ogb's
    published recipe, and the edges' features are kept in ``edge_attr``. Its graph and the products' are
    undirected.

    Args:
        name: ``"ogbn-arxiv"``, ``"ogbn-products"`` or ``"ogbn-proteins"``.
        root: Folder that has, or will have, the folder ``ogbn_arxiv`` and so on.
        seed: Not used.
        undirected: Whether arxiv's citations are joined in both directions; changes nothing for the others.
        download: Whether to fetch missing files.

    Raises:
        MissingRawFilesError: The files are not there.
        InvalidRawFilesError: The files cannot be read.
        MissingDependencyError: ogb or torch_geometric is not installed.
    """
    require("torch_geometric.data", extra="graph")
    dataset_class = require("ogb.nodeproppred.dataset_pyg", extra="ogb").PygNodePropPredDataset
    facts = _FACTS[name]
    folder = name.replace("-", "_")
    splits = tuple(f"split/{facts.split}/{part}.csv.gz" for part in ("train", "valid", "test"))
    url = f"{_SERVER}/{facts.archive}.zip"
    raw = [f"raw/{file}.csv.gz" for file in facts.files]
    if (root / folder / _OLD_SPECIES).is_file():
        raw[-1] = _OLD_SPECIES
    source = RawSource(
        name=name,
        folder=folder,
        files=(*raw, *splits),
        processed=("geometric_data_processed.pt",),
        origin=f"the Open Graph Benchmark ({url}, unpacked and renamed from {facts.archive} to {folder})",
        url=url,
        fetch=partial(_fetch, url=url, archive=facts.archive, folder=folder),
    )

    def open_view(view: Path) -> tuple[Any, dict[str, Tensor]]:
        (view / folder / "RELEASE_v1.txt").touch()  # without it ogb asks on the terminal whether to update
        with torch.serialization.safe_globals(stored_classes()):
            dataset = dataset_class(name, root=str(view))
        return dataset[0], dataset.get_idx_split()

    data, index = read(source, root, open_view, download=download)
    edge_index = data.edge_index
    if undirected and name == "ogbn-arxiv":
        edge_index = require("torch_geometric.utils", extra="graph").to_undirected(edge_index, num_nodes=data.num_nodes)
    x = data.x if data.x is not None else _mean_of_edges(data.edge_attr, edge_index, data.num_nodes)
    masks = torch.zeros(3, data.num_nodes, dtype=torch.bool)
    for row, part in enumerate(("train", "valid", "test")):
        masks[row, index[part]] = True
    return assemble(
        name,
        x=x,
        edge_index=edge_index,
        y=data.y,
        masks=(masks[0], masks[1], masks[2]),
        num_classes=facts.num_classes,
        task=facts.task,
        metric=facts.metric,
        edge_attr=data.edge_attr,
    )


def _mean_of_edges(edge_attr: Tensor, edge_index: Tensor, num_nodes: int) -> Tensor:
    """Means over the edges that end in a node, [N, D]; zero where there are none."""
    target = edge_index[1]
    sums = edge_attr.new_zeros(num_nodes, edge_attr.size(1)).index_add_(0, target, edge_attr)
    return sums / torch.bincount(target, minlength=num_nodes).clamp(min=1).unsqueeze(1)


def _fetch(view: Path, *, url: str, archive: str, folder: str) -> None:
    # The steps of ogb's own download(), which would ask on the terminal for consent that download=True has
    # given.
    tools = require("ogb.utils.url", extra="ogb")
    path = tools.download_url(url, str(view))
    tools.extract_zip(path, str(view), log=False)
    Path(path).unlink()
    (view / archive).rename(view / folder)
