import pytest
from torch import nn

from recollect._modules import check_unhooked, in_evaluation


def test_modes_are_given_back_whatever_they_were():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    modes = [part.training for part in model.modules()]

    def failing():
        with in_evaluation(model):
            assert not any(part.training for part in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize(
    ("register", "kind", "backward"),
    [
        ("register_forward_hook", "forward_hooks", False),
        ("register_forward_pre_hook", "forward_pre_hooks", False),
        ("register_full_backward_hook", "backward_hooks", True),
        ("register_full_backward_pre_hook", "backward_pre_hooks", True),
    ],
)
def test_hooks_are_named(register, kind, backward):
    model = nn.Sequential(nn.Linear(2, 2))
    check_unhooked([("it", model), ("its part", model[0])], backward=True)
    getattr(model[0], register)(lambda module, *args: None)
    check_unhooked([("it", model)], backward=True)
    with pytest.raises(ValueError, match=rf"its part \(Linear\) has {kind}, which are not called"):
        check_unhooked([("its part", model[0])], backward=True)
    if backward:
        check_unhooked([("its part", model[0])])
