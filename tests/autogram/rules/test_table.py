"""The table of rules as a whole: what is in it, and that engines use it."""

import inspect

import pytest
import torch
from rule_layers import CONVS, NORMS, drawn_conv, drawn_norm
from torch import nn

from recollect.autogram import Engine, _sweep
from recollect.autogram.rules import RULES

CONV_TYPES = {getattr(nn, f"Conv{turn}{n}d") for n in (1, 2, 3) for turn in ("", "Transpose")}
NORM_TYPES = {getattr(nn, f"{kind}Norm{n}d") for n in (1, 2, 3) for kind in ("Batch", "Instance")}
NORM_TYPES |= {nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.SyncBatchNorm}
RECURRENT = {nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell}
OTHERS = {nn.Linear, nn.Bilinear, nn.PReLU, nn.Embedding, nn.EmbeddingBag, "torch_geometric.nn.dense.linear.Linear"}


def test_contents():
    assert set(RULES) == CONV_TYPES | NORM_TYPES | RECURRENT | OTHERS


def makes_parameters(kind):
    return any("Parameter(" in inspect.getsource(base) for base in kind.__mro__[: kind.__mro__.index(nn.Module)])


def test_every_layer_of_torch_with_parameters_is_known():
    """One that a new version brings is noticed here."""
    kinds = [kind for name in dir(nn) if isinstance(kind := getattr(nn, name), type) and issubclass(kind, nn.Module)]
    kinds = {kind for kind in kinds if kind.forward is not nn.Module.forward and makes_parameters(kind)}
    turned = {kind for kind in kinds if issubclass(kind, nn.modules.lazy.LazyModuleMixin)}  # into others, when called
    assert {kind.cls_to_become for kind in turned} <= set(RULES)
    assert kinds - turned - set(RULES) == {nn.MultiheadAttention}  # see test_attention.py


@pytest.fixture
def rules_alone(monkeypatch):
    """Fails where an engine finds rows by anything but a rule."""
    monkeypatch.setattr(_sweep, "rows_at", lambda node, *_: pytest.fail(f"no rule for what {node} uses"))


def check(layer, *inputs):
    engine = Engine(layer, batch_dim=0)
    output = layer(*inputs)
    output = (output[0] if isinstance(output, tuple) else output).flatten(1)
    losses = (output * torch.linspace(1, 2, output.shape[1], dtype=output.dtype)).square().sum(1)
    parameters = list(layer.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([grad.to_dense().flatten() for grad in row]) for row in rows])
    expected = jacobian @ jacobian.T
    torch.testing.assert_close(engine.compute_gramian(losses), expected, rtol=0, atol=1e-10 * expected.max().item())


@pytest.mark.parametrize("name", NORMS)
def test_engines_ask_the_rules_of_norms(name, rules_alone):
    layer, x = drawn_norm(name)
    check(layer, x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVS)
def test_engines_ask_the_rules_of_convolutions(name, rules_alone):
    layer, x = drawn_conv(name)
    check(layer, x)


INDEX = torch.tensor([[1, 1, 2], [0, 4, 2]])
OTHER_LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (2, 5, 3)),
    "prelu": (lambda: nn.PReLU(3), (2, 3, 4)),
    "embedding": (lambda: nn.Embedding(5, 3), INDEX),
    "sparse embedding": (lambda: nn.Embedding(5, 3, sparse=True), INDEX),
    "bags": (lambda: nn.EmbeddingBag(5, 3), INDEX),
    "rnn": (lambda: nn.RNN(3, 4, 2, batch_first=True), (2, 5, 3)),
    "gru": (lambda: nn.GRU(3, 4, bidirectional=True, batch_first=True), (2, 5, 3)),
    "lstm": (lambda: nn.LSTM(3, 4, batch_first=True), (2, 5, 3)),
    "rnn cell": (lambda: nn.RNNCell(3, 4), (2, 3)),
    "gru cell": (lambda: nn.GRUCell(3, 4), (2, 3)),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), (2, 3)),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_engines_ask_the_rules_of_other_layers(name, rules_alone):
    make, x = OTHER_LAYERS[name]
    check(make().double(), torch.randn(x, dtype=torch.float64) if isinstance(x, tuple) else x)


def test_engines_ask_the_rules_of_bags_at_offsets_and_of_pairs(rules_alone):
    check(nn.EmbeddingBag(5, 3).double(), torch.tensor([1, 1, 2, 0, 4]), torch.tensor([0, 3, 3]))
    check(nn.Bilinear(3, 2, 4).double(), *(torch.randn(2, size, dtype=torch.float64) for size in (3, 2)))
