"""Fingerprints of several small tensors, taken in one go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import recollect
from recollect.frames import RebuildError, certificate_of_process
from recollect.frames._joint import LARGEST, Joint, is_small

SHAPES = [(3,), (4, 8), (2, 3, 5), (509,), (), (7, 7)]


def tensors(dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {2 * i + 1: torch.randn(shape, generator=generator, dtype=dtype) for i, shape in enumerate(SHAPES)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_tensors_are_equal_whichever_of_them_are_there(dtype: torch.dtype) -> None:
    joint, again = Joint(tensors(dtype)), tensors(dtype)
    assert joint.compare(again) == (len(SHAPES), [])
    for index, tensor in again.items():
        assert joint.compare({index: tensor}) == (1, [])
    assert joint.compare({3: again[3], 9: again[9], 100: torch.ones(3)}) == (2, [])
    assert joint.compare({}) == (0, [])


def test_the_order_of_memory_does_not_count() -> None:
    joint, again = Joint(tensors()), tensors()
    again[3] = again[3].t().contiguous().t()
    again[5] = again[5].transpose(0, 2).contiguous().transpose(0, 2)
    assert joint.compare(again) == (len(SHAPES), [])


@pytest.mark.parametrize("alone", [False, True])
def test_errors_are_those_of_each_tensor(alone: bool) -> None:
    """Two of very different norms: four projections estimate each one's own error to within a factor."""
    given = tensors(torch.float64)
    given[3] *= 1e-5
    joint = Joint(given)
    again = {index: tensor.clone() for index, tensor in given.items()}
    again[3] += 1e-9 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    again[7][5] += 1.0
    expected = {index: ((again[index] - given[index]).norm() / given[index].norm()).item() for index in (3, 7)}
    equal, unequal = joint.compare({index: again[index] for index in (3, 7)} if alone else again)
    assert equal == (0 if alone else len(SHAPES) - 2)
    assert {index for index, _ in unequal} == {3, 7}
    for index, error in unequal:
        assert expected[index] / 4 < error < 4 * expected[index]


def test_what_changes_places_differs() -> None:
    given = tensors()
    joint = Joint(given)
    _, unequal = joint.compare({**given, 3: given[3].flip(0)})
    assert [index for index, _ in unequal] == [3]
    assert unequal[0][1] > 0.1


def test_what_is_not_finite_or_hides_others_is_wild() -> None:
    given = tensors()
    assert Joint(given).wild() == []
    given[1][0] = math.inf
    given[5][1, 2, 3] = math.nan
    given[7][9] = -1e30
    assert Joint(given).wild() == [1, 5, 7]


def test_kinds_that_are_not_small() -> None:
    assert is_small(torch.ones(LARGEST))
    for other in (
        torch.ones(LARGEST + 1),
        torch.ones(0),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, device="meta"),
        torch.eye(3).to_sparse(),
        nn.Parameter(torch.ones(3)),
    ):
        assert not is_small(other)


def test_another_kind_of_the_same_values_is_compared_too() -> None:
    given = tensors()
    joint = Joint(given)
    assert joint.compare({**given, 3: nn.Parameter(given[3])}) == (len(SHAPES), [])
    _, unequal = joint.compare({**given, 3: nn.Parameter(given[3] + 1)})
    assert [index for index, _ in unequal] == [3]


def many(x: Tensor, scale: float = 1.0) -> Tensor:
    for i in range(12):
        x = torch.tanh(x) * (scale if i == 7 else 1.0)
    return x


def test_a_region_of_many_small_tensors_is_certified() -> None:
    certificate_of_process.reset()
    x = torch.randn(5, 3, requires_grad=True)
    recollect.checkpoint(many, x).sum().backward()
    assert certificate_of_process.equal == 12
    assert certificate_of_process.rounded == 0
    (expected,) = torch.autograd.grad(many(x).sum(), x)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("factor", [1 + 1e-6, 1.001])
def test_one_that_differs_is_found_among_many(factor: float) -> None:
    scale = [1.0]
    x = torch.randn(5, 3, requires_grad=True)
    certificate_of_process.reset()
    y = recollect.checkpoint(lambda x: many(x, scale[0]), x)
    scale[0] = factor
    if factor > 1.0001:
        with pytest.raises(RebuildError, match=r"saved tensor 8, float32\[5, 3\] on cpu, has other values"):
            y.sum().backward()
    else:
        y.sum().backward()
        assert (certificate_of_process.equal, certificate_of_process.rounded) == (8, 4)


def test_infinities_among_many() -> None:
    def region(x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(x)
        return (x / 0.0).exp() + many(x)

    x = torch.linspace(-1, 1, 8).requires_grad_()
    (expected,) = torch.autograd.grad(region(x).sum(), x)
    (found,) = torch.autograd.grad(recollect.checkpoint(region, x).sum(), x)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_change_in_place_of_one_that_is_held_is_an_error_as_in_autograd() -> None:
    def region(x: Tensor) -> Tensor:
        a, b, c = x.exp(), x.sin().exp(), x.cos().exp()
        a.mul_(2)
        return (a.sum() + b.sum() + c.sum()) * 1

    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        region(x).backward()
    with pytest.raises(recollect.frames.InPlaceError, match="changes in place a tensor of shape"):
        recollect.checkpoint(region, x).backward()


def test_more_than_are_held_at_a_time() -> None:
    def region(x: Tensor) -> Tensor:
        return many(many(x))

    certificate_of_process.reset()
    x = torch.randn(20, 24, dtype=torch.float64, requires_grad=True)
    recollect.checkpoint(region, x).sum().backward()
    assert certificate_of_process.equal == 24
    assert certificate_of_process.rounded == 0


def test_two_types_in_turn() -> None:
    def region(x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(torch.tanh(x.double()).float())
        return x

    certificate_of_process.reset()
    x = torch.randn(6, requires_grad=True)
    (expected,) = torch.autograd.grad(region(x).sum(), x)
    (found,) = torch.autograd.grad(recollect.checkpoint(region, x).sum(), x)
    assert torch.equal(found, expected)
    assert certificate_of_process.equal == 8
