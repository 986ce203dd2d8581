"""Rows of a history as a frame's argument: pulled again, and the same as in the forward."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from scalable_zoo import Mean, assert_same, backward, batches, make_graph, run
from torch import Tensor

import recollect
from recollect.autoscale import AsyncIOPool, History, Rows
from recollect.frames import InPlaceError
from recollect.memory import peak_memory

NODES, WIDTH = 12, 3
N_ID = torch.tensor([7, 2, 11, 0])
OTHERS = torch.tensor([1, 5])


@pytest.fixture(params=["memory", "file", "float16", "int8"])
def history(request, tmp_path):
    options: dict[str, Any] = {"dtype": torch.float64}
    if request.param == "file":
        options["path"] = tmp_path / "a.history"
    elif request.param != "memory":
        options = {"dtype": getattr(torch, request.param)}
    history = History(NODES, WIDTH, **options).double()
    torch.manual_seed(0)
    history.push(torch.randn(NODES, WIDTH, dtype=torch.float64))
    return history


def layer(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).tanh().exp()


def weights() -> Tensor:
    return torch.linspace(-1, 1, 2 * WIDTH, dtype=torch.float64).view(WIDTH, 2).requires_grad_()


def test_gradients_and_pushes_of_other_rows(history):
    expected = torch.autograd.grad(layer(history.pull(N_ID), weight := weights()).sum(), weight)
    weight = weights()
    out = recollect.checkpoint(layer, history.pull(N_ID), weight, source=Rows(history, N_ID))
    history.push(torch.ones(2, WIDTH), n_id=OTHERS)
    for _ in range(2):
        assert_same(list(torch.autograd.grad(out.sum(), weight, retain_graph=True)), list(expected))


def test_the_rows_are_not_kept(history):
    gc.disable()
    try:
        x = history.pull(N_ID)
        reference = weakref.ref(x)
        out = recollect.checkpoint(layer, x, weights(), source=Rows(history, N_ID))
        del x
        assert reference() is None
        out.sum().backward()
    finally:
        gc.enable()
    large = History(10_000, 50)
    weight = torch.randn(50, 2, requires_grad=True)
    every = torch.arange(10_000)
    with peak_memory("cpu") as memory:
        outs = [recollect.checkpoint(torch.mm, large.pull(every), weight, source=Rows(large, every)) for _ in range(5)]
        assert memory.current_bytes < 6 * 10_000 * 2 * 4
    assert len(outs) == 5


def test_rows_that_were_pushed_in_between_are_refused(history, tmp_path):
    source = Rows(history, N_ID)
    out = recollect.checkpoint(layer, history.pull(N_ID), weights(), source=source)
    history.push(torch.ones(3, WIDTH), n_id=torch.tensor([3, 2, 11]))
    with pytest.raises(InPlaceError, match=r"^2 of the 4 rows that a frame got in its forward pass") as caught:
        out.sum().backward()
    assert repr(history) in str(caught.value)
    recollect.checkpoint(layer, history.pull(N_ID), weights(), source=source).sum().backward()
    out = recollect.checkpoint(layer, history.pull(N_ID), weights(), source=source)
    history.reset_parameters()
    with pytest.raises(InPlaceError, match="4 of the 4 rows"):
        out.sum().backward()


def test_pushes_are_counted_from_a_note_on(history):
    source = Rows(history, N_ID)
    source.note()
    x = history.pull(N_ID)
    history.push(torch.ones(1, WIDTH), n_id=N_ID[:1])
    out = recollect.checkpoint(layer, x, weights(), source=source)
    with pytest.raises(InPlaceError, match="1 of the 4 rows"):
        out.sum().backward()


def test_pushes_of_a_pool_count(tmp_path):
    history = History(NODES, WIDTH, path=tmp_path / "a.history")
    with AsyncIOPool(2, NODES, WIDTH) as pool:
        out = recollect.checkpoint(layer, history.pull(N_ID).double(), weights(), source=Rows(history, N_ID))
        pool.async_push(history, torch.ones(1, WIDTH), n_id=N_ID[1:2])
        with pytest.raises(InPlaceError, match=r"1 of the 4 rows .*a\.history"):
            out.sum().backward()


@pytest.mark.parametrize("named", [False, True])
def test_own_rows_above_those_of_the_history(history, named):
    """``first`` is kept and has a gradient, as a mini-batch's own rows."""

    def step(wrap: bool) -> list[Tensor]:
        own = torch.linspace(0, 1, 2 * WIDTH, dtype=torch.float64).view(2, WIDTH).requires_grad_()
        weight, first = weights(), own * 2
        x = torch.cat([first, history.pull(N_ID)])
        if not wrap:
            out = layer(x, weight)
        elif named:
            source = Rows(history, N_ID, first=first, argument="x")
            out = recollect.checkpoint(lambda weight, x: layer(x, weight), weight, x=x, source=source)
        else:
            source = Rows(history, N_ID, first=first, argument=1)
            out = recollect.checkpoint(lambda weight, x: layer(x, weight), weight, x, source=source)
        return list(torch.autograd.grad(out.sum(), [own, weight]))

    assert_same(step(True), step(False))


def test_type_strides_and_flags_are_those_of_the_forward(history):
    x = history.pull(N_ID).float().t().contiguous().t().requires_grad_()
    held = Rows(history, N_ID).keep((x, "y"), {"z": 1})
    (again, y), kwargs = held.inputs()
    assert torch.equal(again, x)
    assert again.stride() == x.stride() == (1, 4)
    assert again.dtype is torch.float32
    assert again.requires_grad
    assert again.is_leaf
    assert (y, kwargs) == ("y", {"z": 1})


def test_other_arguments_and_numbers_may_not_be_changed(history):
    n_id, scale = N_ID.clone(), torch.ones(())
    held = Rows(history, n_id).keep((history.pull(n_id), scale), {})
    n_id[0] = 3
    with pytest.raises(InPlaceError, match=r"shape \[4\]"):
        held.inputs()
    held = Rows(history, N_ID).keep((history.pull(N_ID), scale), {})
    scale += 1
    held.inputs()
    assert [tensor is scale for _, tensor, _ in held.changed()] == [True]  # an error if the region reads it


def test_what_is_refused(history):
    with pytest.raises(TypeError, match=r"history: a recollect\.autoscale\.History is expected \(got int\)"):
        Rows(3, N_ID)
    with pytest.raises(IndexError, match=f"a history of {NODES} rows"):
        Rows(history, torch.tensor([NODES]))
    with pytest.raises(TypeError, match="int64 or int32"):
        Rows(history, torch.ones(3))
    with pytest.raises(ValueError, match=r"\[4, 3\] \(got \[5, 3\]\)"):
        recollect.checkpoint(layer, torch.zeros(5, WIDTH), weights(), source=Rows(history, N_ID))
    for argument in (2, -1, "x"):
        with pytest.raises(TypeError, match=rf"argument={argument!r}: the frame must get a tensor there.*2 arguments"):
            recollect.checkpoint(layer, history.pull(N_ID), weights(), source=Rows(history, N_ID, argument=argument))


def test_a_network_keeps_its_own_rows_alone():
    """Between forward and backward, of layers that run in frames: no halo."""
    data = make_graph()
    held, gradients = {}, []
    for recompute in (False, True):
        model = Mean(recompute=recompute)
        first = batches(data, 2)[0]
        run(model, first).sum().backward()
        with peak_memory("cpu") as memory:
            out = run(model, first)
            held[recompute] = memory.current_bytes
        gradients.append(backward(model, out))
    assert held[True] < held[False] / 2
    # Each layer's own rows, what the first one leaves for the last one (twice), the output, and numbers of parts.
    rows = sum(model.hidden_channels) + 2 * model.hidden_channels[0] + 4
    assert held[True] <= first.batch_size * rows * 8 + 256
    assert_same(gradients[1], gradients[0])
