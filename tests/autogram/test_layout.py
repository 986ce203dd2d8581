"""Where a tensor has the batch, found from how its gradient grows."""

import pytest
import torch

from recollect.autogram._layout import Layout, find_layouts, is_scattered, prefer, slice_sizes

FACTORS = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)  # of squares: the losses grew by 1, 2 and 4


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def layouts_of(grad, owners, dim):
    """The layouts of a gradient whose slices along one axis belong to these elements of a batch of three."""
    shape = [-1 if k == dim else 1 for k in range(grad.dim())]
    scaled = grad * FACTORS.sqrt()[torch.tensor(owners) % 3].view(shape)
    return find_layouts([slice_sizes(grad, 3), slice_sizes(scaled, 3)], [FACTORS])


@pytest.mark.parametrize(
    ("shape", "dim", "owners", "expected"),
    [
        ((3, 4), 0, [0, 1, 2], Layout(0)),
        ((3, 3), 0, [0, 1, 2], Layout(0)),
        ((3, 3), 1, [0, 1, 2], Layout(1)),
        ((2, 3, 3), 2, [0, 1, 2], Layout(2)),
        ((6, 4), 0, [0, 0, 1, 1, 2, 2], Layout(0)),
        ((6, 4), 0, [0, 1, 2, 0, 1, 2], Layout(0, outer=False)),
        ((3,), 0, [0, 1, 2], Layout(0)),
    ],
)
def test_the_batch_is_found(shape, dim, owners, expected):
    assert layouts_of(draw(*shape), owners, dim) == {expected}


@pytest.mark.parametrize("owners", [[1, 0, 2], [0, 1, 1], [0, 0, 0]])
def test_elements_in_another_order_are_not_the_batch(owners):
    assert layouts_of(draw(3, 4), owners, 0) == set()


def test_rows_that_start_late_are_not_the_batch():
    """Three losses of six rows, one behind another: no layout has them."""
    grad = draw(6, 4)
    grad[[0, 4, 5]] = 0
    assert layouts_of(grad, [0, 0, 1, 2, 0, 0], 0) == set()


def test_slices_without_a_gradient_say_nothing():
    grad = draw(6, 4)
    grad[1::2] = 0
    assert layouts_of(grad, [0, 1, 1, 2, 2, 0], 0) == {Layout(0)}


def test_a_gradient_that_mixes_elements():
    first = draw(3, 4)
    mixed = draw(3, 3) @ (FACTORS.sqrt().unsqueeze(1) * first)
    assert find_layouts([slice_sizes(draw(3, 3) @ first, 3), slice_sizes(mixed, 3)], [FACTORS]) == set()


def test_several_layouts_fit_where_few_slices_have_a_gradient():
    grad = draw(9, 4)
    grad[[1, 2, 3, 5, 6, 7]] = 0
    assert layouts_of(grad, [0, 9, 9, 9, 1, 9, 9, 9, 2], 0) == {Layout(0), Layout(0, outer=False)}


@pytest.mark.parametrize(
    ("owners", "expected"),
    [([1, 0, 2], True), ([2, 2, 1, 1, 0, 0], True), ([0, 0, 0, 1, 1], True), ([2, 0, 0, 0], True), ([0, 1, 3], False)],
)
def test_entries_that_belong_to_one_element_each(owners, expected):
    """Element 3 is none of the batch."""
    grad = draw(len(owners), 2)
    scaled = grad * torch.tensor([1.0, 2, 4, 8], dtype=torch.float64)[owners, None]
    assert is_scattered([slice_sizes(grad, 3), slice_sizes(scaled, 3)], [FACTORS]) is expected


def test_mixed_entries_belong_to_none():
    grad = draw(3, 2)
    mixed = (draw(3, 3) + torch.eye(3)) @ (grad * FACTORS.sqrt()[:, None])
    assert not is_scattered([slice_sizes(grad, 3), slice_sizes(mixed, 3)], [FACTORS])


def test_no_gradient():
    zeros = slice_sizes(torch.zeros(3, 4), 3)
    assert find_layouts([zeros, zeros], [FACTORS]) is None


def test_no_axis_for_the_batch():
    assert find_layouts([slice_sizes(draw(4, 5), 3)] * 2, [FACTORS]) == set()


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(Layout(0), (3, 4)), (Layout(1), (5, 3, 2)), (Layout(0), (6, 4)), (Layout(0, outer=False), (6, 4)),
     (Layout(1, outer=False), (2, 6, 4))],
)  # fmt: skip
def test_rows_and_masks(layout, shape):
    tensor = draw(*shape)
    rows = layout.rows(tensor, 3)
    assert rows.shape[0] == 3
    assert rows.shape[1:] == (*shape[: layout.dim], shape[layout.dim] // 3, *shape[layout.dim + 1 :])
    masked = [layout.mask(tensor, 3, i) for i in range(3)]
    torch.testing.assert_close(sum(masked), tensor)
    for i, part in enumerate(masked):
        assert torch.equal(layout.rows(part, 3)[i], rows[i])
        owners = layout.spread(torch.arange(3), shape[layout.dim])
        kept = part.movedim(layout.dim, 0).flatten(1).any(1)
        assert torch.equal(kept, owners == i)


def test_the_likeliest_of_several():
    several = {Layout(0), Layout(1), Layout(2)}
    assert prefer(several, (6, 3, 3), 3, 2) == Layout(2)
    assert prefer(several, (6, 3, 3), 3, 0) == Layout(1)
    assert prefer({Layout(0, outer=False), Layout(0)}, (6, 2), 3, 0) == Layout(0)
