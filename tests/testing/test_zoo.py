"""The zoo holds what it says: every hazard is there, and every module is invertible and takes part in gradients."""

import pytest
import torch

from recollect.testing._zoo import ZOO, _zoo


def test_the_hazards():
    assert set(ZOO) == {
        "batch norm", "called twice", "frozen branch", "hidden outputs", "in-place relu", "integers", "keywords",
        "no gradient", "not tensors", "output is a view", "output is the input", "plain", "shared parameters",
        "side effect", "two dropouts", "unused output",
    }  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_a_member(name):
    torch.manual_seed(0)
    module, make = ZOO[name](3)
    args = make(4)
    outputs = module(*args)
    assert [list(t.shape) for t in (*args[:2], *outputs[:2])] == [[4, 3]] * 4
    assert any(p.requires_grad for p in module.parameters())
    inputs = module.inverse(*module.eval().function(*args))
    for arg, back in zip(args, inputs, strict=True):
        assert torch.allclose(arg, back, atol=1e-4) if torch.is_tensor(arg) else arg is back
    assert ZOO[name](3)[0] is not module


def test_aliases_are_aliases():
    args = torch.randn(2, 3), torch.randn(2, 3)
    assert ZOO["output is the input"](3)[0](*args)[0] is args[0]
    view = ZOO["output is a view"](3)[0](*args)[1]
    assert view is not args[0]
    assert view.data_ptr() == args[0].data_ptr()
    shared = ZOO["shared parameters"](3)[0]
    assert shared.first.weight is shared.second.weight


def test_names_are_used_once():
    with pytest.raises(ValueError, match="the zoo has two of 'plain'"):
        _zoo("plain")(object)
