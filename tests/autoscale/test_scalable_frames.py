"""Histories inside frames: pushed once in a step, pulled again in a rebuild."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scalable_zoo import (
    IN,
    NODES,
    OUT,
    WIDTHS,
    Handwritten,
    Mean,
    assert_same,
    backward,
    batches,
    make_graph,
    pools,
    run,
    tables,
)
from torch import Tensor, nn
from torch.nn import functional as F

import recollect
from recollect.autoscale import ScalableGNN, propagate
from recollect.frames import InPlaceError
from recollect.reversible import GroupAddRev


class Accumulating(Mean):
    """What a layer finds in its state is what it leaves there and something more."""

    def forward_layer(self, layer, x, adj_t, state):
        out = super().forward_layer(layer, x, adj_t, state)
        state["total"] = state.get("total", 0.5) + out.mean(-1, keepdim=True).exp()
        return out * state["total"]


def pushes(model: ScalableGNN) -> list[int]:
    model.staleness()  # waits for a pool
    return [history.table.clock.pushes for history in model.histories]


class Framed(Handwritten):
    """Each layer, with its push and pull, in a frame of the user's."""

    def forward(self, x: Tensor, adj_t: Tensor, *args: Any) -> Tensor:
        def layer(number: int, x: Tensor) -> Tensor:
            if number:
                x = self.push_and_pull(self.histories[number - 1], x, *args)
            out = torch.cat([propagate(adj_t, x), x[: adj_t.size(0)]], -1) @ self.weights[number]
            return F.dropout(out.tanh(), 0.3, self.training)

        for number in range(4):
            x = recollect.checkpoint(layer, number, x) if self.recompute else layer(number, x)
        return x


class Dropping(Mean):
    def forward_layer(self, layer, x, adj_t, state):
        return super().forward_layer(layer, F.dropout(x, 0.3, self.training), adj_t, state)


@pools
@pytest.mark.parametrize("kind", [Mean, Dropping, Accumulating, Framed])
def test_recomputed_layers_give_the_same_and_push_once(kind, pool):
    data = make_graph()
    plain, framed = kind(**pool), kind(recompute=True, **pool)
    evaluated = []
    for batch in 2 * batches(data, 2):
        results = []
        for model in (plain, framed):
            torch.manual_seed(5)
            out = run(model, batch)
            before = pushes(model)
            results.append([out, *backward(model, out), *tables(model)] if kind is not Framed else [out])
            if kind is Framed:
                leaves = list(model.weights)
                results[-1] += [*torch.autograd.grad(out.sin().sum(), leaves), *tables(model)]
            assert pushes(model) == before
        assert_same(results[1], results[0])
        evaluated.append(before)
    assert evaluated == [[k, k, k] for k in range(1, len(evaluated) + 1)]


@pools
def test_a_frame_keeps_the_batchs_rows_and_not_the_halos(pool):
    """Of layers that save their input: what autograd holds between forward and backward."""
    sizes = {}
    for recompute in (False, True):
        model = Dropping(recompute=recompute, **pool)
        batch = batches(make_graph())[1]
        held: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.shape) or t, lambda t: t):
            run(model, batch)
        sizes[recompute] = held
    halo = len(batch.n_id)
    assert any(shape[0] == halo for shape in sizes[False])
    assert not any(shape[0] == halo and shape[1] in WIDTHS for shape in sizes[True])
    assert sum(shape.numel() for shape in sizes[True]) < sum(shape.numel() for shape in sizes[False]) / 2


@pools
def test_rows_that_were_pushed_again_before_backward_are_refused(pool):
    data = make_graph()
    model = Mean(recompute=True, **pool)
    first, second, *_ = batches(data)
    out = run(model, first)
    run(model, second)
    with pytest.raises(InPlaceError, match=r"\d+ of the \d+ halo rows that a mini-batch pulled in its forward pass"):
        backward(model, out)
    out = run(model, first)
    run(model, first)  # which is not in its own halo
    backward(model, out)


@pools
def test_the_whole_network_in_a_frame(pool):
    data = make_graph()
    plain, framed = Dropping(**pool), Dropping(**pool)
    for batch in 2 * batches(data, 2):
        results = []
        for model in (plain, framed):
            torch.manual_seed(5)
            inputs = (batch.data.x, batch.data.adj_t, *batch[1:])
            out = model(*inputs) if model is plain else recollect.checkpoint(model, *inputs)
            before = pushes(model)
            results.append([out, *backward(model, out), *tables(model)])
            assert pushes(model) == before
        assert_same(results[1], results[0])


def test_without_frames_two_forwards_may_come_before_two_backwards():
    model, data = Mean(), make_graph()
    first, second, *_ = batches(data)
    one, two = run(model, first), run(model, second)
    for out in (one, two):
        assert all(g.isfinite().all() for g in backward(model, out))


def test_backward_twice_and_double_backward():
    batch = batches(make_graph(), 2)[1]
    results = []
    for recompute in (False, True):
        model = Mean(recompute=recompute)
        out = run(model, batch).sin().sum()
        leaves = list(model.weights)
        once = torch.autograd.grad(out, leaves, retain_graph=True)
        twice = torch.autograd.grad(out, leaves, create_graph=True)
        results.append([*once, *twice, *torch.autograd.grad(sum(g.square().sum() for g in twice), leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    """A block of a reversible layer, which has a history of its own."""

    def __init__(self, model: ScalableGNN, history: int, channels: int) -> None:
        super().__init__()
        self.model = [model]  # not a child: it is the parent
        self.history = history
        self.lin = nn.Linear(2 * channels, channels, dtype=torch.float64)

    def forward(self, x: Tensor, adj_t: Tensor, *args: Any) -> Tensor:
        (model,) = self.model
        every = model.push_and_pull(model.histories[self.history], x, *args)
        out = self.lin(torch.cat([propagate(adj_t, every), x], -1)).tanh()
        return F.dropout(out, 0.2, self.training)


class Reversible(ScalableGNN):
    """Three grouped reversible layers: each group's blocks read their neighbours from a history."""

    def __init__(self, disable: bool, **options: Any) -> None:
        super().__init__(NODES, 3, 7, history_dtype=torch.float64, **options)
        torch.manual_seed(0)
        self.project = nn.Linear(IN, 6, dtype=torch.float64)
        self.layers = nn.ModuleList(
            GroupAddRev(nn.ModuleList([Block(self, 2 * k, 3), Block(self, 2 * k + 1, 3)]), disable=disable)
            for k in range(3)
        )
        self.head = nn.Linear(6, OUT, dtype=torch.float64)

    def forward(self, x: Tensor, adj_t: Tensor, *args: Any) -> Tensor:
        x = self.project(x)[: adj_t.size(0)]
        for layer in self.layers:
            x = layer(x, adj_t, *args)
        return self.head(x)


@pools
def test_a_stack_of_reversible_blocks(pool):
    data = make_graph()
    plain, reversible = Reversible(True, **pool), Reversible(False, **pool)
    for batch in 2 * batches(data, 2):
        results = []
        for model in (plain, reversible):
            torch.manual_seed(5)
            out = run(model, batch)
            before = pushes(model)
            results.append([out, *backward(model, out), *tables(model)])
            assert pushes(model) == before
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
