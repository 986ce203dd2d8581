"""Ten thousand steps leave nothing behind: no tensors, no bytes, no Python objects."""

import gc

import pytest
import torch

import recollect.invertible as inn
from recollect.frames import _chain
from recollect.memory import peak_memory
from recollect.testing._zoo import ZOO


def stack():
    torch.manual_seed(0)
    return [ZOO[name](3)[0] for name in ("plain", "output is the input", "two dropouts")]


def forward(modules, x):
    args = (x * 1.0, x * 2.0)
    for module in modules:
        args = module(*args)
    return args[0].sum() + args[1].sin().sum()


def steps(modules, x, optimizer, number):
    """Train, with every third graph gone through in part, twice, or not at all."""
    for i in range(number):
        loss = forward(modules, x)
        if i % 3 == 0:
            torch.autograd.grad(loss, modules[1].block.bias, retain_graph=i % 2 == 0)
        elif i % 3 == 1:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    del loss


def counted():
    gc.collect()
    things = gc.get_objects()
    return len(things), sum(isinstance(type(t), type) and issubclass(type(t), torch.Tensor) for t in things)


def test_ten_thousand_steps_without_growth():
    modules = stack()
    x = torch.randn(2, 3, requires_grad=True)
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=1e-5)
    steps(modules, x, optimizer, 1_000)
    objects, tensors = counted()
    slots = len(_chain._slots)
    steps(modules, x, optimizer, 9_000)
    later = counted()
    assert later[1] <= tensors
    assert len(_chain._slots) <= slots
    assert later[0] <= objects + 20  # nine thousand steps would leave nine thousand of anything


@pytest.mark.parametrize("name", ZOO)
def test_bytes_of_a_step(name):
    torch.manual_seed(0)
    module, make = ZOO[name](3)
    args = tuple(a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in make(4))

    def step():
        outputs = module(args[0] * 1.0, *args[1:])
        (outputs[0].sum() + outputs[1].sin().sum()).backward()
        module.zero_grad()
        for a in args:
            if torch.is_tensor(a):
                a.grad = None

    step()
    gc.collect()
    gc.disable()
    try:
        with peak_memory("cpu") as memory:
            step()
            first = memory.current_bytes
            for _ in range(20):
                step()
            assert memory.current_bytes <= first
            assert memory.peak_bytes > 0
    finally:
        gc.enable()


def test_checks_leave_nothing():
    x = torch.randn(4, 3)
    module = inn.Sequential(inn.Identity(), ZOO["plain"](3)[0])
    module.check(x, x)
    before = counted()
    for _ in range(20):
        module.check(x, x)
    after = counted()
    assert after[1] <= before[1]
    assert after[0] <= before[0] + 10
