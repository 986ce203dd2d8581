import pytest
import torch

from recollect.autoscale import get_data
from recollect.data import UnknownDatasetError, load


def test_it_is_the_graph_of_that_name():
    data, in_channels, out_channels = get_data(None, "karate")
    expected = load("karate")
    assert (in_channels, out_channels) == (expected.data.x.size(1), expected.num_classes)
    dense = torch.zeros(expected.data.num_nodes, expected.data.num_nodes)
    source, target = expected.data.edge_index
    dense[target, source] = 1
    assert torch.equal(data.adj_t.to_dense(), dense)
    assert torch.equal(data.y, expected.data.y)
    assert "edge_index" not in data


def test_options_reach_the_dataset():
    assert get_data(None, "sbm", num_nodes=500, num_features=3).data.x.shape == (500, 3)


@pytest.mark.parametrize(
    ("name", "known"),
    [("Karate", "karate"), ("CoauthorCS", "coauthor-cs"), ("AmazonPhoto", "amazon-photo"), ("arxiv", "ogbn-arxiv")],
)
def test_names_may_be_those_of_pygas(name, known, monkeypatch):
    asked = []

    def load_karate(name, root, **options):
        asked.append(name)
        return load("karate")

    monkeypatch.setattr("recollect.autoscale._get_data.load", load_karate)
    get_data(None, name)
    assert asked == [known]


def test_an_unknown_name_is_refused():
    with pytest.raises(UnknownDatasetError, match="cora"):
        get_data(None, "coraa")
