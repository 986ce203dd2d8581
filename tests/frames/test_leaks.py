"""Nothing of a graph outlives it, and reference counting alone frees it."""

import gc
import weakref

import pytest
import torch
from frames_zoo import WIDTH, each_source, make, wanted

import recollect
from recollect.frames import _chain
from recollect.frames.sources import _file_store
from recollect.memory import peak_memory


@pytest.fixture
def without_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def watched_step(net, x, keep_loss=False):
    """Return the loss, and weak references to everything that the step made."""
    seen: list = []
    hooks = [
        block.register_forward_hook(lambda m, i, o: seen.extend(map(weakref.ref, (*i, o)))) for block in net.blocks
    ]
    middle = list(net.walk(x))
    seen.extend(weakref.ref(t) for t in middle)
    loss = middle[-1].sin().sum()
    for hook in hooks:
        hook.remove()
    return loss, seen


def alive(references):
    return sum(reference() is not None for reference in references)


def finish_writing():
    """Wait for the one call's copy that may be on its way to a file, which nobody reads any more."""
    for store in list(_file_store._stores):
        store.pause()
        store.resume()


@each_source
@pytest.mark.parametrize("end", ["backward", "dropped", "retained", "subset", "create_graph"])
def test_nothing_outlives_the_loss(source, end, without_gc):
    net, x = make(source, dropout=0.3, norm=True)
    with peak_memory("cpu"):
        watched_step(net, x)[0].backward()  # torch imports some of its modules at the first step
    net.zero_grad()
    x.grad = None
    gc.collect()
    slots = len(_chain._slots)
    with peak_memory("cpu") as memory:
        loss, seen = watched_step(net, x)
        if end == "backward":
            loss.backward()
        elif end == "retained":
            torch.autograd.grad(loss, wanted(net, x), retain_graph=True)
        elif end == "subset":
            torch.autograd.grad(loss, net.blocks[-1].last.bias, retain_graph=True)
        elif end == "create_graph":
            grads = torch.autograd.grad(loss, wanted(net, x), create_graph=True)
            del grads
        loss = None
        net.zero_grad()
        x.grad = None
        assert alive(seen) == 0
        finish_writing()
        assert memory.current_bytes <= 0
    assert len(_chain._slots) == slots


@each_source
def test_outputs_of_the_middle_die_while_the_graph_lives(source, without_gc):
    net, x = make(source, depth=6)
    references: list = []

    def run():
        h = x * 1.0
        for layer in net.layers:
            h = net.step(layer, h, True)
            references.append(weakref.ref(h))
        return h

    y = run()
    assert alive(references) == (1 if source != "checkpoint" else len(references[-1:]))
    del y


@each_source
def test_frames_die_after_an_exception(source, without_gc):
    net, x = make(source)

    class BlockError(Exception):
        pass

    def fail(module, inputs, output):
        raise BlockError

    references: list = []
    handle = net.blocks[-1].register_forward_hook(fail)
    with pytest.raises(BlockError):
        references.extend(map(weakref.ref, net.walk(x)))
    handle.remove()
    assert alive(references) == 0


def live_tensors():
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


@each_source
def test_a_thousand_steps_without_growth(source, without_gc):
    net, x = make(source, depth=2, groups=2, dropout=0.2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

    def steps(number):
        for i in range(number):
            loss = net(x).sum()
            if i % 3 == 0:
                torch.autograd.grad(loss, net.blocks[0].first.bias, retain_graph=i % 2 == 0)
            elif i % 3 == 1:
                loss.backward()
                optimizer.step()
            for block in net.blocks:
                block.calls.clear()
        finish_writing()

    with peak_memory("cpu") as memory:
        steps(20)
        settled = memory.current_bytes
        steps(30)
        assert memory.current_bytes <= settled
    tensors, slots = live_tensors(), len(_chain._slots)
    steps(1000)
    assert live_tensors() <= tensors
    assert len(_chain._slots) <= slots


@each_source
def test_a_step_makes_no_garbage(source, without_gc):
    net, x = make(source, dropout=0.2)
    for _ in range(2):
        net(x).sum().backward()
        garbage = gc.collect()
    assert garbage == 0


def test_parameters_die_with_their_module(without_gc):
    net, x = make("coupling")
    reference = weakref.ref(net.blocks[0].first.weight)
    loss = net(x).sum()
    loss.backward()
    del net, loss
    assert reference() is None


def test_leftovers_of_a_partial_backward_die_with_the_graph(without_gc):
    net, x = make("coupling", width=WIDTH)
    with peak_memory("cpu") as memory:
        loss = net(x).sum()
        torch.autograd.grad(loss, net.blocks[3].last.weight, retain_graph=True)
        del loss
        assert memory.current_bytes <= 0


def test_arguments_of_a_checkpoint_die_with_the_graph(without_gc):
    class Thing:
        pass

    thing, x = Thing(), torch.randn(3, requires_grad=True)
    reference = weakref.ref(thing)
    y = recollect.checkpoint(lambda x, t: x.sin().exp(), x, thing)
    del thing
    assert reference() is not None
    y.sum().backward()
    del y
    assert reference() is None
