"""Settings are checked when they are given and when they are assigned; what is refused is not kept."""

import math
from typing import Any

import pytest
import torch
from weight_inputs import weightings

import recollect.aggregation
from recollect.aggregation import (
    CAGradWeighting,
    ConstantWeighting,
    Flattening,
    GaussNewtonWeighting,
    KrumWeighting,
    MeanWeighting,
    NashMTLWeighting,
    UPGradWeighting,
    Weighting,
)

NEGATIVE = [(-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), (None, TypeError), (True, TypeError)]
VECTOR = [(torch.ones(2, 2), ValueError), (torch.ones(0), ValueError), (torch.tensor([1.0, math.nan]), ValueError)]
GENERATOR = [(0, TypeError), ("cpu", TypeError)]

# What each setting refuses.
WRONG: dict[str, list[Any]] = {
    "reg_eps": [*NEGATIVE, (math.inf, ValueError)],
    "c": [*NEGATIVE, (math.inf, ValueError)],
    "norm_eps": NEGATIVE,
    "max_norm": NEGATIVE,
    "alpha": NEGATIVE,
    "beta": [*NEGATIVE, (1.01, ValueError)],
    "eps": [*NEGATIVE, (0, ValueError)],
    "gamma": [*NEGATIVE, (0.0, ValueError)],
    "rho": NEGATIVE,
    "lr": [*NEGATIVE, (0.0, ValueError)],
    "momentum": [*NEGATIVE, (1.0, ValueError)],
    "n_iter": [(0, ValueError), (1.5, TypeError), (None, TypeError)],
    "lambda_": NEGATIVE,
    "damping": [*NEGATIVE, (math.inf, ValueError)],
    "n_byzantine": [(-1, ValueError), (0.5, TypeError)],
    "n_selected": [(0, ValueError), (2.0, TypeError)],
    "scale_mode": [("max", ValueError), (None, ValueError)],
    "pref_vector": [*VECTOR, (torch.tensor([1.0, -2.0]), ValueError), ([1.0, 2.0], TypeError)],
    "weights": [*VECTOR, (None, TypeError), ([1.0], TypeError)],
    "initial_weights": [*VECTOR, ([1.0], TypeError)],
    "weighting": [(UPGradWeighting, TypeError), (1, TypeError), (GaussNewtonWeighting(1.0), TypeError)],
    "generator": GENERATOR,
}
MADE = {**weightings(3), "Gauss-Newton": GaussNewtonWeighting(1.0)}
SETTINGS = [(name, setting) for name, weighting in MADE.items() for setting in type(weighting)._settings]


def arguments(weighting):
    return {setting: getattr(weighting, setting) for setting in type(weighting)._settings}


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_settings_are_checked_when_they_are_assigned_as_when_they_are_given(name, setting):
    weighting = MADE[name]
    before = getattr(weighting, setting)
    for value, error in WRONG[setting]:
        with pytest.raises(error, match=setting) as assigned:
            setattr(weighting, setting, value)
        assert getattr(weighting, setting) is before
        with pytest.raises(error) as given:
            type(weighting)(**{**arguments(weighting), setting: value})
        assert str(given.value) == str(assigned.value)


@pytest.mark.parametrize("name", MADE)
def test_all_that_a_constructor_takes_is_a_setting(name):
    weighting = MADE[name]
    kind = type(weighting)
    named = kind.__init__.__code__.co_varnames[1 : 1 + kind.__init__.__code__.co_argcount - 1]
    keywords = kind.__init__.__code__.co_kwonlyargcount
    taken = {*named, *kind.__init__.__code__.co_varnames[1 + len(named) : 1 + len(named) + keywords]}
    assert taken - {"args", "kwargs"} == set(kind._settings)
    type(weighting)(**arguments(weighting))  # what it has is allowed


def test_what_is_assigned_counts():
    gramian = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    weighting = NashMTLWeighting()
    weighting.max_norm = 0.0
    assert weighting(gramian).equal(NashMTLWeighting(0.0)(gramian))
    weighting = UPGradWeighting()
    weighting.pref_vector = torch.tensor([0.0, 1.0, 0.0])
    assert weighting(gramian).equal(UPGradWeighting(torch.tensor([0.0, 1.0, 0.0]))(gramian))
    weighting.pref_vector = None
    assert weighting(gramian).equal(UPGradWeighting()(gramian))


def test_zero_dimensional_tensors_are_numbers():
    assert NashMTLWeighting(torch.tensor(2.0)).max_norm == 2.0
    with pytest.raises(ValueError, match="must not be negative"):
        CAGradWeighting(torch.tensor(-1.0))
    assert KrumWeighting(torch.tensor(1)).n_byzantine == 1


def test_parameters_are_kept_without_history():
    weighting = ConstantWeighting(torch.nn.Parameter(torch.ones(2)))
    weighting.weights = torch.nn.Parameter(torch.zeros(2))
    assert not list(weighting.parameters())
    assert not weighting.weights.requires_grad


class Method(NashMTLWeighting, settings={"rate": lambda name, value: abs(value)}):
    def __init__(self, c, rate=-2):
        super().__init__()
        self.c = c  # no setting of this method, though of another one
        self.rate = rate


def test_methods_of_ones_own():
    method = Method(-1.0)
    method.c, method.other = "anything", -1
    assert (method.c, method.other, method.rate) == ("anything", -1, 2)
    with pytest.raises(ValueError, match="max_norm"):
        method.max_norm = -1.0

    class Plain(Weighting):
        max_norm = -1.0

        def weigh(self, gramian):
            return gramian[0]

    plain = Plain()
    plain.reg_eps = plain.max_norm = -5
    assert plain.max_norm == -5


def test_methods_inherit_settings_of_all_their_bases():
    class Both(recollect.aggregation.GradVac, recollect.aggregation.CAGrad):
        pass

    assert {"beta", "eps", "c", "norm_eps", "generator"} == set(Both._settings)


@pytest.mark.parametrize("weighting", [UPGradWeighting, None])
def test_flattening_is_of_something_to_call(weighting):
    with pytest.raises(TypeError, match="weighting must be an object that can be called"):
        Flattening(weighting)
    flattening = Flattening(MeanWeighting())
    with pytest.raises(TypeError, match="weighting must be an object that can be called"):
        flattening.weighting = weighting
