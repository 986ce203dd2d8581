"""GIN's Lipschitz regularisation: what it is, what it does, and that it leaves no graph behind."""

from __future__ import annotations

import pytest
import torch
from model_zoo import NODES, PTR, data_for, make

import recollect
from recollect.autoscale import SubgraphLoader


def step(model, data, batch=None):
    if batch is None:
        return model(data.x, data.adj_t)
    return model(batch.data.x, batch.data.adj_t, *batch[1:])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_it_is_the_mean_distance_that_noise_moves_the_layers_outputs(whole, recompute):
    model = make("gin", noise=0.2, recompute=recompute)
    data = data_for(model)
    batch = None if whole else next(iter(SubgraphLoader(data, PTR, 2)))
    torch.manual_seed(4)
    step(model, data, batch)
    found = model.lipschitz_loss()
    adj_t, x = (data.adj_t, data.x) if whole else (batch.data.adj_t, batch.data.x)
    torch.manual_seed(4)
    expected, x = torch.zeros((), dtype=torch.float64), model.lins[0](x).relu()
    for layer, conv in enumerate(model.convs):
        out = conv(x, adj_t)
        if layer:
            expected = expected + (conv(x + 0.2 * torch.randn_like(x), adj_t) - out).norm(dim=1).sum() / len(out) / 2
        x = torch.cat([out.relu(), torch.zeros(adj_t.size(1) - len(out), 6, dtype=torch.float64)])  # no history yet
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [p for conv in model.convs[1:] for p in conv.parameters()]
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


def test_a_whole_network_in_a_frame_leaves_it_once():
    model = make("gin", noise=0.2)
    data = data_for(model)
    torch.manual_seed(1)
    out = recollect.checkpoint(model, data.x, data.adj_t)
    loss = out.sum() + model.lipschitz_loss()
    found = torch.autograd.grad(loss, list(model.parameters()))
    torch.manual_seed(1)
    expected = model(data.x, data.adj_t).sum() + model.lipschitz_loss()
    torch.testing.assert_close(found, torch.autograd.grad(expected, list(model.parameters())))
    torch.manual_seed(1)
    out = recollect.checkpoint(model, data.x, data.adj_t)
    model.lipschitz_loss()
    out.sum().backward()
    with pytest.raises(RuntimeError, match="can be taken once"):
        model.lipschitz_loss()


def test_minimising_it_makes_the_layers_smoother():
    model = make("gin", noise=0.2)
    data = data_for(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(20):
        step(model, data)
        loss = model.lipschitz_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_it_can_be_taken_once_and_only_after_training():
    model = make("gin", noise=0.2)
    data = data_for(model)
    with pytest.raises(RuntimeError, match="there is no Lipschitz loss"):
        model.lipschitz_loss()
    step(model, data)
    model.lipschitz_loss()
    with pytest.raises(RuntimeError, match="can be taken once"):
        model.lipschitz_loss()
    for other in (model.eval(), make("gin"), make("gin", noise=0.2, num_layers=1)):
        step(other, data)
        with pytest.raises(RuntimeError, match="there is no Lipschitz loss"):
            other.lipschitz_loss()


def test_the_noise_does_not_reach_the_output_or_the_histories():
    torch.manual_seed(0)
    plain, noisy = make("gin"), make("gin", noise=0.5)
    data = data_for(plain)
    for batch in SubgraphLoader(data, PTR):
        assert torch.equal(step(plain, data, batch), step(noisy, data, batch))
    for one, other in zip(plain.histories, noisy.histories, strict=True):
        assert torch.equal(one.pull(), other.pull())
    assert torch.equal(plain.eval()(data.x, data.adj_t), noisy.eval()(data.x, data.adj_t))
    assert len(plain.histories[0].pull()) == NODES
