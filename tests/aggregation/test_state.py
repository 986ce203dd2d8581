"""Weightings with a memory: what they remember is saved, loaded, forgotten, and untouched by calls that fail."""

import copy
import pickle

import pytest
import torch
from weight_inputs import gram, normal, square, weightings

from recollect.aggregation import (
    CRMOGMWeighting,
    GaussNewtonWeighting,
    MeanWeighting,
    MoDoWeighting,
    SumWeighting,
    UPGradWeighting,
)

STATEFUL = ["GradVac", "MoDo", "SDMGrad", "CR-MOGM"]


def make(name):
    weighting = weightings(5)[name]
    if name == "GradVac":
        weighting.generator = None
    return weighting


def called(weighting, seed):
    torch.manual_seed(seed)
    return weighting(gram(square(5, seed=seed)))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_run_goes_on_from_its_state(name):
    weighting, copied, other = make(name), None, make(name)
    for seed in range(3):
        called(weighting, seed)
    saved = weighting.state_dict()
    assert [key.split(".")[-1] for key in saved] == ["state"]
    copied = [copy.deepcopy(weighting), pickle.loads(pickle.dumps(weighting))]
    called(other, 9)  # what it remembers is replaced
    other.load_state_dict(saved)
    fresh = make(name)
    fresh.load_state_dict(pickle.loads(pickle.dumps(saved)))
    expected = called(weighting, 3)
    assert not called(make(name), 3).equal(expected)
    assert all(called(twin, 3).equal(expected) for twin in (*copied, other, fresh))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_from_before_the_first_call(name):
    weighting, expected = make(name), called(make(name), 0)
    saved = make(name).state_dict()
    assert not saved
    called(weighting, 1)
    weighting.load_state_dict(saved)
    assert weighting.state is None
    assert called(weighting, 0).equal(expected)


@pytest.mark.parametrize("name", STATEFUL)
def test_reset_forgets(name):
    weighting, expected = make(name), called(make(name), 0)
    called(weighting, 1)
    weighting.reset()
    assert called(weighting, 0).equal(expected)
    weighting.reset()
    assert weighting(torch.eye(3)).shape == (3,)


@pytest.mark.parametrize("name", STATEFUL)
def test_objectives_may_not_change_unsaid(name):
    weighting = make(name)
    called(weighting, 0)
    before = weighting.state.clone()
    with pytest.raises(ValueError, match=r"remembers 5 objectives, and the Gramian has 3: call reset\(\)"):
        weighting(torch.eye(3))
    with pytest.raises(ValueError, match="not finite"):
        weighting(torch.full((5, 5), torch.nan))
    assert weighting.state.equal(before)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_is_of_full_precision_and_its_own(name):
    weighting = make(name)
    weights = weighting(gram(square(5)).bfloat16())
    assert weighting.state.dtype == torch.float64
    before = weighting.state.clone()
    weights.zero_()
    assert weighting.state.equal(before)
    weights = weighting(gram(square(5)))
    before = weighting.state.clone()
    weights.zero_()
    assert weighting.state.equal(before)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_is_found_within_other_modules(name):
    holder = torch.nn.ModuleDict({"weighting": make(name)})
    called(holder["weighting"], 0)
    fresh = torch.nn.ModuleDict({"weighting": make(name)})
    fresh.load_state_dict(holder.state_dict())
    assert fresh["weighting"].state is None or fresh["weighting"].state.equal(holder["weighting"].state)
    assert called(fresh["weighting"], 1).equal(called(holder["weighting"], 1))


@pytest.mark.parametrize("initial", [None, torch.tensor([1.0, -1.0])])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_cr_mogm_is_a_moving_average(initial, alpha):
    given = [normal(2, seed=seed) for seed in range(4)]
    weighting = CRMOGMWeighting(lambda gramian: given[int(gramian[0, 0])], alpha, initial)
    last = given[0] if initial is None else initial.double()
    for k, weights in enumerate(given):
        last = alpha * last + (1 - alpha) * weights
        torch.testing.assert_close(weighting(k * torch.eye(2).double()), last, rtol=1e-14, atol=1e-14)


def test_cr_mogm_forgets_for_what_it_wraps_too():
    inner = MoDoWeighting()
    weighting = CRMOGMWeighting(inner)
    weighting(torch.ones(2, 2).triu())  # a cross-Gramian, as the wrapped weighting takes it
    assert set(weighting.state_dict()) == {"state", "weighting.state"}
    weighting.reset()
    assert inner.state is None
    with pytest.raises(ValueError, match="symmetric"):
        CRMOGMWeighting(UPGradWeighting())(torch.ones(2, 2).triu())


def test_cr_mogm_of_what_is_no_weighting():
    with pytest.raises(TypeError, match=r"weighting must be an object that can be called.*the class UPGradWeighting"):
        CRMOGMWeighting(UPGradWeighting)
    with pytest.raises(TypeError, match="GaussNewtonWeighting takes residuals too"):
        CRMOGMWeighting(GaussNewtonWeighting(1.0))
    with pytest.raises(ValueError, match=r"the wrapped weighting returned weights of shape \[2, 2\]"):
        CRMOGMWeighting(lambda gramian: gramian)(torch.eye(2))


def test_initial_weights_are_for_all_objectives():
    inner = MoDoWeighting()
    with pytest.raises(ValueError, match="initial_weights is for 3 objectives; the Gramian has 2"):
        CRMOGMWeighting(inner, initial_weights=torch.ones(3))(torch.eye(2))
    assert inner.state is None


def test_alpha_may_follow_a_schedule():
    weighting = CRMOGMWeighting(MeanWeighting(), alpha=0.0)
    weighting(torch.eye(2))
    weighting.weighting, weighting.alpha = SumWeighting(), 0.5
    assert weighting(torch.eye(2)).tolist() == [0.75, 0.75]
