from __future__ import annotations

import pytest
import torch

from recollect.data import GraphDataset
from recollect.data._foreign import require

Data = require("torch_geometric.data", extra="graph").Data  # its import gives a warning, which this keeps quiet

TINY = (
    "dataset=karate",
    "model.num_layers=3",
    "model.hidden_channels=8",
    "epochs=4",
    "threads=1",
    "measure.repeats=1",
)


@pytest.fixture
def tiny() -> list[str]:
    """Overrides of a run that takes a moment."""
    return list(TINY)


def make_graph(task: str, metric: str, num_classes: int, *, edge_attr: bool = False) -> GraphDataset:
    """Twelve nodes in a ring, four in each part of the split."""
    generator = torch.Generator().manual_seed(1)
    n = 12
    ring = torch.arange(n)
    edge_index = torch.stack([torch.cat([ring, ring.roll(1)]), torch.cat([ring.roll(1), ring])])
    parts = torch.arange(n) % 3
    y = (
        torch.arange(n) // 3 % num_classes
        if task == "multiclass"
        else torch.randint(2, (n, num_classes), generator=generator).float()
    )
    data = Data(
        x=torch.randn(n, 5, generator=generator),
        edge_index=edge_index,
        y=y,
        train_mask=parts == 0,
        val_mask=parts == 1,
        test_mask=parts == 2,
    )
    if edge_attr:
        data.edge_attr = torch.randn(edge_index.size(1), 3, generator=generator)
    return GraphDataset("ring", data, task, num_classes, metric)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def graph_maker():
    return make_graph
