"""What cheap functions return is dropped and made again, bit for bit, beside a plain run that keeps it."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from recollect.budget._recipes import has_recipe, run_sparingly
from recollect.frames import InPlaceError, RebuildError, certificate_of_process
from recollect.memory import peak_memory

WIDTH = 32


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.both, self.out = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        a, b = self.both(self.norm(x)).chunk(2, -1)
        return x + self.out(F.silu(a.contiguous()) * b.contiguous())


class Functions(nn.Module):
    """Norms and activations as functions and methods, with views of what they return in between."""

    def __init__(self):
        super().__init__()
        self.lin, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH // 2, WIDTH)

    def forward(self, x):
        y = F.layer_norm(self.lin(x), (WIDTH,)).t().relu().t().view(-1, 2, WIDTH // 2)
        return self.out(y).mean(1) + self.out(y[:, 0]).sigmoid()


def images(*layers):
    return nn.Sequential(nn.Unflatten(1, (2, 4, 4)), *layers, nn.Flatten())


UNITS = {
    "transformer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, activation="gelu", norm_first=True),
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH), nn.ReLU(), nn.LayerNorm(WIDTH)),
    "in place": lambda: images(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 3, padding=1)
    ),
    "leaky": lambda: images(
        nn.Conv2d(2, 8, 1), nn.GroupNorm(2, 8), nn.LeakyReLU(0.1, True), nn.Conv2d(8, 2, 1), nn.ELU(1.0, True)
    ),
    "evaluated": lambda: images(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8).eval(), nn.ReLU6(True), nn.Conv2d(8, 2, 1)),
    "gated": Gated,
    "functions": Functions,
    "dropout": lambda: nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
        nn.Dropout(0.1),
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", UNITS)


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    return UNITS[name]().to(dtype), torch.randn(48, WIDTH, dtype=dtype, requires_grad=True)


def plainly(function, args, kwargs):
    return function(*args, **kwargs)


def results(run, name, times=1):
    """The output, gradients and buffers of a unit that is called ``times`` in a row."""
    unit, x = made(name)
    y = x
    for _ in range(times):
        y = run(unit, (y,), {})
    leaves = [x, *unit.parameters()]
    loss = y.sin().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    curvature = torch.autograd.grad(slope.square().sum(), leaves, allow_unused=True)
    return [y, *first, *again, *curvature, *unit.buffers()]


@each
@pytest.mark.parametrize("times", [1, 3])
def test_gradients_are_those_of_a_plain_run_bit_for_bit(name, times):
    with sdpa_kernel(SDPBackend.MATH):  # which has a second derivative
        found, expected = results(run_sparingly, name, times), results(plainly, name, times)
    for ours, plain in zip(found, expected, strict=True):
        assert (ours is None) == (plain is None)
        assert ours is None or torch.equal(ours, plain)


def kept_by(run, name):
    unit, x = made(name)
    with peak_memory("cpu") as memory:
        y = run(unit, (x,), {})
    assert y.requires_grad
    return memory.current_bytes


@each
def test_what_is_dropped_is_not_kept(name):
    dropped = {"transformer": 2 * 48 * WIDTH + 48 * 64, "mlp": 48 * 64, "in place": 48 * 128, "leaky": 48 * 128,
               "evaluated": 48 * 128, "gated": 48 * WIDTH * 3, "functions": 48 * WIDTH, "dropout": 0}[name]  # fmt: skip
    # Not all of it at once: what one of them returns is the input of the other.
    assert kept_by(plainly, name) - kept_by(run_sparingly, name) >= dropped * 8 * (0.6 if name == "gated" else 1.0)


def test_a_layer_before_gives_the_next_one_its_input_again():
    """Of a row that ends with norms, neither the norms' outputs nor the inputs of the layers behind are kept."""
    unit, x = made("mlp")
    with peak_memory("cpu") as memory:
        y = x
        for _ in range(4):
            y = run_sparingly(unit, (y,), {})
    numbers = 48 * (64 + WIDTH)  # what the first product returns, and what the second activation does
    assert memory.current_bytes <= 4 * numbers * 8 + y.nbytes + 4 * 2 * 48 * 8


def test_what_somebody_holds_does_not_hold_what_made_it():
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    with peak_memory("cpu") as memory:
        y = run_sparingly(layer, (torch.randn(256, WIDTH),), {})
        assert has_recipe(y)
        y.sum().backward()
    gradients = sum(p.grad.nbytes for p in layer.parameters())
    assert memory.current_bytes == y.nbytes + gradients


@pytest.mark.parametrize("what", ["parameter", "input"])
def test_what_was_changed_in_between_is_an_error(what):
    unit, _ = made("mlp")
    y = torch.randn(64, WIDTH, dtype=torch.float64, requires_grad=True) * 1
    norm = nn.LayerNorm(WIDTH).double()
    if what == "parameter":
        out = run_sparingly(nn.Sequential(norm, unit), (y,), {})
        with torch.no_grad():
            norm.bias.add_(1.0)
    else:
        out = run_sparingly(nn.Sequential(norm, unit), (y,), {})
        y.add_(1.0)
    with pytest.raises(InPlaceError, match="was changed in place"):
        out.sum().backward()


@pytest.mark.parametrize("batched", [False, True])
def test_what_was_changed_without_a_count_is_an_error(batched):
    norm, product = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
    unit, x = nn.Sequential(norm, product), torch.randn(64, WIDTH)

    def gradient(certify):
        out = run_sparingly(unit, (x,), {}, certify)
        norm.bias.data.mul_(0.5).add_(1.0)
        rows = torch.ones(2, *out.shape)
        return torch.autograd.grad(out, product.weight, rows if batched else rows[0], is_grads_batched=batched)[0]

    for certify in (True, "exact"):
        with pytest.raises(RebuildError, match=r"Linear.*what a function returned, float32\[64, 32\] .* other values"):
            gradient(certify)
    assert gradient(False).isfinite().all()  # nothing is compared


def test_what_is_made_again_is_counted():
    certificate_of_process.reset()
    unit, x = made("mlp")
    run_sparingly(unit, (x,), {}).sum().backward()
    assert (certificate_of_process.equal, certificate_of_process.rounded) == (1, 0)  # of GELU


def test_an_output_that_was_changed_is_an_error_as_without():
    out = run_sparingly(torch.exp, (torch.randn(64, WIDTH, requires_grad=True),), {})
    out.add_(1.0)
    with pytest.raises(InPlaceError, match="was changed in place"):
        out.sum().backward()


def test_a_product_that_is_overwritten_by_an_activation_is_kept():
    unit = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)).double()
    x = torch.randn(48, WIDTH, dtype=torch.float64)
    found = torch.autograd.grad(run_sparingly(unit, (x,), {}).sum(), list(unit.parameters()))
    assert all(map(torch.equal, found, torch.autograd.grad(unit(x).sum(), list(unit.parameters()))))


def test_products_are_not_computed_again_and_each_cheap_function_once_for_all_that_wait():
    computed = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            computed.append(func.name())
            return func(*args, **(kwargs or {}))

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.parts = nn.LayerNorm(WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            h = self.norm(x)
            return sum(part(h) for part in self.parts)

    unit, x = Three(), torch.randn(48, WIDTH, requires_grad=True)
    loss = run_sparingly(unit, (x,), {}).sum()
    for _ in range(2):
        with Seen():
            torch.autograd.grad(loss, list(unit.parameters()), retain_graph=True)
        assert computed.count("aten::native_layer_norm") == 1
        assert "aten::addmm" not in computed
        computed.clear()


def test_under_autocast_and_batched_gradients():
    unit, x = made("mlp", torch.float32)
    found = []
    for run in (plainly, run_sparingly):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(unit, (x,), {})
        found.append(torch.autograd.grad(y.sum(), [x, *unit.parameters()], retain_graph=True))
        rows = torch.eye(3, y.numel()).view(3, *y.shape).to(y.dtype)
        found[-1] += torch.autograd.grad(y, x, rows, is_grads_batched=True)
    assert all(map(torch.equal, *found))


def test_graphs_are_freed_by_counting_references():
    unit, x = made("mlp")
    within = []
    unit[1].register_forward_pre_hook(lambda _, args: within.append(weakref.ref(args[0].untyped_storage())))
    y = run_sparingly(unit, (x,), {})
    assert within[0]() is not None
    gc.disable()
    try:
        del y
        assert within[0]() is None
    finally:
        gc.enable()


def test_a_graph_does_not_hold_the_unit():
    unit, x = made("mlp")
    gone = weakref.ref(unit)
    gc.disable()
    try:
        y = run_sparingly(unit, (x,), {})
        del unit
        assert gone() is None
    finally:
        gc.enable()
    y.sum().backward()
