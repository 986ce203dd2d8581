"""Rows, masks and owners of tensors whose axes have losses in them, against a loop over the entries."""

import itertools

import pytest
import torch

from recollect.autogram._layout import Axis, Layout

LAYOUTS = {
    "an axis": ((3, 4), Layout((Axis(0, 3),))),
    "a later axis": ((2, 3, 4), Layout((Axis(1, 3),))),
    "outer part": ((6, 2), Layout((Axis(0, 3, 2),))),
    "inner part": ((6, 2), Layout((Axis(0, 3, 1),))),
    "middle part": ((2, 12), Layout((Axis(1, 3, 2),))),
    "two axes": ((3, 5, 4), Layout((Axis(0, 3), Axis(2, 4)))),
    "two axes, turned": ((3, 5, 4), Layout((Axis(2, 4), Axis(0, 3)))),
    "two parts of one": ((12, 2), Layout((Axis(0, 3, 4), Axis(0, 4)))),
    "two parts of one, turned": ((12, 2), Layout((Axis(0, 4), Axis(0, 3, 4)))),
    "parts of more": ((2, 24), Layout((Axis(1, 2, 2), Axis(1, 3, 4)))),
    "none": ((3, 4), Layout(())),
}


def owner(layout: Layout, index: tuple[int, ...]) -> int:
    number = 0
    for axis in layout.axes:
        number = number * axis.size + index[axis.dim] // axis.inner % axis.size
    return number


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_belongs_to_a_loss(name):
    shape, layout = LAYOUTS[name]
    tensor = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)
    each = [torch.zeros(shape) for _ in range(layout.batch)]
    for index in itertools.product(*map(range, shape)):
        each[owner(layout, index)][index] = tensor[index]
    owners = layout.owners(shape, tensor.device).expand(shape)
    for k, expected in enumerate(each):
        assert torch.equal(layout.mask(tensor, k), expected)
        assert torch.equal(torch.where(owners == k, tensor, 0.0), expected)
    assert torch.equal(layout.masks(tensor), torch.stack(each))
    if layout.axes:
        rows = layout.rows(tensor)
        assert list(rows.shape) == [layout.batch, *layout.left(shape)]
        for k, expected in enumerate(each):
            assert torch.equal(rows[k].flatten(), expected[expected > 0])
