"""Dropout of four elements from one random number."""

import math

import pytest
import torch

from recollect.models._dropout import dropout, dropout_mask


@pytest.mark.parametrize("p", [0.1, 0.5, 0.6])
def test_the_share_of_zeros_is_p_and_the_mean_is_kept(p: float) -> None:
    torch.manual_seed(0)
    mask = dropout_mask(torch.empty(1000, 400, dtype=torch.float64), p)
    sigma = math.sqrt(p * (1 - p) / mask.numel())
    assert abs((mask == 0).double().mean().item() - p) < 4 * sigma
    assert abs(mask.mean().item() - 1) < 4 * sigma / (1 - p)
    kept = mask[mask != 0]
    assert torch.equal(kept, kept[:1].expand_as(kept))


def test_elements_of_one_random_number_are_independent() -> None:
    torch.manual_seed(0)
    drawn = (dropout_mask(torch.empty(200_000, 4), 0.5) != 0).double()
    assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 4 / math.sqrt(200_000)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (5, 3), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())  # the derivative is the mask, and so is the mask times one


def test_a_transposed_tensor_keeps_its_places() -> None:
    x = torch.arange(1.0, 13.0).view(3, 4).T
    y = dropout(x, 0.5)
    assert torch.equal(y[y != 0], 2 * x[y != 0])


def test_the_same_state_draws_the_same() -> None:
    x = torch.ones(100, 10)
    torch.manual_seed(3)
    first = dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(dropout(x, 0.5), first)


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_the_outermost_probabilities_stay_finite(p: float) -> None:
    assert torch.isfinite(dropout(torch.ones(1000), p)).all()


def test_nothing_is_drawn_outside_training_or_without_probability() -> None:
    x = torch.ones(10)
    state = torch.get_rng_state()
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_each_example_of_vmap_draws_its_own() -> None:
    x = torch.ones(4, 200)
    different = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="different")(x)
    assert len({tuple(row) for row in different.tolist()}) == 4
    same = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="same")(x)
    assert torch.equal(same, same[:1].expand(4, 200))
