"""Norms of single losses' gradients against the explicit Jacobian, and what they are computed from."""

from __future__ import annotations

import pytest
import torch
from autogram_zoo import build, explicit_jacobian, run, trained
from autogram_zoo._cases import LIMITS, by_hand, each_case, each_member, few
from factor_oracle import dense
from forms import set_form
from test_certificate import BREAKS, NETS, M, broken, parts
from test_contract import FACTORS, SUMS
from test_passes import Mixed, losses_of, model, passes  # noqa: F401  (a fixture)
from torch import nn

from recollect.autogram import Engine, GramianError
from recollect.autogram._norms import squared_norms
from recollect.memory import peak_memory

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
CPU = torch.device("cpu")


def diagonal(gramian):
    """The squared norms in the losses' shape."""
    k = gramian.dim() // 2
    return torch.einsum(gramian, [*range(k), *reversed(range(k))], [*range(k)])


def close(found, squares, limit):
    """Whether norms are right up to rounding; those far below the largest are measured against that."""
    expected = squares.clamp_min(0).sqrt()
    scale = expected.clamp_min(1e-5 * float(expected.max()) or 1.0)
    return bool(((found.double() - expected.double()).abs() <= limit * scale).all())


@each_case
def test_norms_are_those_of_the_explicit_jacobian(kind, batch, batch_dim, dtype):
    made = build(kind, dtype)
    engine = Engine(*made.targets(), batch_dim=batch_dim)
    losses = run(made, batch, batch_dim)
    norms = engine.compute_norms(losses)
    assert norms.shape == losses.shape
    assert norms.dtype == dtype
    assert not norms.requires_grad
    assert close(norms, diagonal(by_hand(kind, batch, batch_dim, dtype)), LIMITS[dtype])


@pytest.mark.parametrize("how", ["at once", "with a small bound", "in pieces"])
@each_member
def test_norms_of_losses_whose_passes_run_otherwise(kind, how, monkeypatch):
    if how == "at once":
        set_form(monkeypatch, small_layer=2**40)
    if how == "in pieces":
        set_form(monkeypatch, norm_bytes=100)
    made = build(kind)
    engine = Engine(*made.targets(), row_bytes=1 if how == "with a small bound" else 2**28)
    norms = engine.compute_norms(run(made, few(kind), kind.batch_dims[0]))
    assert close(norms, diagonal(by_hand(kind, few(kind), kind.batch_dims[0])), 1e-9)


@each_member
def test_several_losses_for_each_element(kind):
    def more(losses):
        return torch.stack([losses, losses.sin() + losses], -1)

    made, other = build(kind), build(kind)
    norms = Engine(*made.targets()).compute_norms(more(run(made, few(kind), kind.batch_dims[0])), squared=True)
    losses = more(run(other, few(kind), kind.batch_dims[0]))
    expected = explicit_jacobian(losses, trained(other.targets())).square().sum(1).view(losses.shape)
    assert close(norms.sqrt(), expected, 1e-9)


@pytest.mark.parametrize("piece", [1, 2**22])
@pytest.mark.parametrize("name", FACTORS)
def test_the_norms_of_a_factor(name, piece, monkeypatch):
    set_form(monkeypatch, norm_bytes=piece)
    factor = FACTORS[name]
    rows = dense(factor).reshape(factor.num_rows, -1)
    found = squared_norms([factor], torch.float64, CPU)
    torch.testing.assert_close(found, rows.square().sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SUMS)
def test_several_uses_of_a_parameter_have_cross_terms(name):
    rows = sum(dense(factor).reshape(factor.num_rows, -1) for factor in SUMS[name])
    found = squared_norms(SUMS[name], torch.float64, CPU)
    torch.testing.assert_close(found, rows.square().sum(1), rtol=1e-12, atol=1e-12)


def test_several_losses_for_each_element_hold_nothing(passes):  # noqa: F811
    net = model()
    engine = Engine(net, batch_dim=0, row_bytes=1, certify_every=0)
    found = engine.compute_norms(losses_of(net))
    assert len(passes) == 3  # no pairs of groups
    jacobian = explicit_jacobian(losses_of(net), list(net.parameters()))
    torch.testing.assert_close(found.flatten(), jacobian.norm(dim=1))


def test_by_rows_nothing_is_held(passes):  # noqa: F811
    net = Mixed()
    engine = Engine(net, batch_dim=None, row_bytes=1, certify_every=0)
    found = engine.compute_norms(losses_of(net))
    assert len(passes) == 18
    torch.testing.assert_close(found.flatten(), explicit_jacobian(losses_of(net), list(net.parameters())).norm(dim=1))


def test_nothing_of_the_gramian_s_size_is_made():
    net, m = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), 4096
    engine = Engine(net, certify_every=0)
    losses = net(torch.randn(m, 8)).square().sum(1)
    engine.compute_norms(losses)  # what is found out about the graph is no memory of the next call
    with peak_memory("cpu") as memory:
        norms = engine.compute_norms(losses)
    assert norms.shape == (m,)
    assert memory.peak_bytes < 40 * m * 16 * 4 < m * m * 4


def test_lists_scalars_and_none():
    net = model()
    engine = Engine(net)
    losses = losses_of(net)
    listed = engine.compute_norms([losses[0, 0], losses[1:3]])
    torch.testing.assert_close(listed, engine.compute_norms(losses).flatten()[[0, 3, 4, 5, 6, 7, 8]])
    assert engine.compute_norms(losses[0, 0]).shape == ()
    assert engine.compute_norms(losses[:0]).shape == (0, 3)
    with pytest.raises(TypeError, match="floating-point"):
        engine.compute_norms(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="no graph"):
        engine.compute_norms(torch.ones(3))


def test_in_half_precision_squares_do_not_overflow():
    net = nn.Linear(4, 3).half()
    losses = net(torch.full((5, 4), 100.0, dtype=torch.half)).float().sum(1).mul(10).half()
    found = Engine(net).compute_norms(losses)
    assert found.dtype == torch.half
    expected = explicit_jacobian(losses, list(net.parameters())).norm(dim=1)
    assert float(expected[0].square()) > torch.finfo(torch.half).max
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def test_the_graph_stays_for_a_backward_pass_or_is_freed():
    net = model()
    engine = Engine(net)
    losses = losses_of(net)
    engine.compute_norms(losses)
    losses.sum().backward()
    again = losses_of(net)
    engine.compute_norms(again)
    engine.compute_norms(again, retain_graph=False)
    assert engine.certificate.checks == 1


@pytest.mark.parametrize("change", ["all too large", "all too small", "nothing", "squares", "off by a constant"])
@pytest.mark.parametrize("name", NETS)
def test_a_broken_rule_is_found(name, change, monkeypatch):
    modules, losses, layer_type = parts(name)
    broken(layer_type, BREAKS[change], monkeypatch)
    with pytest.raises(GramianError, match=rf"‖g_i‖² of a loss is .*\n?.*{layer_type.__name__}"):
        Engine(*modules).compute_norms(losses())


def test_how_often_a_loss_is_compared():
    modules, losses, _ = parts("linear")
    engine, counts = Engine(*modules, certify_every=3), []
    for _ in range(7):
        engine.compute_norms(losses())
        counts.append(engine.certificate.checks)
    assert counts == [1, 1, 1, 2, 2, 2, 3]
    assert engine.certificate.largest < 1e-12
    engine.compute_gramian(losses())  # has a count of its own
    assert engine.certificate.checks == 4
    never = Engine(*modules, certify_every=0)
    never.compute_norms(losses())
    assert never.certificate.checks == 0
    modules[0].weight.register_hook(lambda grad: grad)
    hooked = Engine(*modules)
    assert hooked.compute_norms(losses()).shape == (M,)
    assert (hooked.certificate.checks, hooked.certificate.skipped) == (0, 1)
