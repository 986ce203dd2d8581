"""The examples run and reach what they are for."""

import copy
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_a_flow_on_two_moons():
    flow = load("flow")
    result = flow.train(steps=6, iterations=400)
    assert result.negative_log_likelihood < 0.6  # nats; a Gaussian has 1.88, and 0.3 is what longer training reaches
    assert result.gaussian > 1.8
    # The likelihood is exact: the density sums to one over the plane.
    side = torch.linspace(-2.5, 3.5, 300)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        z, log_det = result.flow.forward_and_log_det(grid)
    density = (log_det - 0.5 * z.square().sum(1) - math.log(2 * math.pi)).exp()
    assert density.sum().item() * (6 / 299) ** 2 == pytest.approx(1.0, abs=0.03)
    points = flow.sample(result.flow, 500)
    assert torch.isfinite(points).all()
    assert torch.allclose(result.flow.inverse(result.flow(points)), points, atol=1e-3)


def test_a_class_conditional_flow():
    conditional = load("conditional_flow")
    result = conditional.train()
    flow = result.flow
    assert result.negative_log_likelihood < 0.5  # nats
    assert result.accuracy > 0.99
    # Each class has a density of its own, which sums to one over the plane.
    side = torch.linspace(-2.5, 3.5, 300)
    grid = torch.cartesian_prod(side, side)
    for label in range(2):
        with torch.no_grad():
            density = conditional.log_likelihood(flow, grid, torch.full((len(grid),), label)).exp()
        assert density.sum().item() * (6 / 299) ** 2 == pytest.approx(1.0, abs=0.03)
    labels = torch.arange(2).repeat(200)
    drawn = conditional.sample(flow, labels)
    assert (conditional.classify(flow, drawn) == labels).float().mean() > 0.97
    # The log-determinant is that of the Jacobian, and the inverse needs the right class.
    double = copy.deepcopy(flow).double()
    x, label = drawn[:4].double(), labels[:4]
    z, log_det = double.forward_and_log_det(x, label=label)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda r, i=i: double(r[None], label=label[i : i + 1])[0], x[i])
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(log_det[i].item(), abs=1e-8)
    assert torch.allclose(double.inverse(z, label=label), x, atol=1e-8)
    assert not torch.allclose(double.inverse(z, label=1 - label), x, atol=1e-2)


def test_an_invertible_network_on_digits():
    cnn = load("invertible_cnn")
    result = cnn.train(couplings=4)
    assert result.accuracy > 0.97
    assert result.drift < 1e-3
    assert result.peak < result.peak_plain / 3
    deeper = cnn.train(couplings=12, epochs=0)
    assert deeper.peak <= 1.05 * result.peak
    assert deeper.peak_plain > 2.5 * result.peak_plain


def test_instance_wise_risk_minimisation_on_digits():
    iwrm = load("iwrm")
    result = iwrm.train(iwrm.upgrad())
    assert result.accuracy > 0.9
    assert result.conflicts > 0.3  # so that there was something to do
    assert result.hurt < 0.03
    mean = iwrm.train(iwrm.MeanWeighting())
    assert mean.accuracy < result.accuracy - 0.2  # after as many steps, with the same learning rate
    assert mean.hurt > 0.2  # an ordinary step does hurt


def test_a_transformer_at_full_width():
    result = load("full_width").train(iterations=120, layers=3, half=3, tokens=5, dropout=0.1)
    assert result.same
    assert result.peak_bytes < 0.6 * result.kept_bytes
    assert result.accuracy > 0.6  # 0.2 is chance


def test_several_tasks_for_each_image():
    result = load("multitask").train(epochs=4)
    assert result.digits > 0.9
    assert result.even > 0.9
    assert result.ink > 0.95
    assert result.weights.dim() == 2
    assert result.weights.shape[1] == 3


def test_polyaks_step_from_the_squared_norm_of_a_gradient():
    result = load("gradient_norm").train(epochs=5)
    assert result.difference < 1e-5
    assert result.accuracy > 0.93
    assert sum(result.losses[-5:]) / 5 < 0.1 * result.losses[0]
    assert min(result.steps) < 0.5 * max(result.steps)  # the slope decides


def test_gates_of_edges_on_mini_batches():
    pytest.importorskip("torch_geometric.data")  # also hides what it warns of when it is imported
    result = load("edge_gate").train()
    assert result.accuracy > 0.95
    assert result.accuracy > result.ungated + 0.05
    assert result.within > 0.9
    assert result.between < 0.2


def test_depth_graph_and_objectives_at_once():
    result = load("three_axes").train(num_nodes=1000, epochs=3)
    assert result.accuracy > result.always_same + 0.1
    assert result.peak < result.peak_plain / 5


def test_link_prediction_on_mini_batches():
    pytest.importorskip("torch_geometric.data")
    result = load("link_prediction").train(num_nodes=500, epochs=15)
    assert result.pairs == result.links  # an epoch hands out each pair once
    assert result.auc > 0.75  # 0.5 is chance
    assert result.auc > result.auc_before + 0.05


def test_typed_edges_on_mini_batches():
    pytest.importorskip("torch_geometric.data")
    heterogeneous = load("heterogeneous")
    result = heterogeneous.train(num_papers=400, epochs=12)
    assert result.accuracy > 0.8
    assert result.accuracy_untyped < 0.7
    assert result.accuracy > result.accuracy_untyped + 0.2


def test_a_typed_convolution_is_a_sum_over_types():
    """Against a dense matrix for each type, and in mini-batches as on the whole graph."""
    pytest.importorskip("torch_geometric.data")
    from recollect.autoscale import EvalSubgraphLoader, partition, permute

    heterogeneous = load("heterogeneous")
    torch.manual_seed(0)
    data = heterogeneous.prepare(heterogeneous.make_graph(30))
    perm, ptr = partition(data.adj_t, 4, "random", log=False)
    data = permute(data, perm, log=False)
    model = heterogeneous.TypedGNN(data.num_nodes, data.x.size(1), 4).eval()
    x = data.x
    rows = torch.repeat_interleave(torch.arange(data.num_nodes), data.adj_t.crow_indices().diff())
    for layer in range(2):
        out = model.own[layer](x)
        for kind in range(4):
            of_type = data.edge_type == kind
            means = torch.zeros(data.num_nodes, data.num_nodes)
            where = rows[of_type], data.adj_t.col_indices()[of_type]
            means.index_put_(where, torch.ones(int(of_type.sum())), accumulate=True)
            means /= means.sum(1, keepdim=True).clamp_(min=1)
            out = out + means @ model.typed[layer][kind](x)
        x = out if layer == 1 else out.relu()
    whole = model(data.x, data.adj_t, edge_type=data.edge_type)
    assert torch.allclose(whole, x, atol=1e-5)
    assert torch.allclose(model(loader=EvalSubgraphLoader(data, ptr, batch_size=2, log=False)), x, atol=1e-5)
