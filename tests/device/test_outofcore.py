"""Steps over a whole graph are computed on the CPU; a network on another device is refused before anything is."""

import pytest
import torch
from torch.nn import functional as F

from recollect.models import GCN, RevGNN
from recollect.outofcore import WholeGraph

Data = pytest.importorskip("torch_geometric.data").Data
NODES, PTR = 12, torch.tensor([0, 4, 8, 12])


def graph():
    ring = torch.arange(NODES)
    x = torch.randn(NODES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Data(x=x, edge_index=torch.stack([ring, ring.roll(1)]), y=ring % 3, train_mask=ring < 9)


def network(kind):
    torch.manual_seed(0)
    made = RevGNN(5, 8, 3, 2) if kind is RevGNN else GCN(NODES, 5, 8, 3, num_layers=2, keep_histories=False)
    return made.double()


def criterion(logits, y):
    return F.cross_entropy(logits, y, reduction="sum") / 9


@pytest.mark.parametrize("kind", [RevGNN, GCN])
def test_a_network_there_is_refused(other, kind):
    model = network(kind)
    whole = WholeGraph(model, graph(), PTR)
    loss = whole.step(criterion)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.to(other)
    for refused in (lambda: whole.step(criterion), whole.evaluate, lambda: WholeGraph(model, graph(), PTR)):
        with pytest.raises(ValueError, match=r"parameters on other:0, but WholeGraph computes its parts on the CPU"):
            refused()
    model.cpu().zero_grad()
    torch.testing.assert_close(whole.step(criterion), loss)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


@pytest.mark.parametrize("kind", [RevGNN, GCN])
def test_the_graph_may_come_from_there(other, kind):
    expected = WholeGraph(network(kind), graph(), PTR).step(criterion)
    torch.testing.assert_close(WholeGraph(network(kind), graph().to(other), PTR.to(other)).step(criterion), expected)
