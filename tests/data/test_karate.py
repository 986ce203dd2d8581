from __future__ import annotations

import torch
from torch_geometric.datasets import KarateClub

from recollect.data import load


def test_graph_is_torch_geometrics() -> None:
    ours, theirs = load("karate").data, KarateClub()[0]
    for key in ("x", "edge_index", "y", "train_mask"):
        assert torch.equal(ours[key], theirs[key])


def test_the_remaining_nodes_are_halved() -> None:
    data = load("karate").data
    assert [int(mask.sum()) for mask in (data.train_mask, data.val_mask, data.test_mask)] == [4, 16, 14]
