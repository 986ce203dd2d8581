"""The engine on every member of the zoo, against the explicit Jacobian by plain autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from autogram_zoo import MEMBERS, Member, build, explicit_gramian, explicit_jacobian, relative_error, run, trained
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import recollect
from recollect.aggregation import Flattening, UPGradWeighting
from recollect.autogram import Engine

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4}
each_dtype = pytest.mark.parametrize("dtype", LIMITS, ids=["float64", "float32"])
each_member = pytest.mark.parametrize("kind", MEMBERS.values(), ids=MEMBERS)
each_refused = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=name) for name, kind in MEMBERS.items() if kind.refused is not None]
)
each_hard = pytest.mark.parametrize(
    ("kind", "batch", "batch_dim"),
    [
        pytest.param(kind, batch, dim, id=f"{name}-{batch}-{dim}")
        for name, kind in MEMBERS.items()
        for dim in kind.either
        for batch in kind.batches
    ],
)
each_way = pytest.mark.parametrize(
    ("kind", "batch_dim"),
    [pytest.param(kind, dim, id=f"{name}-{dim}") for name, kind in MEMBERS.items() for dim in kind.batch_dims],
)
each_case = pytest.mark.parametrize(
    ("kind", "batch", "batch_dim"),
    [
        pytest.param(kind, batch, dim, id=f"{name}-{batch}-{dim}")
        for name, kind in MEMBERS.items()
        for dim in kind.batch_dims
        for batch in kind.batches
    ],
)


def few(kind: type[Member]) -> int:
    """A batch of several elements, as small as the member allows."""
    return next(batch for batch in kind.batches if batch > 1)


def by_hand(kind: type[Member], batch: int, batch_dim: int | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Gramian of the explicit Jacobian, of a member of its own."""
    return _by_hand(kind, batch, 1 if batch_dim == 1 else 0, dtype)  # no dimension: the inputs are those of 0


@cache
def _by_hand(kind: type[Member], batch: int, batch_dim: int, dtype: torch.dtype) -> Tensor:
    made = build(kind, dtype)
    return explicit_gramian(run(made, batch, batch_dim), trained(made.targets()))


def engine_of(made: Member, batch_dim: int | None) -> Engine:
    return Engine(*made.targets(), batch_dim=batch_dim)


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


@each_dtype
@each_case
def test_the_gramian_is_that_of_the_explicit_jacobian(kind, batch, batch_dim, dtype):
    made = build(kind, dtype)
    engine = engine_of(made, batch_dim)
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
    engine = engine_of(made, batch_dim)
    gramian = engine.compute_gramian(more(run(made, few(kind), batch_dim)))
    expected = explicit_gramian(more(run(other, few(kind), batch_dim)), trained(other.targets()))
    assert relative_error(gramian, expected) <= LIMITS[torch.float64]


@each_member
def test_the_squared_norm_of_a_gradient(kind):
    made, other = build(kind), build(kind)
    engine = engine_of(made, None)
    found = engine.compute_gramian(run(made, few(kind), kind.batch_dims[0]).mean())
    assert found.shape == ()
    gradient = explicit_jacobian(run(other, few(kind), kind.batch_dims[0]).mean(), trained(other.targets()))
    assert float(found) == pytest.approx(float(gradient.square().sum()), rel=1e-10)


@each_way
def test_a_training_step_is_that_of_the_explicit_jacobian(kind, batch_dim):
    made, other = build(kind), build(kind)
    weights = engine_of(made, batch_dim).backward(
        losses := run(made, few(kind), batch_dim), Flattening(UPGradWeighting())
    )
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
    engine = engine_of(made, batch_dim)
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
    assert relative_error(again, by_hand(kind, few(kind), batch_dim)) <= LIMITS[torch.float64]
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
    engine = engine_of(made, batch_dim)
    for batch in (few(kind), kind.batches[0], few(kind)):
        gramian = engine.compute_gramian(run(made, batch, batch_dim))
        expected = explicit_gramian(run(other, batch, batch_dim), trained(other.targets()))
        assert relative_error(gramian, expected) <= LIMITS[torch.float64]
        for network in (made, other):
            with torch.no_grad():
                for p in network.parameters():
                    p.mul_(0.9)
            parameter = next(network.targets()[0].parameters())
            if len(trained(network.targets())) > 1 or not parameter.requires_grad:
                parameter.requires_grad_(not parameter.requires_grad)


@each_refused
def test_dependent_elements_are_refused_with_the_name_of_the_module(kind):
    made = build(kind)
    with pytest.raises((ValueError, RuntimeError), match=kind.refused or None):
        engine_of(made, 0).compute_gramian(run(made, few(kind), 0))
    assert all(p.grad is None for p in made.parameters())
    # The model is unharmed: without a batch dimension the same engine class is right.
    gramian = engine_of(made, None).compute_gramian(run(made, few(kind), None))
    assert torch.isfinite(gramian).all()


@each_hard
def test_a_batch_that_is_hard_to_see_is_seen_or_refused(kind, batch, batch_dim):
    made = build(kind)
    engine = engine_of(made, batch_dim)
    losses = run(made, batch, batch_dim)
    refusal = None
    try:
        gramian = engine.compute_gramian(losses)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert relative_error(gramian, by_hand(kind, batch, batch_dim)) <= LIMITS[torch.float64]
    else:
        assert "batch_dim=None" in refusal  # what to do instead
