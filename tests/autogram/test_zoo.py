"""The engine's Gramians on every member of the zoo, against the explicit Jacobian by plain autograd."""

from __future__ import annotations

import pytest
import torch
from autogram_zoo import build, explicit_gramian, explicit_jacobian, relative_error, run, trained
from autogram_zoo._cases import (
    EXACT,
    LIMITS,
    by_hand,
    each_case,
    each_member,
    each_refused,
    each_way,
    few,
)
from autogram_zoo._refused import Contrast, Neighbours
from forms import set_form
from torch import Tensor

from recollect.autogram import Engine

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


@each_case
def test_the_gramian_is_that_of_the_explicit_jacobian(kind, batch, batch_dim, dtype):
    made = build(kind, dtype)
    engine = Engine(*made.targets(), batch_dim=batch_dim)
    losses = run(made, batch, batch_dim)
    gramian = engine.compute_gramian(losses)
    assert gramian.shape == (*losses.shape, *reversed(losses.shape))
    assert gramian.dtype == dtype
    assert not gramian.requires_grad
    assert relative_error(gramian, by_hand(kind, batch, batch_dim, dtype)) <= LIMITS[dtype]


@each_way
def test_several_losses_for_each_element(kind, batch_dim):
    def more(losses: Tensor) -> Tensor:
        return torch.stack([losses, losses.sin() + losses], -1)

    made, other = build(kind), build(kind)
    engine = Engine(*made.targets(), batch_dim=batch_dim)
    gramian = engine.compute_gramian(more(run(made, few(kind), batch_dim)))
    expected = explicit_gramian(more(run(other, few(kind), batch_dim)), trained(other.targets()))
    assert relative_error(gramian, expected) <= EXACT


@pytest.mark.parametrize("how", ["at once", "in groups"])
@each_member
def test_losses_whose_passes_run_otherwise(kind, how, monkeypatch):
    """As they do on a GPU, where layers are small, and where rows are more than may be held."""
    if how == "at once":
        set_form(monkeypatch, small_layer=2**40)
    made = build(kind)
    engine = Engine(*made.targets(), row_bytes=1 if how == "in groups" else 2**28)
    gramian = engine.compute_gramian(run(made, few(kind), kind.batch_dims[0]))
    assert relative_error(gramian, by_hand(kind, few(kind), kind.batch_dims[0])) <= EXACT


@each_member
def test_the_squared_norm_of_a_gradient(kind):
    made, other = build(kind), build(kind)
    engine = Engine(*made.targets())
    found = engine.compute_gramian(run(made, few(kind), kind.batch_dims[0]).mean())
    assert found.shape == ()
    gradient = explicit_jacobian(run(other, few(kind), kind.batch_dims[0]).mean(), trained(other.targets()))
    assert float(found) == pytest.approx(float(gradient.square().sum()), rel=1e-10)


@each_refused
def test_dependent_elements_are_refused_with_the_name_of_the_module(kind):
    made = build(kind)
    engine, losses = Engine(*made.targets(), batch_dim=0), run(made, few(kind), 0)
    if kind in (Neighbours, Contrast):  # elements are moved along the batch, which may keep them apart: they go by rows
        assert relative_error(engine.compute_gramian(losses), by_hand(kind, few(kind), None)) <= EXACT
    else:
        with pytest.raises((ValueError, RuntimeError), match=kind.refused or None):
            engine.compute_gramian(losses)
    assert all(p.grad is None for p in made.parameters())
    # The model is unharmed: without a batch dimension the same engine class is right.
    gramian = Engine(*made.targets()).compute_gramian(run(made, few(kind), None))
    assert torch.isfinite(gramian).all()
