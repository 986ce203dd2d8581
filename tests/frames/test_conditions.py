"""A rebuild runs under the conditions of the forward: random state, autocast, grad mode, training flags."""

import pytest
import torch
from frames_zoo import WIDTH, Block, assert_same, each_source, make, nothing_left, wanted
from torch import nn

import recollect
from recollect.frames import RebuildError, couple


@each_source
def test_the_random_stream_after_a_step_is_the_plain_one(source):
    net, x = make(source, dropout=0.4)
    after = []
    for enabled in (False, True):
        torch.manual_seed(1)
        y = net(x, enabled)
        middle = torch.get_rng_state()
        y.sum().backward()
        after.append((middle, torch.get_rng_state()))
    assert torch.equal(after[0][0], after[1][0])
    assert torch.equal(after[0][1], after[1][1])


@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")  # an inverse with other masks is wrong
@each_source
def test_without_seed_the_masks_of_a_rebuild_are_others(source):
    net, x = make(source, dropout=0.5)
    torch.manual_seed(1)
    expected = torch.autograd.grad(net(x, enabled=False).sin().sum(), x)[0]
    torch.manual_seed(1)
    actual = torch.autograd.grad(net(x, seed=False, certify=False).sin().sum(), x)[0]
    assert float((actual - expected).norm() / expected.norm()) > 1e-3
    with pytest.raises(RebuildError, match="seed=False"):
        torch.autograd.grad(net(x, seed=False).sin().sum(), x)


def test_each_block_of_a_coupling_has_its_own_random_state():
    # Rebuilt from the last block to the first, the masks would come in the wrong order out of one common state.
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    drawn = []

    def block(z):
        mask = torch.rand_like(z)
        drawn.append((recollect.in_backward(), mask.detach().clone()))
        return z.sin() * mask

    couple([block, block], x * 1.0, [(), ()]).sin().sum().backward()
    forward = [mask for again, mask in drawn if not again]
    rebuilt = [mask for again, mask in drawn if again]
    assert len(forward) == len(rebuilt) == 2
    assert torch.equal(forward[0], rebuilt[1])
    assert torch.equal(forward[1], rebuilt[0])
    assert not torch.equal(forward[0], forward[1])


@each_source
def test_a_seed_set_between_forward_and_backward_stays(source):
    net, x = make(source, dropout=0.5)
    torch.manual_seed(1)
    expected = torch.autograd.grad(net(x, enabled=False).sin().sum(), wanted(net, x))
    torch.manual_seed(1)
    loss = net(x).sin().sum()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert_same(torch.autograd.grad(loss, wanted(net, x)), expected)
    assert torch.equal(torch.get_rng_state(), state)


@each_source
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_is_replayed_when_backward_runs_outside(source, dropout):
    torch.manual_seed(0)
    net, x = make(source, dropout=dropout)
    net, x = net.float(), x.detach().float().requires_grad_()
    grads = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x, enabled)
        grads.append(torch.autograd.grad(y.float().sin().sum(), wanted(net, x)))
    assert_same(grads[1], grads[0], 0.02 if source != "checkpoint" else 0.0)


@each_source
def test_a_forward_without_autocast_is_rebuilt_without(source):
    net, x = make(source)
    net, x = net.float(), x.detach().float().requires_grad_()
    grads = []
    for enabled in (False, True):
        loss = net(x, enabled).sin().sum()
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(torch.autograd.grad(loss, wanted(net, x)))
    assert_same(grads[1], grads[0], 1e-5)


def test_the_dtype_of_autocast_is_replayed():
    linear, seen = nn.Linear(4, 4), []

    def function(x):
        y = linear(x)
        seen.append((y.dtype, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return y.sin()

    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            loss = recollect.checkpoint(function, torch.randn(3, 4, requires_grad=True)).float().sum()
        with torch.autocast("cpu", torch.bfloat16 if dtype is torch.float16 else torch.float16):
            loss.backward()
        assert seen[-2:] == [(dtype, True, dtype)] * 2
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_turned_off_inside_stays_off():
    linear = nn.Linear(4, 4)

    def function(x):
        with torch.autocast("cpu", enabled=False):
            return linear(x).sin()

    x = torch.randn(3, 4, requires_grad=True)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = recollect.checkpoint(function, x, enabled=enabled)
        grads.append(torch.autograd.grad(y.sum(), wanted(linear, x)))
    assert_same(grads[1], grads[0], 0.0)


@each_source
def test_the_cast_cache_holds_nothing_of_a_rebuild(source):
    # Backward inside the autocast region, then a second step in it: a weight's cast that a rebuild left in the cache
    # would belong to the graph that was thrown away, and the weight's gradient would be lost.
    net, x = make(source)
    net, x = net.float(), x.detach().float().requires_grad_()
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                step = torch.autograd.grad(net(x, enabled).float().sin().sum(), wanted(net, x), retain_graph=True)
        grads.append(step)
    assert_same(grads[1], grads[0], 0.02 if source != "checkpoint" else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_scaler_steps_as_plain(dtype):
    finals = []
    for enabled in (False, True):
        torch.manual_seed(0)
        net, x = make("coupling", groups=2)
        net, x = net.float(), x.detach().float()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = net(x, enabled).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 1024.0
        finals.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert_same(finals[1], finals[0], 1e-3)


def test_grad_scaler_skips_the_step_of_an_overflow():
    net, x = make("coupling", groups=2)
    net = net.float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = [p.detach().clone() for p in net.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = net(x.detach().float()).float().square().sum() * 1e30
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**99
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("source", ["checkpoint", "coupling"])
def test_no_grad_within_a_region_is_replayed(source):
    torch.manual_seed(0)
    block = Block(WIDTH // 2).double()
    modes = []

    def function(z):
        with torch.no_grad():
            fixed = block(z).exp()
        modes.append(torch.is_grad_enabled())
        return (z * fixed).sin()

    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    grads = []
    for enabled in (False, True):
        h = x * 1.0
        for _ in range(2):
            if source == "coupling":
                h = couple([function, function], h, [(), ()], enabled=enabled)
            else:
                h = torch.cat([recollect.checkpoint(function, c, enabled=enabled) for c in h.chunk(2, -1)], -1)
        grads.append(torch.autograd.grad(h.sin().sum(), x))
    assert_same(grads[1], grads[0])
    assert all(modes)


@each_source
@pytest.mark.parametrize("forward_training", [True, False])
def test_training_flags_are_those_of_the_forward(source, forward_training):
    net, x = make(source, dropout=0.5, norm=True)
    net(x, enabled=False)  # so that running and batch statistics differ
    net.train(forward_training)
    torch.manual_seed(1)
    expected = torch.autograd.grad(net(x, enabled=False).sin().sum(), wanted(net, x))
    torch.manual_seed(1)
    loss = net(x).sin().sum()
    net.train(not forward_training)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    # In training the statistics moved between the two forwards, which does not enter the output.
    assert_same(torch.autograd.grad(loss, wanted(net, x)), expected)
    assert all(module.training is not forward_training for module in net.modules())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@each_source
def test_in_backward_tells_rebuild_from_forward(source):
    net, x = make(source)
    loss = net(x).sin().sum()
    assert net.calls == [False] * len(net.blocks)
    assert not recollect.in_backward()
    loss.backward()
    calls = net.calls
    assert calls.count(False) == len(net.blocks)
    # An additive coupling rebuilds and inverts in one; a user's inverse evaluates the block a second time.
    assert calls.count(True) == len(net.blocks) * (2 if source == "inverse" else 1)
    nothing_left()


def test_side_effects_guarded_by_in_backward_happen_once():
    steps = []

    def function(x):
        if not recollect.in_backward():
            steps.append(1)
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    loss = recollect.checkpoint(function, recollect.checkpoint(function, x)).sum()
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert steps == [1, 1]


def test_backward_mode_and_dry_mode_nest():
    assert not recollect.in_backward()
    with recollect.backward_mode():
        assert recollect.in_backward()
        with recollect.backward_mode(False):
            assert not recollect.in_backward()
        assert recollect.in_backward()
    with recollect.dry_mode(False):
        assert not recollect.in_dry_mode()
    with recollect.dry_mode(), recollect.dry_mode():
        assert recollect.in_dry_mode()
    nothing_left()


def test_the_first_call_of_a_frame_is_dry_and_its_rebuild_is_not():
    seen = []

    def function(x):
        seen.append(recollect.in_dry_mode())
        return x.sin().exp()

    recollect.checkpoint(function, torch.randn(3, requires_grad=True)).sum().backward()
    assert seen == [True, False]


def test_dry_mode_builds_a_graph_that_saves_nothing():
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad(), recollect.dry_mode():
        y = recollect.checkpoint(lambda x: x.sin().exp(), x)
        z = couple([torch.sin, torch.cos], torch.cat([x, x]), [(), ()])
    assert y.requires_grad
    assert z.requires_grad
    for output in (y, z):
        with pytest.raises(recollect.frames.FrameError, match="dry mode"):
            output.sum().backward()
    nothing_left()


def test_save_on_cpu_around_frames():
    net, x = make("checkpoint", dropout=0.3)
    coupling, _ = make("coupling", dropout=0.3)

    def run(enabled):
        torch.manual_seed(1)
        return coupling(net(x, enabled).sin(), enabled).sin().sum()

    params = [*wanted(net, x), *coupling.parameters()]
    expected = torch.autograd.grad(run(False), params)
    with torch.autograd.graph.save_on_cpu():
        loss = run(True)
    for _ in range(2):
        assert_same(torch.autograd.grad(loss, params, retain_graph=True), expected)


def test_hooks_around_a_frame_see_only_what_it_keeps():
    packed = []
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def pack(tensor):
        packed.append(tensor.clone())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = recollect.checkpoint(lambda x: x.sin().exp().cos().tanh(), x)
    assert len(packed) == 1
    assert torch.equal(packed[0], x)
    y.sum().backward()
    assert len(packed) == 1


def test_hooks_inside_a_region_take_what_is_theirs():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def function(x):
        with torch.autograd.graph.save_on_cpu():
            y = x.sin().exp()
        return y.cos().tanh()

    expected = torch.autograd.grad(function(x).sum(), x)
    assert_same(torch.autograd.grad(recollect.checkpoint(function, x).sum(), x), expected)


@pytest.mark.parametrize("seed", [True, False])
def test_random_branches_need_the_seed(seed):
    def function(x):
        return x.sin().exp() if float(torch.rand(())) < 0.5 else x.sin().exp().cos().tanh().exp()

    x = torch.randn(5, requires_grad=True)
    failures = 0
    for i in range(10):
        torch.manual_seed(i)
        loss = recollect.checkpoint(function, x, seed=seed).sum()
        torch.manual_seed(100 + i)
        try:
            loss.backward()
        except RebuildError:
            failures += 1
    assert (failures == 0) is seed


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_region_that_seeds_the_generator_to_where_it_began(early_stop):
    def region(x):
        torch.manual_seed(17)
        return (x * torch.rand(4)).sin()

    x = torch.randn(3, 4, requires_grad=True)
    region(x)  # the generator is now where each further run ends
    y = recollect.checkpoint(region, x * 1, early_stop=early_stop)
    torch.rand(5)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
