"""Weights against torchjd's, method by method, where it is installed; and Gramians handed from one to the other."""

import warnings

import pytest
import torch
from torch import nn
from weight_inputs import KINDS, camps, centred, common, gram, lengths_apart, normal, square, tall, wide

import recollect.aggregation as ours

theirs = pytest.importorskip("torchjd.aggregation")
FULL_RANK = [wide, common, camps]


def both(name, kind, m, *settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of both libraries for one Gramian, with the same seed."""
    gramian = gram(kind(m))
    torch.manual_seed(4)
    found = getattr(ours, name)(*settings)(gramian)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(4)
        expected = getattr(theirs, name)(*settings)(gramian)
    return found, expected


def assert_same(found, expected, tolerance):
    size = float(expected.norm())
    assert float((found - expected).norm()) <= tolerance * size + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["UPGradWeighting", "DualProjWeighting"])
@pytest.mark.parametrize("m", [1, 2, 12, 40])
def test_projections(name, kind, m):
    assert_same(*both(name, kind, m), 1e-9)
    preference = torch.linspace(0.5, 2, m).double()
    assert_same(*both(name, kind, m, preference), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [(), (None, "median"), (None, "rmse")])
def test_aligned_mtl(kind, settings):
    assert_same(*both("AlignedMTLWeighting", kind, 9, *settings), 1e-2 if kind.__name__ == "nearly_singular" else 1e-5)


@pytest.mark.parametrize("kind", [*FULL_RANK, tall])
def test_imtlg(kind):
    assert_same(*both("IMTLGWeighting", kind, 9), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["PCGradWeighting", "RandomWeighting", "MeanWeighting", "SumWeighting"])
def test_the_same_draws(name, kind):
    assert_same(*both(name, kind, 9), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_mgda_is_at_least_as_short(kind):
    gramian = gram(kind(9))
    found, expected = both("MGDAWeighting", kind, 9)
    assert found @ gramian @ found <= (1 + 1e-9) * expected @ gramian @ expected
    if kind is wide:  # where Frank and Wolfe's steps arrive
        assert_same(found, expected, 0.1)


def test_krum_without_an_outlier():
    # There distances are unsquared: scores agree where they are clear.
    jacobian = normal(1, 5) + 0.1 * normal(7, 5, seed=1)
    jacobian[4] *= -100
    found, expected = (library.KrumWeighting(1, 6)(gram(jacobian)) for library in (ours, theirs))
    assert found.equal(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [0.1, 0.5])
def test_cagrad(kind, c):
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    assert_same(*both("CAGradWeighting", kind, 6, c), 1e-3)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_nash_mtl(max_norm):
    pytest.importorskip("cvxpy")
    pytest.importorskip("ecos")
    jacobian = square(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.NashMTL(n_tasks=5, max_norm=max_norm)(jacobian)
    assert_same(ours.NashMTLWeighting(max_norm)(gram(jacobian)) @ jacobian, expected, 1e-4)


@pytest.mark.parametrize("kind", FULL_RANK)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_fairgrad(kind, alpha):
    assert_same(*both("FairGradWeighting", kind, 6, alpha), 1e-4)  # theirs ends its search early


@pytest.mark.parametrize("kind", [wide, square, common, camps, centred])
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_gradvac_call_after_call(kind, beta):
    found, expected = ours.GradVacWeighting(beta), theirs.GradVacWeighting(beta)
    for seed in range(5):
        gramian = gram(kind(7, seed=seed))
        torch.manual_seed(seed)
        weights = found(gramian)
        torch.manual_seed(seed)
        assert_same(weights, expected(gramian), 1e-6)


def cross_gramians(m):
    return [normal(m, 9, seed=seed) @ normal(m, 9, seed=seed + 50).T + 3 * torch.eye(m) for seed in range(5)]


@pytest.mark.parametrize("settings", [(), (0.01, 0.0), (1.0, 3.0)])
def test_modo_call_after_call(settings):
    found, expected = ours.MoDoWeighting(*settings), theirs.MoDoWeighting(*settings)
    for matrix in cross_gramians(6):
        assert_same(found(matrix), expected(matrix), 1e-12)


@pytest.mark.parametrize("settings", [(), (0.1, 0.9, 7, 2.0), (1.0, 0.0, 3, 0.5, torch.linspace(0, 1, 6).double())])
def test_sdmgrad_call_after_call(settings):
    found, expected = ours.SDMGradWeighting(*settings), theirs.SDMGradWeighting(*settings)
    for matrix in cross_gramians(6):
        assert_same(found(matrix), expected(matrix), 1e-6)


@pytest.mark.parametrize("kind", [*FULL_RANK, lengths_apart])
@pytest.mark.parametrize("preference", [None, torch.linspace(0.5, 2, 9).double()])
def test_config(kind, preference):
    jacobian = kind(9)
    found = ours.ConFIGWeighting(preference)(gram(jacobian)) @ jacobian
    assert_same(found, theirs.ConFIG(preference)(jacobian), 1e-12)


@pytest.mark.parametrize("initial", [None, torch.linspace(0, 1, 6).double()])
def test_cr_mogm_call_after_call(initial):
    found = ours.CRMOGMWeighting(ours.UPGradWeighting(), 0.7, initial)
    expected = theirs.CRMOGMWeighting(theirs.UPGradWeighting(), 0.7, initial)
    for seed in range(5):
        gramian = gram(square(6, seed=seed))
        assert_same(found(gramian), expected(gramian), 1e-9)


@pytest.mark.parametrize("name", ["UPGradWeighting", "MGDAWeighting", "IMTLGWeighting"])
def test_gramians_of_their_engine(name):
    from torchjd.autogram import Engine

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(2, 5)
    gramian = Engine(model, batch_dim=0).compute_gramian(model(x))
    losses = model(x).flatten()
    weights = getattr(ours, name)()(gramian)  # a matrix, whatever the shape of the losses
    losses.backward(weights)
    update = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    expected = (weights.double() @ gramian.double() @ weights.double()).sqrt()
    torch.testing.assert_close(update.norm().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["UPGradWeighting", "DualProjWeighting", "IMTLGWeighting", "AlignedMTLWeighting"])
def test_gramians_of_our_engine(name):
    from recollect.autogram import Engine

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(4, 5).double()
    engine = Engine(model, batch_dim=0)
    gramian = engine.compute_gramian(model(x).squeeze(1))
    assert_same(getattr(ours, name)()(gramian), getattr(theirs, name)()(gramian), 1e-8)


@pytest.mark.parametrize("kind", [wide, tall])
def test_the_objective_is_no_worse_than_theirs(kind):
    # The sum of all programs' values, in the normalised and regularised Gramian that both solve with.
    from torchjd.linalg import QuadprogProjector

    from recollect.aggregation._dual_cone import project

    gramian = gram(kind(30))
    matrix = gramian / gramian.trace() + 1e-4 * torch.eye(30).double()
    rows = torch.eye(30).double()
    found, expected = project(gramian, rows, 1e-4).weights, QuadprogProjector()(rows, gramian)
    values = [float(((w @ matrix) * w).sum()) for w in (found, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
