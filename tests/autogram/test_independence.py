"""What mixes the batch is refused by name; what has none is not."""

import pytest
import torch
from autogram_zoo import explicit_gramian, relative_error
from torch import nn

from recollect.autogram import Engine


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).double()


def losses_of(model, batch=5):
    return model(torch.randn(batch, 4, dtype=torch.float64)).square().sum(1)


def test_the_error_names_both_sides():
    model = net(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match=r"mixed after '0' \(Linear\), in or before '1' \(BatchNorm1d\).*batch_dim=None"
    ):
        Engine(model, batch_dim=0).compute_gramian(losses_of(model))


def test_the_losses_mix_the_batch():
    model = net(nn.Linear(4, 3))
    engine = Engine(model, batch_dim=0)
    losses = losses_of(model)
    with pytest.raises(ValueError, match=r"mixed after '0' \(Linear\)\."):
        engine.compute_gramian(losses / losses.sum())


def test_a_refusal_leaves_nothing_behind():
    model = net(nn.Linear(4, 3), nn.BatchNorm1d(3))
    engine = Engine(model, batch_dim=0)
    for _ in range(2):
        with pytest.raises(ValueError, match="mixed"):
            engine.compute_gramian(losses_of(model))
    model.eval()
    assert engine.compute_gramian(losses_of(model)).shape == (5, 5)


@pytest.mark.parametrize("whole", [True, False], ids=["of the engine", "of another"])
def test_a_norm_that_goes_back_to_training_is_refused_then(whole):
    model = net(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    engine = Engine(model if whole else model[0], batch_dim=0)
    engine.compute_gramian(losses_of(model))
    model.train()
    losses = losses_of(model)
    with pytest.raises(ValueError, match="mixed"):
        engine.compute_gramian(losses)


def test_a_model_that_comes_to_mix_is_refused_then():
    model = net(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(losses_of(model))
    mixed = model(torch.randn(5, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="mixed"):
        engine.compute_gramian((mixed - mixed.mean(0)).square().sum(1))


class Positions(nn.Module):
    """A table of as many positions as there are elements."""

    def __init__(self, size):
        super().__init__()
        self.table, self.last = nn.Embedding(size, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last((x.unsqueeze(1) + self.table(torch.arange(self.table.num_embeddings))).tanh()).flatten(1)


@pytest.mark.parametrize("size", [5, 3, 10])
def test_what_has_no_batch_is_not_refused(size):
    torch.manual_seed(0)
    model = Positions(size).double()
    losses = losses_of(model)
    parameters, rows = list(model.parameters()), []
    for loss in losses:
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]))
    jacobian = torch.stack(rows)
    torch.testing.assert_close(Engine(model, batch_dim=0).compute_gramian(losses), jacobian @ jacobian.T)


def test_a_choice_is_made_once_for_a_form(monkeypatch):
    from recollect.autogram import _engine, _structure

    calls = []
    original = _structure.find_structure
    monkeypatch.setattr(_engine, "find_structure", lambda *args: calls.append(1) or original(*args))
    model = net(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    engine = Engine(model, batch_dim=0)
    for batch in (5, 5, 7, 5, 7):
        engine.compute_gramian(losses_of(model, batch))
    assert len(calls) == 2
    engine.compute_gramian(losses_of(model).sin())
    assert len(calls) == 3


class Leak(nn.Module):
    """Each element has a little of its neighbour."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        return x + self.share * x.roll(1, 0)


@pytest.mark.parametrize("batch_dim", [0, "auto"])
@pytest.mark.parametrize("batch", [2, 3, 16, 17])
def test_a_little_of_another_element_counts(batch, batch_dim):
    """Where elements go is not looked at, so what is behind goes by rows."""
    model = net(nn.Linear(4, 3), nn.Tanh(), Leak(1e-4), nn.Linear(3, 2))
    engine = Engine(model, batch_dim=batch_dim)
    losses = losses_of(model, batch)
    assert relative_error(engine.compute_gramian(losses), explicit_gramian(losses, list(model.parameters()))) <= 1e-12


@pytest.mark.parametrize("batch", [2, 16])
def test_numbers_of_little_range_are_scaled_less(batch):
    """Gradients of some hundreds must not leave the range of float16, which ends at 65,504."""
    model = net(nn.Linear(4, 3), nn.Linear(3, 2)).float()
    engine = Engine(model, batch_dim=0)
    with torch.autocast("cpu", torch.float16):
        losses = 200 * model(torch.randn(batch, 4, generator=torch.Generator().manual_seed(0))).float().sum(1)
    assert engine.compute_gramian(losses).isfinite().all()
