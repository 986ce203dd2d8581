"""Gradients of mini-batches whose histories are corrected, against those of the whole graph."""

import pytest
import torch
from compensation_zoo import NODES, OTHERS, PTR, SUMS, epoch, error, fill, loss_of, make, make_data, run, whole

from recollect.autoscale import SubgraphLoader
from recollect.autoscale._separable import Form, Way

EXACT = 1e-12
depths = pytest.mark.parametrize("layers", [2, 3, 4])


@depths
@pytest.mark.parametrize("outward", [True, "complete"], ids=["cut", "complete"])
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "frames"])
@pytest.mark.parametrize("name", SUMS)
def test_exact_histories_give_the_whole_graphs_gradient(name, recompute, outward, layers):
    data, model = make_data(), make(name, layers, compensate=True, recompute=recompute)
    expected, *tables = whole(model, data)
    fill(model, *tables)
    assert error(epoch(model, data, outward), expected) < EXACT
    without = make(name, layers)
    fill(without, *whole(without, data)[1:])
    assert error(epoch(without, data, False), expected) > 0.01


@depths
@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_are_no_sums_need_all_edges_of_the_nodes_outside(name, layers):
    data, model = make_data(), make(name, layers, compensate=True)
    expected, *tables = whole(model, data)
    fill(model, *tables)
    assert error(epoch(model, data, "complete"), expected) < EXACT
    with pytest.raises(NotImplementedError, match="depends on the target's other sources"):
        epoch(make(name, layers, compensate=True), data, True)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gcn", Way(Form.SUM, products=False)),
        ("appnp", Way(Form.SUM, products=False)),
        ("gcn2", Way(Form.SUM, products=False)),
        ("gcn-linear", Way(Form.SUM_AND_OWN, products=False)),
        ("graphconv", Way(Form.SUM_AND_OWN, products=False)),
        ("own", Way(Form.SUM_AND_OWN, products=False)),
        ("sage-sum", Way(Form.EDGES, products=False)),
        ("gated", Way(Form.SUM)),
        ("edges", Way(Form.EDGES, products=False)),
    ],
)
def test_how_gradients_are_sent_back_is_observed(name, way):
    data, model = make_data(), make(name, 3, compensate=True)
    epoch(model, data, True)
    assert model._ways == {1: way, 2: way}
