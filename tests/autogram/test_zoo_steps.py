"""Training steps with the engine, on every member of the zoo: what they change, and what they leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from autogram_zoo import build, explicit_gramian, explicit_jacobian, relative_error, run, trained
from autogram_zoo._cases import EXACT, by_hand, each_member, each_way, few
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import recollect
from recollect.aggregation import Flattening, UPGradWeighting
from recollect.autogram import Engine

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


@contextmanager
def calls() -> Iterator[list[str]]:
    """The kinds of modules that are called, but for those that a frame calls to rebuild what it dropped."""
    called: list[str] = []

    def note(module: nn.Module, args: Any) -> None:
        if not recollect.in_backward():
            called.append(type(module).__name__)

    handle = register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()


@each_way
def test_a_training_step_is_that_of_the_explicit_jacobian(kind, batch_dim):
    made, other = build(kind), build(kind)
    engine = Engine(*made.targets(), batch_dim=batch_dim)
    losses = run(made, few(kind), batch_dim)
    weights = engine.backward(losses, Flattening(UPGradWeighting()))
    assert weights.shape == losses.shape
    torch.optim.SGD(made.parameters(), lr=0.1).step()

    parameters = trained(other.targets())
    jacobian = explicit_jacobian(run(other, few(kind), batch_dim), parameters)
    update = UPGradWeighting()(jacobian @ jacobian.T) @ jacobian
    moved = torch.cat([(p - q).flatten() for p, q in zip(trained(made.targets()), parameters, strict=True)])
    assert float((moved.detach() + 0.1 * update).norm()) <= 1e-8 * float(update.norm())


@each_way
def test_the_step_is_left_as_it_was(kind, batch_dim):
    made, other = build(kind), build(kind)
    engine = Engine(*made.targets(), batch_dim=batch_dim)
    with calls() as called:
        losses = run(made, few(kind), batch_dim)
        engine.compute_gramian(losses)
    state = torch.get_rng_state()
    with calls() as expected:
        plain = run(other, few(kind), batch_dim)
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn
    assert torch.equal(losses, plain)
    assert called == expected or kind.reruns
    assert all(p.grad is None for p in made.parameters())
    buffers, plain_buffers = dict(made.named_buffers()), dict(other.named_buffers())
    assert buffers.keys() == plain_buffers.keys()
    assert all(torch.equal(buffers[name], plain_buffers[name]) for name in buffers)
    assert made.state_dict().keys() == other.state_dict().keys()

    again = engine.compute_gramian(losses)  # the graph is still there
    assert relative_error(again, by_hand(kind, few(kind), batch_dim)) <= EXACT
    losses.sum().backward()
    plain.sum().backward()
    for p, q in zip(made.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            assert float((p.grad - q.grad).norm()) <= 1e-10 * max(float(q.grad.norm()), 1.0)


@each_member
def test_the_next_step_is_as_good_as_the_first(kind):
    """Weights change, and what the user freezes; nothing of the step before may be left."""
    made, other = build(kind), build(kind)
    batch_dim = kind.batch_dims[0]
    engine = Engine(*made.targets(), batch_dim=batch_dim)
    for batch in (few(kind), kind.batches[0], few(kind)):
        gramian = engine.compute_gramian(run(made, batch, batch_dim))
        expected = explicit_gramian(run(other, batch, batch_dim), trained(other.targets()))
        assert relative_error(gramian, expected) <= EXACT
        for network in (made, other):
            with torch.no_grad():
                for p in network.parameters():
                    p.mul_(0.9)
            parameter = next(network.targets()[0].parameters())
            if len(trained(network.targets())) > 1 or not parameter.requires_grad:
                parameter.requires_grad_(not parameter.requires_grad)
