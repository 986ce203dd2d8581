"""Linear layers, those of torch_geometric too, and layers whose weights something else gives."""

import contextlib

import pytest
import torch
from rule_oracle import REGISTRY, apply, check, rows_form
from torch import nn
from torch.nn.utils import parametrize

from recollect.autogram._contract import gramian, with_bias
from recollect.autogram._factors import NotCovered
from recollect.autogram.rules import RULES


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("between", [(), (5,), (5, 2), (0,)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias, between, axes):
    check(nn.Linear(3, 4, bias).double(), torch.randn(2, *between, 3, dtype=torch.float64), axes=axes)


@pytest.mark.parametrize(("positions", "together"), [(1, True), (2, False)])
def test_a_bias_is_squared_with_its_weight_where_there_is_one_position(positions, together):
    layer = nn.Linear(64, 64)
    found = apply(layer, (torch.randn(300, positions, 64),), [torch.randn(300, positions, 64)])
    both = with_bias(found["weight"], found["bias"])
    assert (both is not None) == together
    if both is not None:
        apart = gramian([found["weight"]]) + gramian([found["bias"]])
        torch.testing.assert_close(gramian([both]), apart, rtol=1e-4, atol=1e-2)


def test_batch_axis_in_the_middle_and_no_batch():
    layer = nn.Linear(3, 4).double()
    check(layer, torch.randn(5, 2, 3, dtype=torch.float64), axes=(1,))
    check(layer, torch.randn(3, dtype=torch.float64))


def test_strides_do_not_matter():
    layer = nn.Linear(3, 4).double()
    check(layer, torch.randn(2, 3, 5, dtype=torch.float64).mT, axes=(0,))
    check(layer, torch.randn(2, 4, 5, 3, dtype=torch.float64).transpose(1, 2), axes=(0,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype, tolerance):
    check(nn.Linear(3, 4).to(dtype), torch.randn(2, 5, 3).to(dtype), axes=(0,), tolerance=tolerance)


def test_torch_geometric_s_linear():
    geometric = pytest.importorskip("torch_geometric.nn")
    check(geometric.Linear(3, 4).double(), torch.randn(6, 3, dtype=torch.float64))
    check(geometric.Linear(-1, 4, bias=False).double(), torch.randn(6, 3, dtype=torch.float64), axes=(0,))


def test_no_rule_for_a_forward_of_its_own():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    assert REGISTRY.find(Scaled) is None
    assert REGISTRY.find(Named) is RULES[nn.Linear]


GIVEN = {
    "linear": (lambda: nn.Linear(3, 4), "weight", (2, 3)),
    "convolution": (lambda: nn.Conv1d(3, 4, 2), "weight", (2, 3, 5)),
    "norm": (lambda: nn.LayerNorm(3), "bias", (2, 3)),
    "bilinear": (lambda: nn.Bilinear(3, 3, 4), "weight", (2, 3)),
    "prelu": (lambda: nn.PReLU(), "weight", (2, 3)),
    "embedding": (lambda: nn.Embedding(5, 4), "weight", (2, 3)),
    "bags": (lambda: nn.EmbeddingBag(5, 4), "weight", (2, 3)),
    "recurrent": (lambda: nn.GRU(3, 4), "weight_hh_l0", (5, 2, 3)),
}


class Counting(nn.Module):
    """A parametrization that notes how often it is asked, as one with a state of its own would."""

    asked = 0

    def forward(self, weight):
        self.asked += 1
        return 2 * weight


@pytest.mark.parametrize("name", GIVEN)
def test_a_parametrized_weight_is_left_alone(name):
    make, parameter, shape = GIVEN[name]
    layer, counting = make(), Counting()
    parametrize.register_parametrization(layer, parameter, counting)
    index = "embedding" in name or "bags" in name
    x = torch.randint(5, shape) if index else torch.randn(shape)
    inputs = (x, x) if name == "bilinear" else (x,)
    _, views, grads = rows_form(layer, inputs)
    before = counting.asked
    with contextlib.suppress(NotCovered):
        assert parameter not in apply(layer, views, grads)
    assert counting.asked == before
