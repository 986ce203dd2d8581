from __future__ import annotations

import io
import warnings

import pytest
import torch
from rich.console import Console

from recollect.data import from_data, load
from recollect.data._foreign import require
from recollect.train import UsageError
from recollect.train._given import as_dataset

Data = require("torch_geometric.data", extra="graph").Data
QUIET = Console(quiet=True)


def graph(**changed):
    torch.manual_seed(0)
    known = {"x": torch.randn(50, 4), "edge_index": torch.randint(50, (2, 80)), "y": torch.arange(50) % 3}
    return Data(**{name: value for name, value in (known | changed).items() if value is not None})


def test_a_graph_by_name_is_taken_as_it_is():
    known = load("karate")
    assert as_dataset(known, 0, QUIET) is known


def test_a_split_is_drawn_and_told_once_and_the_seed_decides():
    text, data = io.StringIO(), graph()
    made = as_dataset(data, 3, Console(file=text, width=200))
    masks = [made.data[f"{part}_mask"] for part in ("train", "val", "test")]
    assert [int(mask.sum()) for mask in masks] == [30, 11, 9]
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(50, dtype=torch.int64))
    assert "made from seed 3, 60% / 20% / 20% of each class" in text.getvalue()
    assert torch.equal(as_dataset(data, 3, QUIET).data.train_mask, made.data.train_mask)
    assert not torch.equal(as_dataset(data, 4, QUIET).data.train_mask, made.data.train_mask)
    assert "train_mask" not in data  # the caller's graph stays as it was


def test_a_split_of_ones_own_is_kept():
    parts = {f"{part}_mask": torch.arange(50) % 3 == k for k, part in enumerate(("train", "val", "test"))}
    made = as_dataset(graph(**parts), 0, QUIET)
    assert all(torch.equal(made.data[name], mask) for name, mask in parts.items())


def test_several_splits_are_refused_until_one_is_chosen():
    parts = torch.randint(3, (50, 5), generator=torch.Generator().manual_seed(0))
    names = [f"{part}_mask" for part in ("train", "val", "test")]
    several = {name: parts == k for k, name in enumerate(names)}
    with pytest.raises(UsageError, match=r"hold 5 splits, and a run is of one: give one column of each"):
        as_dataset(graph(**several), 0, QUIET)
    made = as_dataset(graph(**{name: mask[:, 3] for name, mask in several.items()}), 0, QUIET)
    assert all(torch.equal(made.data[name], mask[:, 3]) for name, mask in several.items())
    chosen = from_data(graph(**several), split=3)
    assert as_dataset(chosen, 0, QUIET) is chosen
    assert torch.equal(chosen.data.train_mask, made.data.train_mask)
    one = as_dataset(graph(**{name: mask[:, :1] for name, mask in several.items()}), 0, QUIET)
    assert torch.equal(one.data.val_mask, several["val_mask"][:, 0])


def test_nodes_without_a_label_are_in_no_part():
    y = torch.arange(50) % 3
    y[:10] = -1
    made = as_dataset(graph(y=y), 0, QUIET)
    used = made.data.train_mask | made.data.val_mask | made.data.test_mask
    assert torch.equal(used, y >= 0)
    assert (made.task, made.num_classes, made.metric) == ("multiclass", 3, "accuracy")


def test_missing_features_are_degrees_and_it_is_told():
    text = io.StringIO()
    made = as_dataset(graph(x=None, num_nodes=50), 0, Console(file=text, width=200))
    assert made.data.x.shape == (50, 2)
    assert "degrees are used" in text.getvalue()


def test_classes_keep_their_numbers():
    y = torch.tensor([0, 4])[torch.arange(50) % 2]
    made = as_dataset(graph(y=y), 0, QUIET)
    assert torch.equal(made.data.y, y)
    assert made.num_classes == 5


def test_what_else_a_graph_holds_stays():
    made = as_dataset(graph(edge_type=torch.arange(80)), 0, QUIET)
    assert torch.equal(made.data.edge_type, torch.arange(80))


def test_an_adjacency_becomes_edges_with_their_weights():
    dense = torch.zeros(50, 50)
    dense[torch.arange(50), torch.arange(50).roll(1)] = torch.arange(1.0, 51)
    with warnings.catch_warnings(action="ignore"):  # that torch calls them a prototype
        data = graph(edge_index=None, adj_t=dense.to_sparse_csr())
    made = as_dataset(data, 0, QUIET).data
    assert torch.equal(made.edge_index, torch.stack([torch.arange(50).roll(1), torch.arange(50)]))
    assert torch.equal(made.edge_weight, torch.arange(1.0, 51))
    assert "adj_t" not in made


def test_several_labels_are_scored_by_average_precision():
    made = as_dataset(graph(y=torch.randint(2, (50, 6))), 0, QUIET)
    assert (made.task, made.num_classes, made.metric) == ("multilabel", 6, "average_precision")
    assert made.data.y.dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": None}, "the graph has no labels"),
        ({"y": torch.rand(50)}, "classes are whole numbers from 0"),
        ({"y": torch.arange(49)}, "y 49, x 50; each node needs a row"),
        ({"y": torch.arange(50)[:, None] % 2}, r"y is \[50, 1\].*give y\.view\(-1\)"),
        ({"y": torch.rand(50, 2)}, "labels are 0 or 1, or NaN"),
        ({"edge_index": torch.tensor([[0], [50]])}, "edge_index names the node 50"),
        ({"train_mask": torch.ones(50, dtype=torch.bool)}, "has train_mask and no val_mask: give all"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(UsageError, match=message):
        as_dataset(graph(**changed), 0, QUIET)


def test_a_split_by_numbers_of_nodes_is_taken():
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "val", "test"), order.split([30, 10, 10]), strict=True))
    made = as_dataset(graph(**{f"{part}_idx": numbers for part, numbers in parts.items()}), 0, QUIET)
    for part, numbers in parts.items():
        assert torch.equal(made.data[f"{part}_mask"].nonzero().flatten(), numbers.sort().values)


def test_a_part_without_nodes_is_refused():
    masks = {"train_mask": torch.arange(50) < 25, "val_mask": torch.zeros(50, dtype=torch.bool)}
    with pytest.raises(UsageError, match="val_mask has none of the 50 nodes"):
        as_dataset(graph(**masks, test_mask=torch.arange(50) >= 25), 0, QUIET)


def test_something_else_is_refused():
    with pytest.raises(UsageError, match="the graph holds a list"):
        as_dataset([1, 2], 0, QUIET)
