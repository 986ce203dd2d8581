"""One unit, run in every way that comes into question."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recollect._arguments import Certify
from recollect._storages import storages_of
from recollect._torch import compiled_blocks_exist
from recollect._util._tree import Tree, tensors_of
from recollect.budget._recipes import has_recipe, run_sparingly
from recollect.budget._units import is_inverted
from recollect.frames import FrameError, Kept, Own, Previous, Source, run_frame, settle
from recollect.memory import peak_memory

__all__ = ["Cost", "Options", "Sparing", "cost_of"]


@dataclass(frozen=True)
class Sparing:
    """What it costs not to keep what cheap functions return.

    Args:
        kept: bytes that are kept, beside the input.
        moment: transient bytes of forward and backward.
        seconds: that this adds.
        spared: bytes of what the unit returns that the next one need not keep, if it is treated so too.
    """

    kept: int
    moment: int
    seconds: float
    spared: int


@dataclass(frozen=True)
class Cost:
    """What one kind of unit costs.

    Args:
        forward: transient bytes of its forward, beside what it keeps and returns.
        backward: transient bytes of its backward, gradients among them.
        seconds: that a checkpoint adds; the others likewise.
        repeats: whether what it returns is the same when it runs again, so that units after it can ask for that.
        selective: the same where what cheap functions return is not kept.
    """

    forward: int
    backward: int
    seconds: float
    repeats: bool
    selective: Sparing | None = None
    offloaded: float | None = None
    inverted: float | None = None


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        device: whose memory counts.
        certify: what frames accept of a rebuild.
        selective: whether dropping what cheap functions return comes into question.
        offload: the source that offloads inputs, if it comes into question.
        apart: whether each unit is measured; else one of those whose types and shapes are the same.
    """

    device: torch.device
    certify: Certify
    selective: bool
    offload: Source | None
    apart: bool = False


def cost_of(module: nn.Module, own: Own, as_set: Own, arguments: Tree, options: Options, known: int) -> Cost | None:
    """Run a unit in every way that comes into question; return ``None`` if it can only be stored."""
    tensors = arguments.tensors
    times = 5 if known < 4 else 3 if known < 8 else 1
    kept = {s._cdata for t in tensors for s in storages_of(t)}
    measured: list[int] = []
    spared: list[int] = []

    # On a machine that does other things too, a thread's own time says more; it does not contain waiting for files.
    clock = time.thread_time if options.device.type == "cpu" and options.offload is None else time.perf_counter

    def run(function: Callable[..., Any], meter: bool = False) -> float:
        leaves = [t.detach().requires_grad_() if t.requires_grad else t for t in tensors]
        wanted = [t for t in leaves if t.requires_grad]
        wanted += [p for p in module.parameters() if p.requires_grad]
        args, kwargs = arguments.build(leaves)
        start = clock()
        with peak_memory(options.device) if meter else nullcontext() as forward:
            output = function(*args, **kwargs)
            targets = [t for t in tensors_of(output) if t.requires_grad]
        if forward is not None:
            measured.extend([forward.peak_bytes, forward.current_bytes])
            measured.append(sum(s.nbytes() for t in tensors_of(output) for s in storages_of(t) if s._cdata not in kept))
        del output
        weights = [torch.ones_like(t) for t in targets]
        with peak_memory(options.device) if meter else nullcontext() as backward:
            torch.autograd.grad(targets, wanted, weights, allow_unused=True)
        if backward is not None:
            measured.append(backward.peak_bytes + sum(w.nbytes for w in weights))
        _wait(options.device)
        return clock() - start

    def framed(source: Source) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return run_frame(own, args, kwargs, source, certify=options.certify)

        return call

    def sparing(*args: Any, **kwargs: Any) -> Any:
        output = run_sparingly(own, args, kwargs, options.certify)
        spared.append(sum(t.nbytes for t in tensors_of(output) if has_recipe(t)))
        return output

    def rebuilt() -> float:
        with torch.no_grad():
            start = clock()
            args, kwargs = arguments.build(tensors)
            own(*args, **kwargs)
            _wait(options.device)
            return clock() - start

    try:
        run(own, meter=True)
        run(own)
    except torch.OutOfMemoryError:
        raise
    except (FrameError, RuntimeError):  # a part of its graph was made before it was called, by a hook or another unit
        return None
    peak, current, made, backward = measured
    ways: dict[str, Callable[[], float]] = {
        "plain": functools.partial(run, own),
        "again": rebuilt,
        "checkpoint": functools.partial(run, framed(Kept())),
    }
    try:
        ways["checkpoint"]()
        settle()
    except FrameError:
        return None
    try:
        run(_followed(framed(Previous())))
        settle()
        repeats = True
    except FrameError:
        repeats = False
    kept_rest = moment = 0
    if options.selective and not compiled_blocks_exist():
        measured.clear()
        run(sparing, meter=True)
        sparing_peak, sparing_current, _, sparing_backward = measured
        kept_rest, moment = max(0, sparing_current - made), max(sparing_peak - sparing_current, sparing_backward)
        if kept_rest < current - made or spared[0] > 0:
            ways["selective"] = functools.partial(run, sparing)
    if options.offload is not None:
        ways["offload"] = functools.partial(run, framed(options.offload))
    if is_inverted(module):
        ways["invert"] = functools.partial(run, as_set)
    for name in ("offload", "invert"):
        if name in ways:
            ways[name]()
    # In turns, so that what else the machine does is the same for all of them.
    taken = [[way() for way in ways.values()] for _ in range(times)]
    best = {name: min(column) for name, column in zip(ways, zip(*taken, strict=True), strict=True)}
    plain, again = best.pop("plain"), best.pop("again")
    # What runs again takes as long as before, whatever the clock says; and nothing but storing costs nothing.
    least = {"checkpoint": again, "offload": again, "invert": again}
    added = {name: max(found - plain, least.get(name, 0.01 * again)) for name, found in best.items()}
    transient = max(0, peak - current)
    return Cost(
        transient, backward, added["checkpoint"], repeats,
        Sparing(kept_rest, moment, added["selective"], spared[0]) if "selective" in added else None,
        added.get("offload"), added.get("invert"),
    )  # fmt: skip


def _followed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a row of two frames, the second of which asks the first for what it returned."""

    def call(*args: Any, **kwargs: Any) -> Any:
        made = [t for t in tensors_of(function(*args, **kwargs)) if t.requires_grad]
        return run_frame(lambda *tensors: [t.sin() for t in tensors], tuple(made), {}, Previous())

    return call


def _wait(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()  # of which there is one
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
