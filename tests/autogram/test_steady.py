"""Operations that keep the elements of a batch apart with some numbers and mix them with others."""

import pytest
import torch
from autogram_zoo import explicit_gramian, relative_error
from torch import nn
from torch.nn import functional as F

from recollect.autogram import Engine, _recall

BATCH = 6


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


# What is done to activations [B, C] with a matrix [B, B]; with the identity's numbers, nothing that mixes them.
MIXING = {
    "solve": (lambda h, m: torch.linalg.solve(m, h), torch.eye(BATCH), draw(BATCH, BATCH)),
    "solve_triangular": (
        lambda h, m: torch.linalg.solve_triangular(m, h, upper=True),
        torch.eye(BATCH),
        draw(BATCH, BATCH).triu() + 3 * torch.eye(BATCH),
    ),
    "cholesky_solve": (
        lambda h, m: torch.cholesky_solve(h, m),
        torch.eye(BATCH),
        draw(BATCH, BATCH).tril() + 3 * torch.eye(BATCH),
    ),
    "filter": (
        lambda h, m: torch.fft.ifft(torch.fft.fft(h, dim=0) * m, dim=0).real,
        torch.ones(BATCH, 1),
        draw(BATCH, 1),
    ),
    "convolution": (
        lambda h, m: F.conv1d(h.T[:, None], m, padding=1)[:, 0].T,
        torch.tensor([[[0.0, 1.0, 0.0]]]),
        draw(1, 1, 3),
    ),
    "matmul": (lambda h, m: m @ h, torch.eye(BATCH), draw(BATCH, BATCH)),
    "softmax": (
        lambda h, m: (h[:, None] + m).softmax(0).diagonal().T,
        -1e9 * (1 - torch.eye(BATCH)[..., None].expand(BATCH, BATCH, 4)),
        torch.zeros(BATCH, BATCH, 4),
    ),
    # The batch has no place in the mean, and its gradient is zero the first time.
    "factor": (lambda h, m: h + m * h.mean(0), torch.zeros(()), torch.ones(())),
    "activation": (lambda h, m: h + F.relu(h.mean(0) + m), torch.tensor(-9.0), torch.tensor(2.0)),
    "running sum": (lambda h, m: h + (m * h).cumsum(0), torch.zeros(()), torch.ones(())),
}

EXACT = ("matmul", "softmax")  # what is done to the losses alone may mix them


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_the_batch_only_the_second_time(name):
    operation, apart, mixing = MIXING[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    engine = Engine(net, batch_dim=0)

    def losses(matrix):
        return operation(net(draw(BATCH, 3)), matrix.double()).sin().sum(1)

    expected = explicit_gramian(losses(apart), list(net.parameters()))
    assert relative_error(engine.compute_gramian(losses(apart)), expected) <= 1e-10
    mixed = losses(mixing)
    if name in EXACT:
        expected = explicit_gramian(mixed, list(net.parameters()))
        assert relative_error(engine.compute_gramian(mixed), expected) <= 1e-10
    else:
        with pytest.raises(ValueError, match="treat the elements of a batch independently"):
            engine.compute_gramian(mixed)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.encoder(self.table(x)).mean(1))


def image_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.InstanceNorm2d(4, affine=True),
        nn.SiLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.PReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 5),
    )


@pytest.mark.parametrize(
    ("make", "x"),
    [
        pytest.param(image_net, draw(BATCH, 3, 16, 16), id="images"),
        pytest.param(Words, torch.arange(4 * BATCH).view(BATCH, 4) % 10, id="words"),
    ],
)
def test_ordinary_networks_are_looked_at_once(make, x, monkeypatch):
    calls = []
    original = _recall.probe
    monkeypatch.setattr(_recall, "probe", lambda *args: calls.append(1) or original(*args))
    torch.manual_seed(0)
    net = make().double()
    engine = Engine(net, batch_dim=0)
    for _ in range(3):
        losses = F.cross_entropy(net(x), torch.arange(BATCH) % 5, reduction="none")
        expected = explicit_gramian(losses, list(net.parameters()))
        assert relative_error(engine.compute_gramian(losses), expected) <= 1e-9
    assert len(calls) == 1
