"""A chain keeps one tensor whatever its depth, and evaluates each block twice in a step."""

import pytest
import torch
from frames_zoo import WIDTH, Net, assert_same, make, wanted
from torch import nn

from recollect.frames import couple, uncouple
from recollect.memory import peak_memory

ROWS = 200
ACTIVATION = ROWS * WIDTH * 8


def kept_bytes(source, depth, **options):
    """Return the bytes that live between forward and backward above output and input."""
    torch.manual_seed(0)
    net = Net(source, depth=depth).double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    with peak_memory("cpu") as memory:
        y = net(x, **options)
        kept = memory.current_bytes
    del y
    return kept


@pytest.mark.parametrize("source", ["inverse", "coupling"])
def test_kept_bytes_are_flat_in_depth(source):
    shallow, deep = kept_bytes(source, 8), kept_bytes(source, 64)
    assert deep == shallow
    # the output, the input of the chain as long as x * 1.0 is a stage's, and the drift sample
    assert ACTIVATION <= deep <= 2 * ACTIVATION + 4096
    assert kept_bytes(source, 64, enabled=False) > 20 * deep


def test_checkpoints_keep_one_input_each():
    assert kept_bytes("checkpoint", 64) <= 66 * ACTIVATION


@pytest.mark.parametrize("source", ["inverse", "coupling"])
def test_the_peak_of_a_step_is_flat_in_depth(source):
    peaks = []
    for depth in (8, 64):
        torch.manual_seed(0)
        net = Net(source, depth=depth).double()
        x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
        for p in wanted(net, x):
            p.grad = torch.zeros_like(p)
        with peak_memory("cpu") as memory:
            net(x).sum().backward()
        peaks.append(memory.peak_bytes)
    assert peaks[1] <= 1.05 * peaks[0]


def test_dropout_keeps_no_activations():
    torch.manual_seed(0)
    kept = []
    for dropout in (0.0, 0.5):
        net = Net("coupling", depth=8, groups=2, dropout=dropout).double()
        x = torch.randn(4000, WIDTH, dtype=torch.float64, requires_grad=True)
        with peak_memory("cpu") as memory:
            y = net(x)
            kept.append(memory.current_bytes)
        del y
    # a generator's state for each block, and no mask
    assert kept[1] - kept[0] <= 16 * torch.get_rng_state().numel()


@pytest.mark.parametrize(("depth", "groups"), [(1, 2), (5, 2), (4, 3), (3, 4)])
def test_each_block_is_evaluated_exactly_twice_in_a_step(depth, groups):
    net, x = make("coupling", depth=depth, groups=groups, dropout=0.3)
    net(x).sin().sum().backward()
    assert len(net.calls) == 2 * depth * groups
    assert net.calls.count(True) == depth * groups


def test_each_checkpoint_is_evaluated_exactly_twice_in_a_step():
    net, x = make("checkpoint", depth=5)
    net(x).sin().sum().backward()
    assert len(net.calls) == 10


def test_each_invertible_function_and_inverse_run_once_in_backward():
    net, x = make("inverse", depth=5)
    net(x).sin().sum().backward()
    assert net.calls.count(False) == 5
    assert net.calls.count(True) == 10


@pytest.mark.parametrize("source", ["checkpoint", "coupling"])
def test_a_second_pass_evaluates_as_much_again(source):
    net, x = make(source, depth=4)
    loss = net(x).sin().sum()
    loss.backward(retain_graph=True)
    once = net.calls.count(True)
    loss.backward()
    assert net.calls.count(True) == 2 * once


def test_a_loss_on_the_middle_does_not_run_blocks_it_need_not():
    # While somebody holds the middle, the stages after it are not asked.
    net, x = make("coupling", depth=6, groups=2)
    middle = list(net.walk(x))
    middle[2].sin().sum().backward()
    assert net.calls.count(True) == 6


def test_held_activations_are_taken_rather_than_reconstructed():
    net, x = make("coupling", depth=4, groups=2)
    middle = list(net.walk(x))
    plain = list(net.walk(x, enabled=False))
    grads = torch.autograd.grad(middle[-1].sin().sum(), wanted(net, x))
    expected = torch.autograd.grad(plain[-1].sin().sum(), wanted(net, x))
    assert_same(grads, expected, 1e-14)


def test_jumping_knowledge_evaluates_each_block_once_more():
    net, x = make("coupling", depth=5, groups=2)
    jumps = [h.sin().sum() for h in net.walk(x)]
    sum(jumps).backward()
    assert net.calls.count(True) == 10


@pytest.mark.parametrize("anchor_every", [1, 2, 3, 100])
def test_anchors_change_memory_and_nothing_else(anchor_every):
    net, x = make("coupling", depth=7, groups=2, dropout=0.3)
    torch.manual_seed(1)
    expected = torch.autograd.grad(net(x, enabled=False).sin().sum(), wanted(net, x))
    torch.manual_seed(1)
    loss = net(x, anchor_every=anchor_every).sin().sum()
    for _ in range(2):
        assert_same(torch.autograd.grad(loss, wanted(net, x), retain_graph=True), expected)


def test_anchors_keep_every_sth_activation():
    none = kept_bytes("coupling", 12)
    for every in (2, 3, 4):
        extra = kept_bytes("coupling", 12, anchor_every=every) - none
        assert extra == pytest.approx(ACTIVATION * (11 // every), abs=100)


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_uncouple_is_the_inverse(groups, dim):
    torch.manual_seed(0)
    x = torch.randn(12, 12, 12, dtype=torch.float64)
    scales = [torch.randn((), dtype=torch.float64) for _ in range(groups)]
    blocks = [lambda z, s: torch.sin(z * s)] * groups
    args = [(s,) for s in scales]
    y = couple(blocks, x, args, dim=dim)
    assert_same(uncouple(blocks, y, args, dim=dim), x, 1e-14)


def test_the_coupling_is_the_formula():
    torch.manual_seed(0)
    fs = [nn.Linear(2, 2, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(5, 6, dtype=torch.float64)
    x1, x2, x3 = x[:, :2], x[:, 2:4], x[:, 4:]
    y1 = x1 + fs[0](x2 + x3)
    y2 = x2 + fs[1](y1)
    y3 = x3 + fs[2](y2)
    assert_same(couple(fs, x, [()] * 3), torch.cat([y1, y2, y3], -1), 1e-15)


def test_couplings_along_different_dimensions_and_groups():
    torch.manual_seed(0)
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)

    def block(z):
        return (z * 1.7).sin()

    def run(enabled):
        h = x * 1.0
        for groups, dim in ((2, -1), (3, -1), (2, 0), (3, 0), (4, 1)):
            h = couple([block] * groups, h, [()] * groups, dim=dim, enabled=enabled)
        return torch.autograd.grad((h * h.detach().sin()).sum(), x)

    assert_same(run(True), run(False))


def test_blocks_of_different_precision():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)

    def low(z):
        return z.sin()

    def high(z):
        return z.sin().exp().float()

    y = couple([low, high], x, [(), ()])
    assert y.dtype is torch.float32
    y.sum().backward()


def test_arguments_with_gradients_of_every_layer():
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, 1, dtype=torch.float64, requires_grad=True)

    def block(z, w, nothing, extra):
        assert nothing is None
        return torch.tanh(z * w) * extra["scale"]

    def run(enabled):
        h = x * 1.0
        scale = weight.exp()
        for _ in range(4):
            h = couple([block, block], h, [(scale, None, {"scale": weight})] * 2, enabled=enabled)
        return torch.autograd.grad(h.sin().sum(), [x, weight])

    assert_same(run(True), run(False))


def test_the_initial_features_as_an_argument_of_every_layer():
    torch.manual_seed(0)
    net, x = make("coupling", groups=2, depth=1)

    def block(z, first):
        return torch.tanh(z + first[:, : z.shape[1]])

    def run(enabled):
        first = h = net(x, enabled)
        for _ in range(4):
            h = couple([block, block], h, [(first,), (first,)], enabled=enabled)
        return torch.autograd.grad(h.sin().sum(), wanted(net, x))

    assert_same(run(True), run(False))
