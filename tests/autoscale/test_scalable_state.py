"""Saving and loading a network on histories."""

from __future__ import annotations

import io

import pytest
import torch
from scalable_zoo import NODES, Mean, assert_same, batches, make_graph, run, tables


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("keep", [False, True])
def test_histories_are_saved_where_they_are_asked_for(keep):
    model = Mean(save_histories=keep)
    for batch in batches(make_graph()):
        run(model, batch)
    state = saved(model)
    assert any("histories" in key for key in state) == keep
    other = Mean(save_histories=keep)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert_same(list(other.parameters()), list(model.parameters()))
    assert (other.staleness() == model.staleness()) == keep
    assert other.never_pushed() == (model.never_pushed() if keep else 3 * [NODES])
    if keep:
        assert_same(tables(other), tables(model))
        batch = batches(make_graph())[0]
        assert_same([run(other, batch)], [run(model, batch)])


def test_parameters_are_named_once():
    names = [name for name, _ in Mean().named_parameters()]
    assert names == ["skip", "weights.0", "weights.1", "weights.2", "weights.3"]


def test_moving_the_network_moves_what_is_pulled():
    model = Mean(history_dtype=torch.float32).float()
    assert all(table.dtype == torch.float32 for table in tables(model))
    assert all(table.dtype == torch.float64 for table in tables(model.double()))
