"""Threads that train side by side do not disturb each other's frames."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from frames_zoo import assert_same, make, nothing_left, wanted

import recollect
from recollect.frames import _random
from recollect.frames._frame import Frame


def in_threads(*functions, timeout=20):
    """Run each function in a thread of its own and return the results."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [f.result(timeout) for f in [pool.submit(function) for function in functions]]


def train(source, barrier, masks):
    """Return whether every mask that was drawn in a forward was drawn again in its rebuild."""
    net, x = make(source, groups=2)

    def noisy(block):
        plain = block.forward

        def forward(z):
            mask = torch.rand_like(z)
            masks.append((id(block), recollect.in_backward(), mask.detach().clone()))
            return plain(z * mask)

        return forward

    for block in net.blocks:
        block.forward = noisy(block)
    barrier.wait(20)
    for _ in range(15):
        masks.clear()
        torch.autograd.grad(net(x).sin().sum(), wanted(net, x))
        for block in net.blocks:
            forward = [m for i, again, m in masks if i == id(block) and not again]
            rebuilt = [m for i, again, m in masks if i == id(block) and again]
            if len(forward) != 1 or not rebuilt or any(not torch.equal(forward[0], m) for m in rebuilt):
                return False
    nothing_left()
    return True


@pytest.mark.parametrize("source", ["checkpoint", "coupling"])
def test_two_threads_each_train_their_model_with_random_masks(source):
    recollect.checkpoint(torch.exp, torch.randn(3, requires_grad=True)).sum().backward()  # this thread trains as well
    barrier = threading.Barrier(2)
    assert in_threads(*[lambda: train(source, barrier, [])] * 2) == [True, True]


def test_gradients_of_two_threads():
    def gradients(seed, enabled):
        torch_model, x = models[seed]
        return [torch.autograd.grad(torch_model(x, enabled).sin().sum(), wanted(torch_model, x)) for _ in range(10)]

    models = {seed: make(source) for seed, source in enumerate(("coupling", "inverse", "checkpoint"))}
    expected = [gradients(seed, False) for seed in models]
    actual = in_threads(*[lambda seed=seed: gradients(seed, True) for seed in models])
    for a, e in zip(actual, expected, strict=True):
        for one, other in zip(a, e, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("source", ["checkpoint", "inverse", "coupling"])
def test_backward_in_another_thread(source):
    net, x = make(source, dropout=0.4)
    torch.manual_seed(1)
    expected = torch.autograd.grad(net(x, enabled=False).sin().sum(), wanted(net, x))
    torch.manual_seed(1)
    loss = net(x).sin().sum()
    (actual,) = in_threads(lambda: torch.autograd.grad(loss, wanted(net, x)))
    assert_same(actual, expected)
    nothing_left()


def test_two_threads_go_backward_through_one_graph(monkeypatch):
    # The other thread's rebuild of another frame, which forgets this one's leftovers, at its most harmful moment.
    rebuild = Frame._rebuild

    def interrupted(frame):
        result = rebuild(frame)
        in_threads(frame.forget)
        return result

    net, x = make("checkpoint", depth=2)
    expected = torch.autograd.grad(net(x, enabled=False).sin().sum(), wanted(net, x))
    loss = net(x).sin().sum()
    monkeypatch.setattr(Frame, "_rebuild", interrupted)
    assert_same(torch.autograd.grad(loss, wanted(net, x)), expected)


def test_the_modes_belong_to_their_thread():
    with recollect.dry_mode(), recollect.backward_mode():
        assert in_threads(lambda: (recollect.in_dry_mode(), recollect.in_backward())) == [(False, False)]


@pytest.fixture
def fresh_generators(monkeypatch):
    monkeypatch.setattr(_random, "_threads", _random._Threads())


def test_the_first_rebuild_of_one_thread_and_the_first_forward_of_another(fresh_generators):
    rebuilding, drawn = threading.Event(), threading.Event()
    masks: list = []

    def first(x):
        mask = torch.rand(3)
        if recollect.in_backward():
            rebuilding.set()
            drawn.wait(1)  # a forward that waits for its turn does not draw
        return (x * mask).exp()

    def second(x):
        early = torch.rand(20)
        if not recollect.in_backward():
            drawn.set()
            thread.join(20)
        masks.append((early, torch.rand(20)))
        return x.exp() * masks[-1][1].double()

    def step():
        recollect.checkpoint(first, torch.ones(3, requires_grad=True)).sum().backward()

    thread = threading.Thread(target=step)
    thread.start()
    assert rebuilding.wait(20)
    recollect.checkpoint(second, torch.ones(20, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])


def test_a_region_that_runs_frames_in_a_thread_of_its_own():
    x = torch.randn(3, requires_grad=True)
    finished = []

    def function(x):
        done = threading.Event()

        def work():
            recollect.checkpoint(torch.exp, x)
            done.set()

        threading.Thread(target=work, daemon=True).start()
        finished.append(done.wait(1))
        return x.exp()

    recollect.checkpoint(function, x)
    assert finished == [True]
