from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recollect.train._build import build_dataset, build_optimizer, warmup
from recollect.train._config import parse
from recollect.train._errors import TrainingError, UsageError
from recollect.train._network import build_model, graph_inputs


def test_missing_raw_files_are_named(tmp_path):
    settings = parse(["dataset=cora", f"data.root={tmp_path}"])
    with pytest.raises(TrainingError, match=r"ind\.cora[\s\S]*dataset\.options\.download=true") as error:
        build_dataset(settings.dataset, settings.data)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    "override", ["dataset.name=coraa", "dataset.options.k=0", "dataset.options={k: 10, colour: red}"]
)
def test_a_wrong_dataset_is_wrong_usage(override):
    settings = parse([]).dataset
    settings = {
        "dataset.name=coraa": replace(settings, name="coraa"),
        "dataset.options.k=0": replace(settings, options={"k": 0}),
        "dataset.options={k: 10, colour: red}": replace(settings, options={"k": 10, "colour": "red"}),
    }[override]
    with pytest.raises(UsageError, match=r"coraa|k is 0|colour"):
        build_dataset(settings, parse([]).data)


def test_the_seed_of_generated_graphs_is_its_own():
    settings = parse(["dataset=sbm", "dataset.options.num_nodes=50", "dataset.options.num_classes=2"])
    one = build_dataset(settings.dataset, settings.data)
    same = build_dataset(settings.dataset, settings.data)
    other = build_dataset(settings.dataset, replace(settings.data, seed=1))
    assert torch.equal(one.data.x, same.data.x)
    assert not torch.equal(one.data.x, other.data.x)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_channels=7", "hidden_channels=7 is not divisible"),
        ("model.conv=conv", "choose from gat, gcn"),
        ("model.conv_kwargs.colour=red", "the model cannot be built: .*colour"),
    ],
)
def test_a_wrong_model_is_wrong_usage(graph_maker, override, message):
    with pytest.raises(UsageError, match=message):
        build_model(parse([override]).model, graph_maker("multiclass", "accuracy", 3))


def test_a_model_can_have_another_depth(graph_maker):
    settings = parse(["model.num_layers=3"]).model
    assert build_model(settings, graph_maker("multiclass", "accuracy", 3), num_layers=5).num_layers == 5


@pytest.mark.parametrize("conv", ["gat", "gen"])
def test_edge_features_reach_the_output(graph_maker, conv):
    settings = parse(["model=revgnn_deep", f"model.conv={conv}", "model.num_layers=2", "model.hidden_channels=8"]).model
    settings = replace(settings, conv_kwargs={})
    graph = graph_maker("multilabel", "rocauc", 3, edge_attr=True)
    model = build_model(settings, graph).eval()
    x, edge_index, edge_attr = graph_inputs(settings, graph)
    assert not torch.allclose(model(x, edge_index, edge_attr), model(x, edge_index, 2 * edge_attr))


def test_a_graph_without_edge_features_needs_none(graph_maker):
    graph = graph_maker("multiclass", "accuracy", 3)
    assert len(graph_inputs(parse(["model=revgnn_deep"]).model, graph)) == 2


def test_edge_features_need_a_convolution_that_takes_them(graph_maker):
    settings = parse(["model.edge_features=true"]).model
    with pytest.raises(UsageError, match="gat, gen"):
        build_model(settings, graph_maker("multiclass", "accuracy", 3, edge_attr=True))


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers_get_their_settings(name, kind):
    settings = parse([f"optimizer={name}", "optimizer.lr=0.5", "optimizer.weight_decay=0.25"]).optimizer
    optimizer = build_optimizer(settings, torch.nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert optimizer.defaults.items() >= {"lr": 0.5, "weight_decay": 0.25}.items()
    assert optimizer.defaults.get("momentum", 0.9) == 0.9


def test_a_wrong_option_of_the_optimizer_is_wrong_usage():
    settings = parse(["optimizer.options.betas=[2.0,0.9]"]).optimizer
    with pytest.raises(UsageError, match="the optimizer cannot be built: Invalid beta"):
        build_optimizer(settings, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("epochs", "rates"), [(0, [1, 1, 1]), (2, [1 / 3, 2 / 3, 1, 1])])
def test_the_rate_rises_to_its_value(epochs, rates):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = warmup(optimizer, epochs), []
    for _ in rates:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(rates)
