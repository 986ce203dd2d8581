"""Which rule a layer gets."""

import pytest
from torch import nn

from recollect.autogram._registry import Entry, Registry


class Renamed(nn.Linear):
    """Its forward is its base's."""


class Overriding(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Registered(nn.Linear):
    pass


def no_rule(layer, inputs, grads):
    return {}


LINEAR = Entry(no_rule)


def test_the_type_itself():
    assert Registry({nn.Linear: LINEAR}).find(nn.Linear) is LINEAR


def test_a_type_without_a_rule():
    assert Registry({nn.Linear: LINEAR}).find(nn.Conv2d) is None


def test_a_subclass_with_its_bases_forward():
    assert Registry({nn.Linear: LINEAR}).find(Renamed) is LINEAR


def test_a_subclass_with_a_forward_of_its_own():
    assert Registry({nn.Linear: LINEAR}).find(Overriding) is None


def test_a_base_whose_forward_the_class_does_not_have():
    assert Registry({nn.Module: LINEAR}).find(nn.Linear) is None


def test_a_type_by_its_name():
    assert Registry({"torch.nn.modules.linear.Linear": LINEAR}).find(Renamed) is LINEAR


@pytest.mark.parametrize("known", [nn.Linear, "torch.nn.modules.linear.Linear"])
@pytest.mark.parametrize("patched", [nn.Linear, Renamed])
def test_a_forward_that_is_put_in_place_later_has_no_rule(known, patched, monkeypatch):
    registry = Registry({known: LINEAR})
    assert registry.find(Renamed) is LINEAR
    monkeypatch.setattr(patched, "forward", Overriding.forward)
    assert registry.find(Renamed) is None
    monkeypatch.undo()
    assert registry.find(Renamed) is LINEAR


def test_registering():
    registry = Registry({nn.Linear: LINEAR})
    assert registry.find(nn.Bilinear) is None
    entry = Entry(no_rule)
    registry.register(nn.Bilinear, entry)
    assert registry.find(nn.Bilinear) is entry


def test_a_subclass_may_have_a_rule_of_its_own():
    registry = Registry({nn.Linear: LINEAR})
    entry = Entry(no_rule)
    registry.register(Registered, entry)
    assert registry.find(Registered) is entry
    assert registry.find(Renamed) is LINEAR


NAME = "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize("first", [nn.Linear, NAME])
@pytest.mark.parametrize("second", [nn.Linear, NAME])
def test_a_second_rule_is_refused(first, second):
    registry = Registry({first: LINEAR})
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear has a rule already"):
        registry.register(second, LINEAR)
