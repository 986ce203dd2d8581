from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from recollect import models
from recollect.train._config import parse
from recollect.train._errors import TrainingError
from recollect.train._room import check_room, histories_of
from recollect.train.families import family_of

CPU = torch.device("cpu")
KINDS: dict[str, Any] = {
    "gcn": models.GCN,
    "gat": models.GAT,
    "gcn2": models.GCN2,
    "appnp": models.APPNP,
    "pna": models.PNA,
    "pna_jk": models.PNA_JK,
    "gin": models.GIN,
}
PARTS = ["training=autoscale", "training.num_parts=3", "training.parts_per_batch=1"]


def prepared(graph_maker, overrides, **kwargs):
    family = family_of(parse(overrides))
    return family, family.prepare(graph_maker("multiclass", "accuracy", 3, **kwargs))


@pytest.mark.parametrize("kind", KINDS)
def test_full_and_autoscale_build_the_same_network(graph_maker, kind):
    overrides = [f"model={kind}", "model.num_layers=3", "model.hidden_channels=8"]
    outputs = []
    for training in ([], PARTS):
        family, graph = prepared(graph_maker, [*overrides, *training])
        torch.manual_seed(0)
        model = family.build(graph, CPU)
        assert type(model) is KINDS[kind]
        assert model.keep_histories is bool(training)
        out = model.eval()(*family.inputs(model, graph)).detach()
        outputs.append(torch.empty_like(out).index_copy_(0, graph.data.get("node_order", torch.arange(12)), out))
    assert outputs[0].shape == (12, 3)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


def test_options_reach_the_network(graph_maker):
    overrides = ["model=gcn2", "model.options.theta=0.25", "model.options.alpha=0.75", "model.num_layers=2"]
    family, graph = prepared(graph_maker, overrides)
    model = family.build(graph, CPU)
    assert (model.theta, model.alpha) == (0.25, 0.75)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_a_network_can_be_set_and_has_its_default(kind):
    """But for what the graph gives, and what another key says."""
    known = {"num_nodes", "in_channels", "hidden_channels", "out_channels", "num_layers", "dropout", "deg", "edge_dim"}
    known |= {"pool_size", "buffer_size", "device"}  # settings of the training
    signature = inspect.signature(KINDS["pna" if kind == "pna_jk" else kind])
    own = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in known and parameter.kind is not parameter.VAR_KEYWORD
    }
    settings: Any = parse([f"model={kind}"]).model
    options = settings.options
    assert set(options) == set(own)
    if kind not in ("pna", "pna_jk"):  # whose options are those of the large presets
        assert options == own


def test_pna_is_scaled_by_the_degrees_of_the_graph(graph_maker):
    family, graph = prepared(graph_maker, ["model=pna"])
    degrees = (graph.data.adj_t.to_dense() != 0).sum(1)
    built = family.build(graph, CPU).eval()
    torch.manual_seed(0)
    own = models.PNA(12, 5, 64, 3, 3, **family.settings.model.options, deg=degrees, dropout=0.5)
    own.load_state_dict(built.state_dict())
    inputs = family.inputs(built, graph)
    assert torch.allclose(own.eval()(*inputs), built(*inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "layers"), [("float32", 3), ("int8", 3), ("float32", 7)])
def test_what_histories_will_take_is_what_they_take(graph_maker, kind, dtype, layers):
    family, graph = prepared(
        graph_maker, [f"model={kind}", f"model.num_layers={layers}", *PARTS, f"training.history_dtype={dtype}"]
    )
    expected = family.expected_histories(graph, CPU)
    model = family.build(graph, CPU)
    assert expected == histories_of(model, family.settings.training, CPU)
    assert expected["layers"] == layers - 1
    held = [tensor for history in model.histories for tensor in history.table.state().values() if tensor.dim()]
    assert expected["bytes"] == sum(tensor.nbytes for tensor in held)


def test_histories_that_have_no_room_are_refused_before_they_are_made(graph_maker):
    family, graph = prepared(graph_maker, ["model=gcn", *PARTS, "model.hidden_channels=1000000"])
    graph.data.num_nodes = 12
    expected = family.expected_histories(graph, CPU) | {"bytes": 2**60}
    with pytest.raises(TrainingError, match=r"need 1,073,741,824.00 GiB on cpu, and .* are free: try .*=int8"):
        check_room(expected, CPU)
    check_room(expected | {"place": "a/folder"}, CPU)  # which has another limit


def test_buffers_have_no_more_rows_than_there_are_nodes(graph_maker):
    words = ["model=gcn", *PARTS, "training.pool_size=1", "training.buffer_size=1000000000000000000000000"]
    family, graph = prepared(graph_maker, words)
    assert family._options(graph.data.num_nodes, CPU)["buffer_size"] == graph.data.num_nodes
    family.build(graph, CPU)


def test_histories_lie_where_the_settings_say(graph_maker, tmp_path):
    family, graph = prepared(graph_maker, ["model=gcn", *PARTS, f"training.history_path={tmp_path}"])
    model = family.build(graph, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["0.history"]
    with pytest.raises(TrainingError, match=r"0.history is in use"):
        family.build(graph, CPU)
    del model
