"""Products of the gradients of two lists of losses against explicit Jacobians."""

from __future__ import annotations

import itertools

import pytest
import torch
from autogram_zoo import build, explicit_jacobian, run, trained
from autogram_zoo._behaviour import SideEffects
from autogram_zoo._cases import EXACT, each_member, few
from factor_oracle import dense
from forms import set_form
from test_certificate import BREAKS, NETS, broken, parts
from test_contract import FACTORS, SUMS, blocks, draw, outer, picked
from test_passes import Mixed, losses_of, model, passes  # noqa: F401  (a fixture)
from torch import nn

from recollect.autogram import Engine, GramianError, _contract
from recollect.autogram._contract import add_cross
from recollect.autogram._factors import Rows
from recollect.memory import peak_memory

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def error(found, rows, columns):
    """The largest error over the norms of the two gradients."""
    scale = [j.norm(dim=1).clamp_min(1e-6 * float(j.norm(dim=1).max()) or 1.0) for j in (rows, columns)]
    return float(((found.double() - rows @ columns.T).abs() / torch.outer(*scale)).max())


def weighted(losses):
    """Other losses of the same graph."""
    flat = losses.flatten()
    return flat * torch.linspace(0.5, 2, len(flat), dtype=flat.dtype) + flat.sum().sin()


@pytest.mark.parametrize("row_bytes", [2**28, 1], ids=["at once", "in groups"])
@each_member
def test_two_graphs(kind, row_bytes):
    """Of two batches, the second one larger if the member takes such."""
    if kind is SideEffects:
        pytest.skip("a second forward pass writes to what the first one's graph needs")
    made, other = build(kind), build(kind)
    batch_dim = kind.batch_dims[0]
    sizes = few(kind), (kind.batches[0] if len(kind.batches) < 3 else 1)
    engine = Engine(*made.targets(), row_bytes=row_bytes)
    both = [run(made, size, batch_dim) for size in sizes]
    found = engine.compute_gramian(*both)
    assert found.shape == (*both[0].shape, *reversed(both[1].shape))
    assert engine.compute_gramian(*both, flat=True).shape == (both[0].numel(), both[1].numel())
    jacobians = [explicit_jacobian(run(other, size, batch_dim), trained(other.targets())) for size in sizes]
    expected = (jacobians[0] @ jacobians[1].T).view(*both[0].shape, *both[1].shape)
    k = both[0].dim()
    expected = expected.permute([*range(k), *reversed(range(k, expected.dim()))])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max() or 1))


@each_member
def test_two_lists_of_one_graph_that_go_by_different_passes(kind):
    """The rows are apart, and the columns are not: each depends on the whole batch."""
    made, other = build(kind), build(kind)
    engine = Engine(*made.targets())
    losses = run(made, few(kind), kind.batch_dims[0])
    found = engine.compute_gramian(losses, weighted(losses), flat=True)
    again = run(other, few(kind), kind.batch_dims[0])
    rows, columns = (explicit_jacobian(some, trained(other.targets())) for some in (again, weighted(again)))
    assert error(found, rows, columns) <= EXACT


def test_with_itself_it_is_the_gramian():
    net = Mixed()
    engine, losses = Engine(net), losses_of(net)
    torch.testing.assert_close(engine.compute_gramian(losses, losses), engine.compute_gramian(losses))


@pytest.mark.parametrize("batch_dim", ["auto", 0, 1, None])
@pytest.mark.parametrize("row_bytes", [1, 3000, 2**28])
def test_several_passes_of_both(batch_dim, row_bytes):
    net = Mixed() if batch_dim in ("auto", None) else model()
    engine, losses = Engine(net, batch_dim=batch_dim, row_bytes=row_bytes), losses_of(net)
    found = engine.compute_gramian(losses, losses[1:4, :2] ** 2)
    assert found.shape == (6, 3, 2, 3)
    rows = explicit_jacobian(losses, list(net.parameters()))
    columns = explicit_jacobian(losses[1:4, :2] ** 2, list(net.parameters()))
    torch.testing.assert_close(found, (rows @ columns.T).view(6, 3, 3, 2).transpose(2, 3))


def test_passes_for_the_columns_repeat_for_each_group_of_rows(passes):  # noqa: F811
    net = model()
    engine = Engine(net, batch_dim=None, certify_every=0)
    losses = losses_of(net).flatten()
    engine.compute_gramian(losses[:8], losses[:3])
    assert len(passes) == 8 + 3
    passes.clear()
    tight = Engine(net, batch_dim=None, certify_every=0, row_bytes=1)
    losses = losses_of(net).flatten()
    tight.compute_gramian(losses[:8], losses[:3])
    assert len(passes) == 8 + 8 * 3


def test_the_bound_bounds():
    """64 rows of 66,560 elements are 17 MB, those of the columns 8 MB."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))

    def measure(row_bytes):
        engine = Engine(net, batch_dim=None, row_bytes=row_bytes, certify_every=0)
        first, second = net(torch.ones(64, 64)).sum(0), net(torch.ones(64, 64) / 2).sum(0)[:32]
        with peak_memory("cpu") as memory:
            found = engine.compute_gramian(first, second)
        return memory.peak_bytes, found

    (much, whole), (little, grouped) = measure(2**28), measure(2**22)
    assert much > 20e6
    assert little < 12e6
    torch.testing.assert_close(whole, grouped, rtol=1e-3, atol=1e-3)


def test_what_only_one_side_depends_on():
    torch.manual_seed(0)
    first, second, shared = nn.Linear(3, 2).double(), nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
    engine = Engine(first, second, shared)
    x = torch.randn(4, 3, dtype=torch.float64)
    one, other = shared(first(x)).sum(1), shared(second(x)).sum(1)
    found = engine.compute_gramian(one, other)
    rows, columns = (explicit_jacobian(some, list(shared.parameters())) for some in (one, other))
    torch.testing.assert_close(found, rows @ columns.T)
    assert not engine.compute_gramian(first(x).sum(1), second(x).sum(1)).any()


def test_lists_and_empty_ones_and_dtypes():
    net = model()
    engine, losses = Engine(net), losses_of(net)
    whole = engine.compute_gramian(losses, losses, flat=True)
    listed = engine.compute_gramian([losses[0], losses[2, 1]], [losses[5]])
    torch.testing.assert_close(listed, whole[[0, 1, 2, 7]][:, [15, 16, 17]])
    assert engine.compute_gramian(losses[:0], losses).shape == (0, 3, 3, 6)
    assert engine.compute_gramian(losses, losses[0, :0]).shape == (6, 3, 0)
    assert engine.compute_gramian(losses[0].float(), losses[1]).dtype == torch.float64
    single = engine.compute_gramian(losses[0, 0], losses[1, 0])
    assert single.shape == ()
    torch.testing.assert_close(single, whole[0, 3])


def test_bad_columns_are_refused():
    net = model()
    engine, losses = Engine(net), losses_of(net)
    with pytest.raises(ValueError, match="no graph"):
        engine.compute_gramian(losses, losses.detach())
    with pytest.raises(TypeError, match="floating-point"):
        engine.compute_gramian(losses, 3)
    with pytest.raises(ValueError, match="rows are on cpu and those of the columns on meta"):
        engine.compute_gramian(losses, torch.ones(3, device="meta", requires_grad=True))


@pytest.mark.parametrize("small", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize("pair", list(itertools.product(range(6), repeat=2)), ids=str)
def test_factors_of_every_kind_meet(pair, small, monkeypatch):
    if small:
        set_form(monkeypatch, row_bytes=200)
        monkeypatch.setattr(_contract, "_WHOLE", 400)
        set_form(monkeypatch, dense_bytes=(2**22, 400))
    kinds = [
        lambda m: Rows(draw(m, 6, 5)),
        lambda m: outer(m, 2, 1, 6, 5, "right" if m == 3 else ""),
        lambda m: outer(m, 1, 2, 3, 5),
        lambda m: picked(m, 3, 5, 6, shared=m == 3),
        lambda m: blocks(m, 6, 5),
        lambda m: blocks(m, 6, 5, axis=1),
    ]
    first, second = [kinds[pair[0]](7)], [kinds[pair[1]](3), kinds[pair[0]](3)][: 1 + small]
    found = torch.ones(7, 3, dtype=torch.float64)
    add_cross(found, first, second)
    rows, columns = (sum(dense(f).reshape(f.num_rows, -1) for f in factors) for factors in (first, second))
    torch.testing.assert_close(found, rows @ columns.T + 1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("small", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", FACTORS | SUMS)
def test_a_factor_meets_itself(name, small, monkeypatch):
    if small:
        set_form(monkeypatch, row_bytes=200)
        monkeypatch.setattr(_contract, "_WHOLE", 400)
        set_form(monkeypatch, dense_bytes=(2**22, 400))
    factors = SUMS[name] if name in SUMS else [FACTORS[name]]
    m = factors[0].num_rows
    rows = sum(dense(factor).reshape(m, -1) for factor in factors)
    found = torch.zeros(m, m, dtype=torch.float64)
    add_cross(found, factors, factors)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", BREAKS)
@pytest.mark.parametrize("name", NETS)
def test_a_broken_rule_is_found(name, change, monkeypatch):
    modules, losses, layer_type = parts(name)
    broken(layer_type, BREAKS[change], monkeypatch)
    engine = Engine(*modules)
    with pytest.raises(GramianError, match=rf"uᵀ C v is .*{layer_type.__name__}"):
        engine.compute_gramian(losses(), losses().sin())


def test_how_often_products_are_compared():
    modules, losses, _ = parts("linear")
    engine, counts = Engine(*modules, certify_every=3), []
    for _ in range(7):
        engine.compute_gramian(losses(), losses())
        counts.append(engine.certificate.checks)
    assert counts == [1, 1, 1, 2, 2, 2, 3]
    assert engine.certificate.largest < 1e-12
    modules[0].weight.register_hook(lambda grad: grad)
    hooked = Engine(*modules)
    hooked.compute_gramian(losses(), losses())
    assert (hooked.certificate.checks, hooked.certificate.skipped) == (0, 1)
