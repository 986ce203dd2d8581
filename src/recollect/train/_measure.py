"""What a training step costs, and what it would without recollecting: measured, side by side."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from recollect.frames import DriftWarning
from recollect.memory import peak_memory, tensor_bytes
from recollect.train._memory import available_bytes
from recollect.train._settings import Settings
from recollect.train._step import Step

__all__ = ["Costs", "measure"]

_MARGIN = 0.7  # share of the free memory that a step in the second mode may be expected to need

Peaks = dict[str, int | None]


@dataclass
class Costs:
    """Peaks in bytes above parameters, gradients, the optimizer's state and the graph; ``None`` is not measured.

    With a memory budget gradients are among what a step takes.

    "Plain" is the second mode of `Step.modes`: every activation is kept, or a step is on the whole graph.

    Attributes:
        peak: of a training step.
        peak_plain: of a plain step.
        expected_plain: extrapolated, where ``peak_plain`` was too much for this machine.
        seconds: per epoch (its steps and an evaluation), median.
        seconds_plain: the same in plain steps.
        state: bytes of parameters, gradients and the optimizer's state.
        curve: ``{"layers", "peak", "peak_plain"}`` for several depths, shallow first.
        left_out: depths for which the time was too short.
    """

    peak: int | None = None
    peak_plain: int | None = None
    expected_plain: int | None = None
    seconds: float | None = None
    seconds_plain: float | None = None
    state: int | None = None
    curve: list[dict[str, int | None]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(settings: Settings, step: Step, tell: Callable[[str], None] = lambda text: None) -> Costs:
    """Measure steps in both of their modes; random state and warnings about drift stay as they were.

    Models that can be made in any depth are made anew, in several: from two shallow ones, which tell what the full
    depth will need, to the full depth, then the others, as far as ``measure.seconds`` suffice. All other models, and
    those with a memory budget, are measured as they are, which changes their parameters.

    Args:
        settings: of the run.
        step: of the run.
        tell: gets a line of text before each depth.
    """
    deadline, costs = time.perf_counter() + settings.measure.seconds, Costs()
    with _undisturbed(step.fabric.device):
        family = step.family
        if not family.any_depth or step.plan is not None:
            tell("a step")
            probe = _Probe(step)
            most, about = step.plain_bytes(probe.peak())
            _whole(costs, probe, settings, deadline, about, probe.peaks(most))
            step.switch(second=False)
            step.optimizer.zero_grad(set_to_none=True)
            return costs
        layers = settings.model.num_layers or 1
        shallow = [depth for depth in (2, 4) if depth < layers]  # quick, whatever the depth
        chosen = settings.measure.depths or (layers // 8, layers // 4, layers // 2)
        between = sorted({depth for depth in chosen if depth >= 1} - {*shallow, layers})
        each = 0.0  # seconds that a layer of the deepest network took
        for depth in (*shallow, layers, *between):
            begun = time.perf_counter()
            # What is deeper than the run's own network is not begun if it would not end in time.
            if depth in between and begun + (each * depth if depth > layers else 0) > deadline:
                costs.left_out.append(depth)
                continue
            tell(f"{depth} layers")
            network = family.build(step.graph, step.fabric.device, num_layers=depth)
            probe = _Probe(Step(step.fabric, family, step.graph, network))
            expected = _extrapolate(costs.curve, depth)
            if not costs.curve:
                probe.step.train()  # the first step on a GPU also allocates the workspaces of its libraries
            costs.curve.append({"layers": depth, **(peaks := probe.peaks(expected))})
            if depth == max(point["layers"] or 0 for point in costs.curve):
                each = (time.perf_counter() - begun) / depth
            if depth == layers:
                _whole(costs, probe, settings, deadline, expected, peaks)
    costs.curve.sort(key=lambda point: point["layers"] or 0)
    return costs


class _Probe:
    """A step whose gradients and optimizer state are there before anything is measured."""

    def __init__(self, step: Step) -> None:
        self.step = step
        for parameter in step.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step.optimizer.optimizer.step()
        self.device = step.fabric.device

    def peaks(self, expected: int | None) -> Peaks:
        """Peaks of a step in both modes; the second is not tried where too little is free for the bytes expected."""
        peak, plain = self.peak(), None
        free = available_bytes(self.device)
        if len(self.step.modes) == 2 and (expected is None or free is None or expected < _MARGIN * free):
            try:
                if not self.step.family.any_depth or self.step.plan is not None:
                    self.peak(second=True)  # the first step may turn the adjacency, which is then kept
                plain = self.peak(second=True)
            except torch.OutOfMemoryError:
                self.step.optimizer.zero_grad(set_to_none=False)
        return {"peak": peak, "peak_plain": plain}

    def seconds(self, modes: list[bool], repeats: int, deadline: float) -> tuple[float | None, float | None]:
        """Median seconds of an epoch in the first and in the second mode, taken by turns."""
        times: dict[bool, list[float]] = {mode: [] for mode in modes}
        for turn in range(repeats):
            if turn and time.perf_counter() > deadline:
                break
            for mode in modes:
                self.step.switch(second=mode)
                start = time.perf_counter()
                self.step.train()
                self.step.evaluate()
                self._wait()
                times[mode].append(time.perf_counter() - start)
        plain = statistics.median(times[True]) if True in times else None
        return statistics.median(times[False]), plain

    def peak(self, second: bool = False) -> int:
        """Bytes of a step at its peak."""
        self.step.switch(second=second)
        if self.step.plan is not None:
            self.step.optimizer.zero_grad(set_to_none=True)
        with peak_memory(self.device) as memory:
            self.step.train()
        return memory.peak_bytes

    def _wait(self) -> None:
        if self.device.type == "mps":
            torch.mps.synchronize()  # of which there is one
        elif self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)


def _whole(
    costs: Costs, probe: _Probe, settings: Settings, deadline: float, expected: int | None, peaks: Peaks
) -> None:
    """Fill in what is of the run's own model."""
    costs.peak, costs.peak_plain = peaks["peak"], peaks["peak_plain"]
    if costs.peak_plain is None and len(probe.step.modes) == 2:
        costs.expected_plain = expected
    costs.state = tensor_bytes(probe.step.network, probe.step.optimizer.optimizer, gradients=True)
    modes = [False] if costs.peak_plain is None else [False, True]
    costs.seconds, costs.seconds_plain = probe.seconds(modes, settings.measure.repeats, deadline)


def _extrapolate(curve: list[dict[str, int | None]], layers: int) -> int | None:
    """The straight line through the shallowest and the deepest step that kept everything."""
    known = sorted((p["layers"], p["peak_plain"]) for p in curve if p["layers"] and p["peak_plain"])
    if len(known) < 2:
        return None
    (x0, y0), (x1, y1) = known[0], known[-1]
    if x0 is None or y0 is None or x1 is None or y1 is None:
        return None
    return round(y0 + (y1 - y0) * (layers - x0) / (x1 - x0))


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    other = None if device.type in ("cpu", "cuda") else torch.get_device_module(device)
    state = None if other is None else other.get_rng_state()
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            yield
    finally:
        if other is not None:
            other.set_rng_state(state)
