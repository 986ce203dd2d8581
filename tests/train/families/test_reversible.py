from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recollect.train._config import parse
from recollect.train._errors import UsageError
from recollect.train.families import family_of

CPU = torch.device("cpu")


def prepared(graph_maker, overrides, **kwargs):
    family = family_of(parse(overrides))
    return family, family.prepare(graph_maker("multiclass", "accuracy", 3, **kwargs))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_channels=7", "hidden_channels=7 is not divisible"),
        ("model.conv=conv", "choose from gat, gcn"),
        ("model.conv_kwargs.colour=red", "the model cannot be built: .*colour"),
    ],
)
def test_a_wrong_model_is_wrong_usage(graph_maker, override, message):
    family, graph = prepared(graph_maker, [override])
    with pytest.raises(UsageError, match=message):
        family.build(graph, CPU)


def test_a_model_can_have_another_depth(graph_maker):
    family, graph = prepared(graph_maker, ["model.num_layers=3"])
    assert family.build(graph, CPU, num_layers=5).num_layers == 5


@pytest.mark.parametrize("conv", ["gat", "gen"])
def test_edge_features_reach_the_output(graph_maker, conv):
    overrides = ["model=revgnn_deep", f"model.conv={conv}", "model.num_layers=2", "model.hidden_channels=8"]
    family, graph = prepared(graph_maker, overrides, edge_attr=True)
    family = family_of(replace(family.settings, model=replace(family.settings.model, conv_kwargs={})))
    model = family.build(graph, CPU).eval()
    x, edge_index, edge_attr = family.inputs(model, graph)
    assert not torch.allclose(model(x, edge_index, edge_attr), model(x, edge_index, 2 * edge_attr))


def test_a_graph_without_edge_features_needs_none(graph_maker):
    family, graph = prepared(graph_maker, ["model=revgnn_deep"])
    assert len(family.inputs(None, graph)) == 2


def test_edge_features_need_a_convolution_that_takes_them(graph_maker):
    family, graph = prepared(graph_maker, ["model.edge_features=true"], edge_attr=True)
    with pytest.raises(UsageError, match="gat, gen"):
        family.build(graph, CPU)
