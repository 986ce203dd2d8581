"""Blocks of one kind were made in the same way; what changes in one makes another of it."""

import copy
import functools
import gc
import threading
import types
import weakref

import pytest
import torch
from torch import nn

from recollect.messages._kind import kind_of, look_of


class Hops(nn.Module):
    """Has settings that its repr does not show."""

    def __init__(self, width=4, hops=1, act=torch.relu, **more):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))
        self.hops = hops
        self.act = act
        self.register_buffer("scale", torch.ones(width))
        vars(self).update(more)

    def forward(self, x):
        return self.act(self.inner(x))


class Settings:
    def __init__(self, steps):
        self.steps = steps
        self.self = self  # a circle


def scaled(factor):
    return lambda x: factor * x


SAME = {
    "plain": lambda: Hops(),
    "other values": lambda: Hops(more=[1, {"a": (2.0, None)}], dtype=torch.float32),
    "objects": lambda: Hops(more=Settings([1, 2])),
    "functions": lambda: Hops(act=scaled(2)),
    "partial": lambda: Hops(act=functools.partial(torch.clamp, min=0.0)),
    "modules in a list": lambda: Hops(more=[nn.Linear(2, 2)]),
    "parts": lambda: nn.ModuleDict({"a": Hops(), "b": nn.Linear(2, 3)}),
}

CHANGES = {
    "an attribute": lambda block: setattr(block, "hops", 2),
    "an attribute of a part": lambda block: setattr(block.inner[1], "p", 0.2),
    "a new attribute": lambda block: setattr(block, "turned", False),
    "a function": lambda block: setattr(block, "act", scaled(2)),
    "a method": lambda block: setattr(block, "forward", block.inner.forward),
    "a part": lambda block: block.inner.__setitem__(1, nn.Identity()),
    "a hook": lambda block: block.inner[0].register_forward_hook(lambda module, args, out: 2 * out),
    "a list in place": lambda block: block.steps.append(3),
    "a mapping in place": lambda block: block.table.update(a=2),
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_what_was_made_in_the_same_way_is_of_one_kind(make):
    one = make()
    assert kind_of(one) == kind_of(make()) == kind_of(copy.deepcopy(one))
    assert hash(kind_of(one)) == hash(kind_of(make()))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_makes_another_kind_and_another_look(change):
    block = Hops(steps=[1, 2], table={"a": 1})
    kind, look = kind_of(block), look_of([block])
    assert look_of([block]) == look
    change(block)
    assert kind_of(block) != kind
    assert look_of([block]) != look


def test_values_of_closures_count():
    assert kind_of(Hops(act=scaled(2))) != kind_of(Hops(act=scaled(3)))
    assert kind_of(Hops(more=Settings([1]))) != kind_of(Hops(more=Settings([2])))


def test_shapes_count_and_values_do_not():
    one, other = Hops(), Hops()
    with torch.no_grad():
        other.inner[0].weight.mul_(2)
    assert kind_of(one) == kind_of(other)
    assert kind_of(Hops(width=5)) != kind_of(one)


def test_modes_count_for_the_kind_alone():
    block = Hops()
    kind, look = kind_of(block), look_of([block])
    block.eval()
    assert kind_of(block) != kind
    assert look_of([block]) == look


class Number(int):
    pass


class Table(dict):
    hops = 0


def with_default(factor):
    def function(x, *, factor=factor):
        return factor * x

    return function


def table(hops):
    made = Table()
    made.hops = hops
    return made


def nested(hops):
    return types.SimpleNamespace(inner=Settings(hops))


@pytest.mark.parametrize("make", [Number, with_default, table, nested])
def test_what_holds_a_setting_in_another_way(make):
    assert kind_of(Hops(more=make(1))) != kind_of(Hops(more=make(2)))


def test_a_setting_of_an_object_is_seen():
    block = Hops(more=Settings(1))
    look = look_of([block])
    block.more.steps = 2
    assert look_of([block]) != look


def test_another_object_at_the_same_address_is_seen():
    block = Hops(more=Settings(1))
    look, address = look_of([block]), id(block.more)
    del block.more
    others = [Settings(1) for _ in range(10_000)]
    (block.more,) = (other for other in others if id(other) == address)
    assert look_of([block]) != look


def test_a_look_keeps_no_module_alive_and_is_none_of_a_copy():
    block = Hops(more=Settings(1))
    look = look_of([block])
    assert copy.deepcopy(look) != look != look_of([copy.deepcopy(block)])
    gone = weakref.ref(block.inner[0])
    block.inner[0] = torch.nn.Linear(4, 4)
    gc.collect()
    assert gone() is None
    assert look_of([block]) != look


class Raising:
    def __getattribute__(self, name):
        raise RuntimeError(name)


ODD = {"lock": threading.Lock, "raising": Raising, "iterator": lambda: iter([1, 2]), "data": lambda: [0] * 10_000}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_odd_attributes(make):
    block = Hops(more=make())
    assert kind_of(block) == kind_of(block)
    assert look_of([block]) == look_of([block])


def test_unknown_objects_count_by_identity():
    one = object()
    assert kind_of(Hops(more=one)) == kind_of(Hops(more=one))
    assert kind_of(Hops(more=one)) != kind_of(Hops(more=object()))


def test_what_takes_the_place_of_an_object_that_is_gone_is_of_another_kind():
    """Where nothing is known of an object it counts by identity, and its address may be another's later."""

    class Closed:
        __slots__ = ("__weakref__",)

    kinds, addresses = [], []
    for _ in range(50):
        act = Closed()
        addresses.append(id(act))
        kinds.append(kind_of(Hops(act=act)))
        assert kinds[-1] == kind_of(Hops(act=act))
        del act
    assert len(set(addresses)) < 50
    assert len(set(kinds)) == 50


def test_kinds_can_be_copied_and_then_know_no_object():
    block = Hops(act=memoryview(b"a"))
    kind = kind_of(block)
    assert kind == kind_of(block)
    assert copy.deepcopy(kind) != kind
