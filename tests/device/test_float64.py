"""What runs on a device that has no numbers of double precision, as mps has none."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from device import emulation
from recollect import invertible
from recollect._devices import FORMS, widened, widest
from recollect.aggregation import UPGradWeighting
from recollect.autogram import Engine
from recollect.frames import settle
from recollect.models import RevGNN

NODES = 12


@pytest.fixture(autouse=True)
def narrow(other, monkeypatch):
    monkeypatch.setitem(FORMS, other, replace(FORMS[other], float64=False))
    emulation.device.has_float64 = False


def test_the_emulation_refuses_it(other):
    with pytest.raises(TypeError, match="other has no float64"):
        torch.randn(3, device=other).double()
    assert widest(torch.device(other)) is torch.float32
    assert widened(torch.randn(3, dtype=torch.float16).to(other)).dtype is torch.float32
    assert widened(torch.randn(3)).dtype is torch.float64


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch_geometric, when it is imported
@pytest.mark.parametrize("exact", [False, True])
def test_a_reversible_network(other, exact):
    torch.manual_seed(0)
    model = RevGNN(5, 16, 3, 4, dropout=0.3, exact=exact).to(other)
    x, edge_index = torch.randn(NODES, 5).to(other), torch.randint(NODES, (2, 40)).to(other)
    found = []
    for model.disable in (False, True):
        torch.manual_seed(1)
        loss = F.cross_entropy(model(x, edge_index), torch.arange(NODES, device=other) % 3)
        found.append([grad.cpu() for grad in torch.autograd.grad(loss, list(model.parameters()))])
    settle()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_a_chain_of_couplings_and_its_drift(other):
    torch.manual_seed(0)
    couplings = [invertible.AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
    net, x = invertible.Sequential(*couplings).to(other), torch.randn(6, 8).to(other).requires_grad_()
    net(x * 1).square().sum().backward()
    settle()
    assert couplings[0].last_drift is not None
    assert couplings[0].last_drift < 1e-5


def test_a_gramian_and_its_certificate(other):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 6)
    found = []
    for place in ("cpu", other):
        emulation.device.has_float64 = False
        model, x = model.to(place), x.to(place)
        engine = Engine(model)
        losses = F.cross_entropy(model(x), torch.arange(5, device=place) % 3, reduction="none")
        found.append(engine.compute_gramian(losses).cpu())
        engine.certificate.settle()
        assert engine.certificate.checks == 1
        engine.compute_norms(F.cross_entropy(model(x), torch.arange(5, device=place) % 3, reduction="none"))
        engine.certificate.settle()
    torch.testing.assert_close(found[1], found[0])
    assert UPGradWeighting()(found[1].to(other)).shape == (5,)
