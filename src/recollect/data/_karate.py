"""Zachary's karate club, embedded in torch_geometric."""

from __future__ import annotations

from pathlib import Path

import torch

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._foreign import foreign_code, require
from recollect.data._splits import stratified_masks


def karate(root: Path, seed: int) -> GraphDataset:
    """34 members in 4 communities; the features are the members' identities.

    The training nodes are torch_geometric's, one per community. It has no other split: the remaining nodes
    are halved, class by class and always in the same way, into validation and test.

    Args:
        root: Not used.
        seed: Not used.

    Raises:
        MissingDependencyError: torch_geometric is not installed.
    """
    datasets = require("torch_geometric.datasets", extra="graph")
    with foreign_code():
        data = datasets.KarateClub()[0]
    rest = (~data.train_mask).nonzero().flatten()
    _, val_of_rest, test_of_rest = stratified_masks(data.y[rest], train=0.0, val=0.5, seed=0)
    val, test = torch.zeros_like(data.train_mask), torch.zeros_like(data.train_mask)
    val[rest[val_of_rest]] = True
    test[rest[test_of_rest]] = True
    return assemble(
        "karate",
        x=data.x,
        edge_index=data.edge_index,
        y=data.y,
        masks=(data.train_mask, val, test),
        num_classes=4,
    )
