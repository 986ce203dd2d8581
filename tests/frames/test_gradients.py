"""Whatever one asks of autograd, a graph with frames answers as the plain graph does."""

import copy
import io
import pickle

import pytest
import torch
from frames_zoo import WIDTH, Block, Net, assert_same, each_source, make, nothing_left, wanted
from torch import nn

import recollect
from recollect.frames import couple
from recollect.memory import peak_memory


def loss_of(y):
    return (y.sin() * torch.linspace(0.5, 2.0, y.numel(), dtype=y.dtype).view_as(y)).sum()


@each_source
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("norm", [False, True])
def test_equal_plain_autograd(source, dropout, norm):
    net, x = make(source, dropout=dropout, norm=norm)
    torch.manual_seed(1)
    y = net(x, enabled=False)
    expected = torch.autograd.grad(loss_of(y), wanted(net, x))
    torch.manual_seed(1)
    framed = net(x)
    assert torch.equal(framed, y)
    assert_same(torch.autograd.grad(loss_of(framed), wanted(net, x)), expected)


@each_source
def test_any_number_of_backward_passes_with_retain_graph(source):
    net, x = make(source, dropout=0.4)
    torch.manual_seed(1)
    expected = torch.autograd.grad(loss_of(net(x, enabled=False)), wanted(net, x))
    torch.manual_seed(1)
    loss = loss_of(net(x))
    for _ in range(3):
        assert_same(torch.autograd.grad(loss, wanted(net, x), retain_graph=True), expected)
        torch.rand(3)  # other draws between the passes must not matter
    assert_same(torch.autograd.grad(loss, wanted(net, x)), expected)


@each_source
def test_backward_accumulates_into_grad(source):
    net, x = make(source)
    expected = torch.autograd.grad(loss_of(net(x, enabled=False)), wanted(net, x))
    loss = loss_of(net(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same([t.grad for t in wanted(net, x)], [2 * e for e in expected])


@each_source
def test_gradient_of_each_tensor_alone(source):
    net, x = make(source, dropout=0.4)
    torch.manual_seed(1)
    expected = torch.autograd.grad(loss_of(net(x, enabled=False)), wanted(net, x))
    torch.manual_seed(1)
    loss = loss_of(net(x))
    order = list(enumerate(wanted(net, x)))
    for i, tensor in order[::-3] + order[::2]:
        assert_same(torch.autograd.grad(loss, tensor, retain_graph=True), expected[i])


@each_source
def test_gradient_with_respect_to_every_activation_in_the_middle(source):
    net, x = make(source, depth=3)
    grads = []
    for enabled in (False, True):
        middle = list(net.walk(x, enabled))
        grads.append(torch.autograd.grad(loss_of(middle[-1]), middle[:-1]))
    assert_same(grads[1], grads[0])


@each_source
def test_leftovers_of_subset_gradients_do_not_pile_up(source):
    # After a gradient for the first parameters only, at most one frame's leftovers may stay; as many passes as one
    # likes add nothing.
    net, x = make(source, depth=6, width=WIDTH)
    loss = loss_of(net(x))
    target = net.blocks[0].first.bias

    def grow(passes):
        with peak_memory("cpu") as memory:
            for _ in range(passes):
                torch.autograd.grad(loss, target, retain_graph=True)
        return memory.current_bytes

    grow(1)
    assert grow(5) <= 0


@each_source
def test_activation_with_two_consumers(source):
    net, x = make(source)
    side, _ = make(source, depth=2)

    def run(enabled):
        a, b, *_, last = net.walk(x, enabled)
        return loss_of(last) + loss_of(side(a, enabled)) + loss_of(a * b)

    params = [*wanted(net, x), *side.parameters()]
    expected = torch.autograd.grad(run(False), params)
    assert_same(torch.autograd.grad(run(True), params), expected)


@each_source
def test_two_chains_from_one_activation(source):
    # The first stage that takes the activation links it; the second must find it all the same, in whichever order
    # they go backward.
    net, x = make(source, depth=1)
    left, _ = make(source, depth=3)
    right, _ = make(source, depth=2)
    params = [*wanted(net, x), *left.parameters(), *right.parameters()]

    def run(enabled):
        h = net(x, enabled)
        first, second = left.layers[0], right.layers[0]
        a, b = left.step(first, h, enabled), right.step(second, h, enabled)
        return a, b

    for pick in (lambda a, b: a.sin().sum(), lambda a, b: b.sin().sum(), lambda a, b: (a.sin() * b).sum()):
        expected = torch.autograd.grad(pick(*run(False)), params, allow_unused=True)
        assert_same(torch.autograd.grad(pick(*run(True)), params, allow_unused=True), expected)


@each_source
def test_jumping_knowledge(source):
    net, x = make(source, dropout=0.3)
    grads = []
    for enabled in (False, True):
        torch.manual_seed(1)
        jumps = torch.cat([h.tanh() for h in net.walk(x, enabled)], -1)
        grads.append(torch.autograd.grad(loss_of(jumps), wanted(net, x)))
    assert_same(grads[1], grads[0])


@each_source
@pytest.mark.parametrize("keep_last", [True, False])
def test_loss_on_the_middle_of_a_chain(source, keep_last):
    net, x = make(source, depth=5)
    grads = []
    for enabled in (False, True):
        a, b, c, *rest = net.walk(x, enabled)
        loss = loss_of(b)
        if not keep_last:
            del rest, a, b, c
        grads.append(torch.autograd.grad(loss, wanted(net, x), allow_unused=True))
    assert_same(grads[1], grads[0])


def nested_checkpoint(net, x, enabled):
    def outer(h):
        for layer in net.layers:
            h = net.step(layer, h, enabled)
        return h.sin()

    return recollect.checkpoint(lambda h: recollect.checkpoint(outer, h.cos(), enabled=enabled), x, enabled=enabled)


@each_source
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_chain_in_checkpoint_in_checkpoint(source, dropout):
    net, x = make(source, dropout=dropout, norm=True)
    torch.manual_seed(1)
    expected = torch.autograd.grad(loss_of(nested_checkpoint(net, x, False)), wanted(net, x))
    torch.manual_seed(1)
    loss = loss_of(nested_checkpoint(net, x, True))
    for _ in range(2):
        assert_same(torch.autograd.grad(loss, wanted(net, x), retain_graph=True), expected)


@pytest.mark.parametrize(
    "source",
    [
        "checkpoint",
        *(pytest.param(source) for source in ("inverse", "coupling")),
    ],
)
def test_chain_that_goes_on_inside_a_checkpoint(source):
    net, x = make(source, depth=5, dropout=0.3)
    grads = []
    for enabled in (False, True):
        torch.manual_seed(1)

        def middle(h, enabled=enabled):
            for layer in net.layers[2:4]:
                h = net.step(layer, h, enabled)
            return h

        h = x * 1.0
        for layer in net.layers[:2]:
            h = net.step(layer, h, enabled)
        h = net.step(net.layers[4], recollect.checkpoint(middle, h, enabled=enabled), enabled)
        grads.append(torch.autograd.grad(loss_of(h), wanted(net, x)))
    assert_same(grads[1], grads[0])


class CheckpointedBlock(Block):
    enabled = True

    def forward(self, z):
        return recollect.checkpoint(super().forward, z, enabled=self.enabled).sin()


@pytest.mark.parametrize("retain", [False, True])
def test_checkpoint_in_a_coupling_block(retain):
    torch.manual_seed(0)
    blocks = nn.ModuleList(CheckpointedBlock(4, dropout=0.4) for _ in range(3)).double()
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    grads = []
    for enabled in (False, True):
        for block in blocks:
            block.enabled = enabled
        torch.manual_seed(1)
        h = x * 1.0
        for _ in range(3):
            h = couple(blocks, h, [()] * 3, enabled=enabled)
        loss = loss_of(h)
        if retain:
            torch.autograd.grad(loss, wanted(blocks, x), retain_graph=True)
        grads.append(torch.autograd.grad(loss, wanted(blocks, x)))
    assert_same(grads[1], grads[0])


def test_coupling_within_a_coupling_block():
    torch.manual_seed(0)
    inner = nn.ModuleList(Block(2, dropout=0.4) for _ in range(2)).double()
    other = Block(4).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    grads = []
    for enabled in (False, True):
        torch.manual_seed(1)

        def block(z, enabled=enabled):
            for _ in range(2):
                z = couple(inner, z, [(), ()], enabled=enabled)
            return z

        h = couple(
            [block, other], couple([block, other], x * 1.0, [(), ()], enabled=enabled), [(), ()], enabled=enabled
        )
        grads.append(torch.autograd.grad(loss_of(h), [x, *inner.parameters(), *other.parameters()]))
    assert_same(grads[1], grads[0])


@each_source
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_is_grads_batched(source, dropout):
    net, x = make(source, dropout=dropout)
    vectors = torch.randn(5, 7, WIDTH, dtype=torch.float64)
    grads = []
    for enabled in (False, True):
        torch.manual_seed(1)
        y = net(x, enabled)
        grads.append(torch.autograd.grad(y, wanted(net, x), vectors, is_grads_batched=True))
    assert_same(grads[1], grads[0])
    nothing_left()
    torch._C._vmapmode_increment_nesting()
    assert torch._C._vmapmode_decrement_nesting() == 0


@each_source
def test_parameter_hooks_run_once(source):
    net, x = make(source)
    ran, accumulated = [], []
    for p in net.parameters():
        p.register_hook(lambda g: ran.append(1))
        p.register_post_accumulate_grad_hook(lambda p: accumulated.append(1))
    loss_of(net(x)).backward()
    assert len(ran) == len(accumulated) == len(list(net.parameters()))


@each_source
def test_a_hook_may_change_the_gradient(source):
    net, x = make(source)
    grads = []
    for enabled in (False, True):
        h = net(x, enabled)
        middle = list(net.walk(x, enabled))
        middle[1].register_hook(lambda g: g * 3)
        grads.append(torch.autograd.grad(loss_of(middle[-1]) + loss_of(h), wanted(net, x)))
    assert_same(grads[1], grads[0])


@each_source
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_kept_or_rebuilt(source, mode):
    net, x = make(source, depth=6)
    with mode(), peak_memory("cpu") as memory:
        y = net(x)
    assert not y.requires_grad
    assert len(net.calls) == len(net.blocks)
    assert not any(net.calls)
    assert memory.current_bytes == y.untyped_storage().nbytes()


@each_source
def test_an_inference_tensor_as_input(source):
    net, _ = make(source)
    with torch.inference_mode():
        x = torch.randn(7, WIDTH, dtype=torch.float64)
    grads = []
    for enabled in (False, True):
        h = x.clone()
        for layer in net.layers:
            h = net.step(layer, h, enabled)
        grads.append(torch.autograd.grad(loss_of(h), list(net.parameters())))
    assert_same(grads[1], grads[0])


@each_source
def test_nothing_is_rebuilt_without_backward(source):
    net, x = make(source)
    net(x)
    assert not any(net.calls)


@each_source
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_modules_after_a_forward(source, duplicate):
    net, x = make(source, norm=True)
    y = net(x)  # a graph is alive while the copy is made
    other = duplicate(net)
    expected = torch.autograd.grad(loss_of(other(x, enabled=False)), wanted(other, x))
    assert_same(torch.autograd.grad(loss_of(other(x)), wanted(other, x)), expected)
    assert_same(torch.autograd.grad(loss_of(y), wanted(net, x)), expected)


@each_source
def test_modules_load_with_torch_load_and_weights_only_state(source):
    net, x = make(source)
    buffer = io.BytesIO()
    loss_of(net(x)).backward()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other, _ = make(source)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), net(x))


@each_source
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_derivative(source, dropout):
    net, x = make(source, depth=3, dropout=dropout)
    grads = []
    for enabled in (False, True):
        torch.manual_seed(1)
        first = torch.autograd.grad(loss_of(net(x, enabled)), wanted(net, x), create_graph=True)
        penalty = sum((g * g).sum() for g in first)
        grads.append((*first, *torch.autograd.grad(penalty, wanted(net, x), allow_unused=True)))
    assert_same(grads[1], grads[0], 1e-9)


@each_source
def test_gradgradcheck(source):
    torch.manual_seed(0)
    net = Net(source, depth=2, groups=2, width=4).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, x)
    assert torch.autograd.gradgradcheck(net, x)


@each_source
def test_frozen_parameters(source):
    net, x = make(source)
    for i, p in enumerate(net.parameters()):
        p.requires_grad_(i % 3 == 0)
    params = [x, *(p for p in net.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(loss_of(net(x, enabled=False)), params)
    assert_same(torch.autograd.grad(loss_of(net(x)), params), expected)


@each_source
def test_everything_frozen_but_the_input(source):
    net, x = make(source)
    net.requires_grad_(False)
    expected = torch.autograd.grad(loss_of(net(x, enabled=False)), x)
    assert_same(torch.autograd.grad(loss_of(net(x)), x), expected)


@each_source
def test_input_without_grad(source):
    net, x = make(source)
    x = x.detach()
    params = list(net.parameters())
    expected = torch.autograd.grad(loss_of(net(x, enabled=False)), params)
    assert_same(torch.autograd.grad(loss_of(net(x)), params), expected)


@each_source
def test_nothing_requires_grad(source):
    net, x = make(source)
    net.requires_grad_(False)
    y = net(x.detach())
    assert not y.requires_grad
    assert torch.equal(y, net(x.detach(), enabled=False))


@each_source
def test_leaf_input_of_the_first_stage(source):
    net, x = make(source)
    grads = []
    for enabled in (False, True):
        h = x
        for layer in net.layers:
            h = net.step(layer, h, enabled)
        grads.append(torch.autograd.grad(loss_of(h), wanted(net, x)))
    assert_same(grads[1], grads[0])


@each_source
def test_tied_layers(source):
    net, x = make(source, depth=1, dropout=0.3)
    net.layers.extend([net.layers[0]] * 4)
    grads = []
    for enabled in (False, True):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(loss_of(net(x, enabled)), wanted(net, x)))
    assert_same(grads[1], grads[0])


@each_source
@pytest.mark.parametrize("shape", [(0, WIDTH), (2, 0, WIDTH), (1, WIDTH), (2, 3, WIDTH)])
def test_empty_and_odd_batches(source, shape):
    net, _ = make(source)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(loss_of(net(x, enabled=False)), wanted(net, x))
    assert_same(torch.autograd.grad(loss_of(net(x)), wanted(net, x)), expected)


@each_source
@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced"])
def test_non_contiguous_input(source, layout):
    net, _ = make(source)
    big = torch.randn(14, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    view = {
        "transposed": lambda: (big * 1.0)[:WIDTH, :7].t(),
        "strided": lambda: (big * 1.0)[::2, ::2],
        "sliced": lambda: (big * 1.0)[3:10, 5 : 5 + WIDTH],
    }[layout]
    grads = []
    for enabled in (False, True):
        h = view()
        for layer in net.layers:
            h = net.step(layer, h, enabled)
        grads.append(torch.autograd.grad(loss_of(h), wanted(net, big)))
    assert_same(grads[1], grads[0])


@each_source
def test_the_input_is_left_as_it_is(source):
    net, x = make(source)
    for training in (True, False):
        net.train(training)
        h = x * 1.0
        before = h.detach().clone()
        y = net.step(net.layers[0], h, True)
        assert torch.equal(h, before)
        z = (y + h).sin().sum()  # a skip connection around the frame
        expected = torch.autograd.grad((net.step(net.layers[0], x * 1.0, False) + x).sin().sum(), x)
        assert_same(torch.autograd.grad(z, x), expected)


@pytest.mark.parametrize("source", ["checkpoint", "coupling"])
def test_complex_numbers(source):
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, dtype=torch.complex128)
    x = torch.randn(4, 6 if source == "coupling" else 3, dtype=torch.complex128, requires_grad=True)

    def run(enabled):
        def block(z):
            return torch.tanh(layer(z))

        h = x * 1.0
        for _ in range(3):
            if source == "coupling":
                h = couple([block, block], h, [(), ()], enabled=enabled)
            else:
                h = recollect.checkpoint(block, h, enabled=enabled)
        return (h.abs() ** 2).sum()

    expected = torch.autograd.grad(run(False), wanted(layer, x))
    assert_same(torch.autograd.grad(run(True), wanted(layer, x)), expected)


@pytest.mark.parametrize("seed", [True, False])
def test_float32_at_64_layers_with_dropout(seed):
    torch.manual_seed(0)
    net = Net("coupling", depth=64, groups=2, dropout=0.2 if seed else 0.0)
    x = torch.randn(20, WIDTH, requires_grad=True)
    grads = []
    for enabled in (False, True):
        torch.manual_seed(1)
        flat = torch.autograd.grad(net(x, enabled).sin().mean(), wanted(net, x))
        grads.append(torch.cat([g.flatten() for g in flat]))
    assert_same(grads[1], grads[0], 1e-5)


def test_a_chain_of_thousands_of_stages():
    # Neither backward nor dropping the graph may recurse over the chain.
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(enabled):
        h = x * 1.0
        for _ in range(1500):
            h = couple([lambda z: 0.01 * z.sin(), lambda z: 0.01 * z.cos()], h, [(), ()], enabled=enabled)
        return h.sum()

    run(True)
    expected = torch.autograd.grad(run(False), x)
    assert_same(torch.autograd.grad(run(True), x), expected)
