"""The check of a module's inverse on another device."""

import pytest
import torch
from torch import nn

from recollect import invertible as inn
from recollect.frames import settle
from recollect.reversible import GroupAddRev
from recollect.testing import check_invertible


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(0.3)

    def forward(self, x, graph):
        return self.dropout(self.linear(x))


class Shift(nn.Module):
    def __init__(self, back=1.0):
        super().__init__()
        self.by, self.back = nn.Parameter(torch.ones(4)), back

    def forward(self, x):
        return x + self.by

    def inverse(self, y):
        return y - self.back * self.by


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: inn.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)), ()),
        (lambda: GroupAddRev(Block(), num_groups=2), (None,)),
        (Shift, ()),
    ],
    ids=["invertible", "reversible", "own"],
)
def test_right_ones(other, make, arguments):
    torch.manual_seed(0)
    assert check_invertible(make().to(other), torch.randn(5, 4, device=other), *arguments)
    settle()


def test_a_wrong_inverse(other):
    with pytest.raises(AssertionError, match="inverse"):
        check_invertible(Shift(back=2.0).to(other), torch.randn(5, 4, device=other))
    settle()
