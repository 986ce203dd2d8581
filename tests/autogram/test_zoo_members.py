"""The zoo before any engine: each member runs, has a gradient, and is as independent as it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from autogram_zoo import (
    MEMBERS,
    Member,
    build,
    explicit_gramian,
    explicit_jacobian,
    member,
    relative_error,
    run,
    trained,
)
from torch import Tensor

each_member = pytest.mark.parametrize("kind", MEMBERS.values(), ids=MEMBERS.keys())


def changed(value: Any, batch_dim: int) -> Any:
    """Change the first two of three elements."""
    if not isinstance(value, Tensor) or value.dim() <= batch_dim:
        return value
    value = value.detach().clone()
    part = value.narrow(batch_dim, 0, 2)
    part.copy_(part.cos() if value.is_floating_point() else part.max() - part)
    return value


def is_independent(kind: type[Member], batch_dim: int) -> bool:
    """Whether changed elements change their own losses, and nobody else's."""

    def losses(change: bool) -> Tensor:
        made = build(kind)
        args, kwargs = made.inputs(3, batch_dim)
        if change:
            args = tuple(changed(a, batch_dim) for a in args)
            kwargs = {key: changed(a, batch_dim) for key, a in kwargs.items()}
        torch.manual_seed(1)
        return made.losses(made(*args, **kwargs)).detach()

    difference = (losses(True) - losses(False)).abs()
    own, others = difference.split([2, 1], batch_dim)
    assert float(own.max()) > 1e-6
    return float(others.max()) < 1e-12


def test_there_are_enough():
    assert len(MEMBERS) >= 45
    with pytest.raises(ValueError, match="two members named Chain"):
        member(type("Chain", (Member,), {}))


@each_member
def test_a_member_says_its_hazard(kind):
    assert kind.__doc__ not in (None, *(base.__doc__ for base in kind.__mro__[1:]))


@each_member
def test_a_member_has_gradients(kind):
    for batch_dim in kind.batch_dims:
        for batch in kind.batches:
            made = build(kind)
            losses = run(made, batch, batch_dim)
            assert losses.dtype == torch.float64
            assert losses.dim() >= 1
            assert batch_dim is None or losses.shape[batch_dim] == batch
            assert torch.isfinite(losses).all()
        jacobian = explicit_jacobian(losses, trained(made.targets()))
        assert torch.isfinite(jacobian).all()
        assert jacobian.count_nonzero() > jacobian.numel() / 20
        assert jacobian.norm() > 1e-3


@each_member
def test_a_member_is_the_same_each_time(kind):
    batch_dim, batch = kind.batch_dims[0], kind.batches[0]
    first, again = (run(build(kind), batch, batch_dim) for _ in range(2))
    assert torch.equal(first, again)


@each_member
def test_a_member_is_as_independent_as_it_says(kind):
    for batch_dim in kind.batch_dims:
        if batch_dim is not None and kind.aligned:
            assert is_independent(kind, batch_dim)
    if kind.refused is not None:
        assert not is_independent(kind, 0)


def test_the_explicit_gramian():
    """By hand: losses a·w and 2 (b·w) have gradients a and 2 b."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    unused = torch.nn.Parameter(torch.ones(3))
    rows = torch.tensor([[1.0, 2.0], [6.0, 8.0]])
    assert torch.equal(explicit_gramian(rows @ w, [w, unused]), (rows @ rows.T).double())
    four = torch.stack([rows @ w, 10 * (rows @ w)])  # [2, 2]; the Gramian's last axes are in reverse
    gramian = explicit_gramian(four, [w])
    assert gramian.shape == (2, 2, 2, 2)
    assert gramian[0, 0, 1, 1] == 10 * (rows[0] @ rows[1])
    assert gramian[0, 1, 0, 1] == 10 * (rows[1] @ rows[0])
    assert gramian[0, 1, 1, 0] == rows[1] @ rows[1]
    assert gramian[1, 0, 0, 1] == 100 * (rows[0] @ rows[0])


def test_the_relative_error_sees_small_gradients():
    gramian = torch.tensor([[1.0, 0.0], [0.0, 1e-8]], dtype=torch.float64)
    assert relative_error(gramian, gramian) == 0
    wrong = gramian.clone()
    wrong[1, 1] *= 1.5  # invisible to a norm
    assert relative_error(wrong, gramian) == pytest.approx(0.5)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_error(torch.ones(()), torch.tensor(2.0)) == pytest.approx(0.5)
