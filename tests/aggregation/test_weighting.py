"""What all weightings do alike, on good and on degenerate Gramians."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from weight_asserts import assert_permutes, assert_scale_free
from weight_inputs import DEGENERATE, gram, normal, square, tall, weightings, wide

import recollect.aggregation
from recollect.aggregation import (
    ConstantWeighting,
    Flattening,
    MeanWeighting,
    StatefulWeighting,
    UPGradWeighting,
    Weighting,
    conflict,
)

NAMES = list(weightings(1))
RANDOM = {"PCGrad", "GradVac", "random"}
ORDERED = {"UPGrad, preference", "constant"}  # other weights for other places, by intent
UNITS = {"Nash-MTL", "FairGrad", "FairGrad, large alpha", "MoDo"}  # weights have a unit, or steps do


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_have_the_gramians_type_and_no_history(name, dtype):
    gramian = gram(square(5)).to(dtype).requires_grad_()
    weights = weightings(5)[name](gramian)
    assert weights.shape == (5,)
    assert weights.dtype == dtype
    assert weights.isfinite().all()
    assert not weights.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    gramian = gram(square(20)).float()
    expected = weightings(20)[name](gramian)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert weightings(20)[name](gramian).equal(expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_gramian_is_left_as_it_is(name):
    gramian = gram(square(5))
    before = gramian.clone()
    weightings(5)[name](gramian)
    assert gramian.equal(before)


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_gramians_give_finite_weights(name, case):
    gramian = gram(DEGENERATE[case])
    m = len(gramian)
    if name == "Krum" and m < 3:
        pytest.skip("Krum needs three gradients at least")
    weights = weightings(m)[name](gramian)
    assert weights.isfinite().all()


@pytest.mark.parametrize("case", ["tiny", "a zero row", "duplicates", "rank one", "nearly parallel"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_gramians_of_low_precision_give_finite_weights(name, case, dtype):
    # Rounding leaves such Gramians with negative eigenvalues.
    gramian = gram(DEGENERATE[case]).to(dtype)
    assert weightings(len(gramian))[name](gramian).isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM | ORDERED])
@pytest.mark.parametrize("kind", [wide, square, tall])
def test_the_order_of_objectives_does_not_matter(name, kind):
    assert_permutes(lambda gramian: weightings(7)[name](gramian), kind(7), tolerance=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM | UNITS])
@pytest.mark.parametrize("kind", [wide, square, tall])
def test_the_unit_of_gradients_does_not_matter(name, kind):
    assert_scale_free(lambda gramian: weightings(7)[name](gramian), kind(7))


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_generators_make_draws_repeatable(name):
    gramian = gram(square(9))
    first, other = weightings(9)[name], weightings(9)[name]
    draws = [first(gramian) for _ in range(3)]
    assert not draws[0].equal(draws[1])
    torch.rand(3)  # of the global generator, which is not asked
    assert all(other(gramian).equal(draw) for draw in draws)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused_by_all(name):
    jacobian = normal(4, 4)
    jacobian[2] = math.nan
    with pytest.raises(ValueError, match="objective 2"):
        weightings(4)[name](gram(jacobian))


@pytest.mark.parametrize("name", NAMES)
def test_weightings_are_copied_and_pickled(name):
    if name in RANDOM:
        pytest.skip("generators are neither copied nor pickled by torch")
    gramian, weighting = gram(square(4)), weightings(4)[name]
    twins = [copy.deepcopy(weighting), pickle.loads(pickle.dumps(weighting))]
    expected = weighting(gramian)
    assert all(twin(gramian).equal(expected) for twin in twins)
    assert bool(weighting.state_dict()) == isinstance(weighting, StatefulWeighting)


def test_hooks_see_the_weights():
    seen = []
    weighting = MeanWeighting()
    weighting.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert weighting(torch.eye(2)) is seen[0]


def test_a_method_of_ones_own():
    class First(Weighting):
        def weigh(self, gramian):
            return torch.eye(len(gramian))[0]

    assert First()(torch.eye(3).double()).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="symmetric"):
        First()(torch.ones(3, 3).triu())
    with pytest.raises(TypeError, match="abstract"):
        Weighting()  # type: ignore[abstract]


class Given(Weighting):
    """Whatever it was made with."""

    def __init__(self, weights, **more):
        super().__init__()
        self.given = weights

    def weigh(self, gramian):
        return self.given


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "what Given.weigh returns must be a tensor, .*found list"),
        (np.ones(2), TypeError, "found ndarray"),
        (torch.ones(3), ValueError, r"Given.weigh returned weights of shape \[3\]; there are 2 objectives"),
        (torch.ones(()), ValueError, r"returned weights of shape \[\];"),
    ],
)
def test_a_method_of_ones_own_that_returns_no_weights(weights, error, message):
    with pytest.raises(error, match=message):
        Given(weights, more=1)(torch.eye(2))


@pytest.mark.parametrize("gramian", [[[1.0]], np.eye(1)], ids=["list", "ndarray"])
@pytest.mark.parametrize("takes", [UPGradWeighting(), Flattening(MeanWeighting()), conflict])
def test_gramians_that_are_no_tensors(takes, gramian):
    with pytest.raises(TypeError, match=rf"the Gramian must be a tensor, .*found {type(gramian).__name__}"):
        takes(gramian)


def test_settings_of_another_name():
    with pytest.raises(TypeError, match=r"UPGradWeighting has no setting 'preference'; .*: pref_vector, reg_eps"):
        UPGradWeighting(preference=torch.ones(2))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"ConstantWeighting has no setting 'pref_vector'; .*: weights"):
        ConstantWeighting(pref_vector=torch.ones(2))  # type: ignore[call-arg]


@pytest.mark.parametrize("weighting", [UPGradWeighting, ConstantWeighting])
def test_settings_that_are_no_tensors(weighting):
    with pytest.raises(TypeError, match=r"must be a tensor, .*found list"):
        weighting([1.0, 2.0])


BASES = {"Weighting", "ResidualWeighting", "StatefulWeighting"}
METHODS = [name for name in recollect.aggregation.__all__ if name.endswith("Weighting") and name not in BASES]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_short_name(name):
    short = name.removesuffix("Weighting")
    assert getattr(recollect.aggregation, short) is getattr(recollect.aggregation, name)
    assert short in recollect.aggregation.__all__


def test_a_jacobian_is_told_from_its_gramian():
    with pytest.raises(ValueError, match=r"found \[2, 3\]. Of a Jacobian J give J @ J.T"):
        recollect.aggregation.UPGrad()(torch.ones(2, 3))


def test_all_methods_are_in_these_tests():
    tested = {type(weighting) for weighting in weightings(3).values()} | {recollect.aggregation.GaussNewton}
    assert {getattr(recollect.aggregation, name) for name in METHODS} == tested


def test_settings_are_shown():
    assert repr(UPGradWeighting(reg_eps=0.5)) == "UPGradWeighting(pref_vector=None, reg_eps=0.5)"
    assert "weights=tensor([1., 2.])" in repr(ConstantWeighting(torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.ones(2, 2), r"one number for each objective.*found \[2, 2\]"),
        (torch.ones(0), "one number for each objective"),
        (torch.tensor([1.0, -1.0]), "not negative"),
        (torch.tensor([1.0, math.nan]), "finite"),
    ],
)
@pytest.mark.parametrize("name", ["UPGradWeighting", "DualProjWeighting", "AlignedMTLWeighting"])
def test_preferences_that_are_none(name, vector, message):
    with pytest.raises(ValueError, match=message):
        getattr(recollect.aggregation, name)(vector)


@pytest.mark.parametrize("name", ["UPGradWeighting", "DualProjWeighting", "AlignedMTLWeighting"])
def test_preferences_for_other_objectives(name):
    with pytest.raises(ValueError, match="is for 3 objectives; the Gramian has 2"):
        getattr(recollect.aggregation, name)(torch.ones(3))(torch.eye(2))
