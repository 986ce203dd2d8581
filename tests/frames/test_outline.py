"""Modules of anybody's are noted in one go, with the containers behind their attributes, or else part by part."""

import collections
import gc
import weakref
from typing import Any

import pytest
import torch
from seam_oracle import float64
from torch import nn

import recollect
from recollect.frames import _recorder
from recollect.frames._outline import held_by

assert float64 is not None  # a fixture of every test here


class Settings:
    """An object with a namespace of its own."""

    def __init__(self, **names):
        vars(self).update(names)


class Block(nn.Module):
    """Scales by what it finds in an attribute, and counts there."""

    def __init__(self, held, read, write):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.held = held
        self._functions = read, write

    def scale(self):
        return self._functions[0](self.held)

    def put(self, value):
        self._functions[1](self, value)

    def forward(self, x):
        scale = self.scale()
        self.put(scale + 1.0)  # the next call reads another
        return scale * torch.tanh(self.linear(self.norm(x)))


def item(key):
    """How a container is made, read and written at a key, which the module's attribute holds."""
    return (lambda held: held[key]), (lambda module, value: module.held.__setitem__(key, value))


def attribute():
    return 2.0, lambda held: held, lambda module, value: setattr(module, "held", value)


def mapping():
    return {"scale": 2.0, "other": [1, 2]}, *item("scale")


def ordered():
    return collections.OrderedDict(first=None, scale=2.0), *item("scale")


def sequence():
    return [2.0, "name", (1, 2)], *item(0)


def namespace():
    def write(module, value):
        module.held.scale = value

    return Settings(scale=2.0, names=["a", "b"]), lambda held: held.scale, write


def deep():
    def write(module, value):
        module.held.inner["scales"][1] = value

    return Settings(inner={"scales": [1.0, 2.0]}), lambda held: held.inner["scales"][1], write


def within_tuple():
    def write(module, value):
        module.held[1]["scale"] = value

    return (1, {"scale": 2.0}), lambda held: held[1]["scale"], write


def tensor():
    return torch.tensor(2.0), lambda held: held.clone(), lambda module, value: module.held.fill_(value)


def tensor_within():
    def write(module, value):
        module.held["scale"].copy_(value)

    return {"scale": torch.tensor(2.0)}, lambda held: held["scale"].clone(), write


def replaced():
    return [2.0], lambda held: held[0], lambda module, value: setattr(module, "held", [value])


def growing():
    return [2.0], lambda held: held[-1], lambda module, value: module.held.append(value)


def members():
    def write(module, value):
        module.held.clear()
        module.held.add(value)

    return {2.0}, lambda held: next(iter(held)), write


def queue():
    return collections.deque([2.0], maxlen=3), lambda held: held[-1], lambda module, value: module.held.append(value)


def slots():
    class Slotted:
        __slots__ = ("scale",)

    held: Any = Slotted()
    held.scale = 2.0

    def write(module, value):
        module.held.scale = value

    return held, lambda held: held.scale, write


TOGETHER = (attribute, mapping, ordered, sequence, namespace, deep, within_tuple, tensor, tensor_within, replaced)
BY_PARTS = (members, queue, slots)


def make(kind):
    held, read, write = kind()
    block = Block(held, read, write)
    # Functions are looked into part by part: they stand where that is not done.
    functions = vars(block).pop("_functions")
    kind_of_block = type("Counting", (Block,), {"_functions": functions})
    block.__class__ = kind_of_block
    return block


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()


def noted_together(block):
    return held_by([block]) is not None


@pytest.mark.parametrize("kind", TOGETHER)
def test_what_containers_hold_is_noted_in_one_go(kind):
    block = make(kind)
    assert noted_together(block)
    snapshot = held_by([block])
    assert snapshot.holds()
    block.put(block.scale() + 1.0)
    # A tensor's contents are looked at by its version.
    assert snapshot.holds() is (kind in (tensor, tensor_within))


@pytest.mark.parametrize("kind", BY_PARTS)
def test_other_containers_are_noted_part_by_part(kind):
    assert not noted_together(make(kind))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("change", [False, True], ids=["as left", "changed since"])
@pytest.mark.parametrize("kind", [*TOGETHER, growing, *BY_PARTS])
def test_a_rebuild_begins_with_what_the_forward_began_with(kind, change, together, monkeypatch):
    if not together:
        monkeypatch.setattr(_recorder, "held_by", lambda modules: None)
        monkeypatch.setattr(_recorder, "snapshot_of", lambda module, arguments: None)
    found = []
    for framed in (False, True):
        block, x = make(kind), data()
        outputs = []
        for _ in range(3):
            outputs.append(recollect.checkpoint(block, x) if framed else block(x))
        if change:
            block.put(block.scale() * 0.0 + 17.0)
        left = torch.as_tensor(block.scale()).clone()
        for output in reversed(outputs):
            output.sum().backward()
        found.append((left, torch.as_tensor(block.scale()).clone(), x.grad, block.linear.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert torch.equal(found[1][0], found[1][1])


def test_a_container_that_was_emptied_since_is_filled_for_the_rebuild_alone():
    block, x = make(mapping), data()
    output = recollect.checkpoint(block, x)
    block.held.clear()
    output.sum().backward()
    assert block.held == {}
    expected, plain = make(mapping), data()
    expected(plain).sum().backward()
    assert torch.equal(x.grad, plain.grad)


def other_list(block):
    block.held = [3.0, "name", (1, 2)]


def longer(block):
    block.held.append("more")


def module_within(block):
    block.held[1] = nn.ReLU()


def function_within(block):
    block.held[1] = lambda x: x


def new_attribute(block):
    block.note = ["something"]


def hook(block):
    block.linear.register_forward_hook(lambda *_: None)


def own_forward(block):
    block.linear.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "is_noted"),
    [
        (other_list, True), (longer, True), (new_attribute, True), (module_within, False), (function_within, False),
        (hook, False), (own_forward, False),
    ],
)  # fmt: skip
def test_what_is_known_of_a_module_follows_its_changes(change, is_noted):
    block = make(sequence)
    assert noted_together(block)
    change(block)
    assert noted_together(block) is is_noted


def test_a_module_that_changes_all_the_time_is_noted_part_by_part():
    block = make(growing)
    for _ in range(30):
        block.put(1.0)
        noted_together(block)
    assert not noted_together(block)


def test_a_tensor_with_history_is_not_kept():
    block = make(mapping)
    block.held["feature"] = torch.ones(3)
    assert noted_together(block)
    block.held["feature"] = torch.ones(3, requires_grad=True) * 2
    assert not noted_together(block)


def test_nobody_is_kept_alive():
    block = make(deep)
    block.held.table = torch.ones(3)
    block.held.inner["owner"] = Settings()
    assert noted_together(block)
    held = [weakref.ref(thing) for thing in (block, block.held, block.held.table, block.held.inner["owner"])]
    del block
    gc.collect()
    assert [reference() for reference in held] == [None] * 4


def test_keys_of_a_mapping_are_not_kept_alive():
    block = make(mapping)
    key = Settings()
    block.held[key] = 1.0
    reference = weakref.ref(key)
    assert not noted_together(block)
    del block.held[key], key
    assert reference() is None


def test_a_module_that_a_container_holds_is_seen_when_nobody_calls_it():
    """Not registered, and used without being called: its attributes are the rebuild's all the same."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 5)
            self.inner = [nn.Dropout(0.5)]

        def forward(self, x):
            return self.linear(x) * self.inner[0].p

    gradients = []
    for framed in (False, True):
        block, x = Outer(), data()
        for _ in range(2):
            y = recollect.checkpoint(block, x) if framed else block(x)
        if framed:
            block.inner[0].p = 0.1
        y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
