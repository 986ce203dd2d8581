"""Wiki-CS: articles on computer science (Mernyei and Cangea 2020, arXiv 2007.02901), through torch_geometric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._foreign import require
from recollect.data._raw import RawSource, read
from recollect.data._splits import check_split
from recollect.data._stored import distrustful


def wikics(root: Path, seed: int, *, split: int = 0, download: bool = False) -> GraphDataset:
    """Articles and the links between them, in both directions; features are means of word vectors.

    Of each published split the nodes that are there to stop training are those for validation here, as validation
    chooses the epoch; the nodes that the authors call validation, which are there to choose hyper-parameters, are in no
    part. The test nodes are the same in all splits.

    Args:
        root: Folder that has, or will have, the file.
        seed: Not used.
        split: Which of the published splits, from 0 to 19.
        download: Whether to fetch the missing file.

    Raises:
        ValueError: There is no such split.
        MissingRawFilesError: The file is not there.
        InvalidRawFilesError: The file cannot be read.
        MissingDependencyError: torch_geometric is not installed.
    """
    dataset_class = distrustful(require("torch_geometric.datasets", extra="graph").WikiCS)
    source = RawSource(
        name="wikics",
        folder="WikiCS",
        files=("raw/data.json",),
        processed=("data_undirected.pt",),
        origin="pmernyei/wiki-cs-dataset on GitHub (folder dataset)",
        url=f"{dataset_class.url}/data.json",
    )

    def open_view(view: Path) -> tuple[Any, int]:
        dataset = dataset_class(str(view / "WikiCS"), is_undirected=True)
        return dataset[0], dataset.num_classes

    data, num_classes = read(source, root, open_view, download=download)
    num_splits = data.train_mask.size(1)
    check_split("wikics", split, num_splits)
    return assemble(
        "wikics",
        x=data.x,
        edge_index=data.edge_index,
        y=data.y,
        masks=(data.train_mask[:, split], data.stopping_mask[:, split], data.test_mask),
        num_classes=num_classes,
        num_splits=num_splits,
    )
