"""What a training step costs, reversible and with everything kept: measured, side by side."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric

from recollect.data import GraphDataset
from recollect.frames import DriftWarning
from recollect.memory import peak_memory, tensor_bytes
from recollect.train._build import build_model
from recollect.train._memory import available_bytes
from recollect.train._settings import Settings
from recollect.train._step import Step

__all__ = ["Costs", "measure"]

_MARGIN = 0.7  # share of the free memory that a step with everything kept may be expected to need


@dataclass
class Costs:
    """Peaks in bytes above parameters, gradients, the optimizer's state and the graph; ``None`` is not measured.

    Attributes:
        peak: of a training step.
        peak_plain: of a step with every activation kept.
        expected_plain: extrapolated from smaller depths, where ``peak_plain`` was too much for this machine.
        seconds: per epoch (a step and an evaluation), median.
        seconds_plain: the same with every activation kept.
        state: bytes of parameters, gradients and the optimizer's state.
        curve: ``{"layers", "peak", "peak_plain"}`` for several depths, shallow first.
    """

    peak: int | None = None
    peak_plain: int | None = None
    expected_plain: int | None = None
    seconds: float | None = None
    seconds_plain: float | None = None
    state: int | None = None
    curve: list[dict[str, int | None]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    fabric: Fabric, settings: Settings, graph: GraphDataset, tell: Callable[[str], None] = lambda text: None
) -> Costs:
    """Measure steps of freshly made models; random state and warnings about drift stay as they were.

    Args:
        fabric: gives device and precision.
        settings: of the run. Depths are measured from two shallow ones, which tell what the full depth will need, to
            the full depth, then between, until ``measure.seconds`` are over.
        graph: on the device.
        tell: gets a line of text before each depth.
    """
    start, layers = time.perf_counter(), settings.model.num_layers
    shallow = [depth for depth in (2, 4) if depth < layers]  # quick, whatever the depth
    chosen = settings.measure.depths or (layers // 8, layers // 4, layers // 2)
    between = sorted({depth for depth in chosen if depth >= 1} - {*shallow, layers})
    costs = Costs()
    with _undisturbed():
        for depth in shallow:
            tell(f"{depth} layers")
            _add(costs, depth, _Probe(fabric, settings, graph, depth))
        tell(f"{layers} layers")
        probe = _Probe(fabric, settings, graph, layers)
        _add(costs, layers, probe)
        whole = costs.curve[-1]
        costs.peak, costs.peak_plain = whole["peak"], whole["peak_plain"]
        if costs.peak_plain is None:
            costs.expected_plain = _extrapolate(costs.curve, layers)
        costs.state = tensor_bytes(probe.step.network, probe.step.optimizer.optimizer, gradients=True)
        deadline = start + settings.measure.seconds
        modes = [False] if costs.peak_plain is None else [False, True]
        costs.seconds, costs.seconds_plain = probe.seconds(modes, settings.measure.repeats, deadline)
        del probe
        for depth in between:
            if time.perf_counter() > deadline:
                break
            tell(f"{depth} layers")
            _add(costs, depth, _Probe(fabric, settings, graph, depth))
    costs.curve.sort(key=lambda point: point["layers"] or 0)
    return costs


class _Probe:
    """A model of some depth, whose gradients and optimizer state are there before anything is measured."""

    def __init__(self, fabric: Fabric, settings: Settings, graph: GraphDataset, layers: int) -> None:
        self.step = Step(fabric, settings, graph, build_model(settings.model, graph, layers))
        for parameter in self.step.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.step.optimizer.optimizer.step()
        self.device = fabric.device

    def peak(self, plain: bool) -> int:
        """Bytes of one step at its peak."""
        self.step.network.disable = plain
        with peak_memory(self.device) as memory:
            self.step.train()
        return memory.peak_bytes

    def seconds(self, modes: list[bool], repeats: int, deadline: float) -> tuple[float | None, float | None]:
        """Median seconds of an epoch, reversible and plain, taken by turns."""
        times: dict[bool, list[float]] = {mode: [] for mode in modes}
        for turn in range(repeats):
            if turn and time.perf_counter() > deadline:
                break
            for mode in modes:
                self.step.network.disable = mode
                start = time.perf_counter()
                self.step.train()
                self.step.evaluate()
                self._wait()
                times[mode].append(time.perf_counter() - start)
        plain = statistics.median(times[True]) if True in times else None
        return statistics.median(times[False]), plain

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _add(costs: Costs, layers: int, probe: _Probe) -> None:
    if not costs.curve:
        probe.step.train()  # the first step on a GPU also allocates the workspaces of its libraries
    peak = probe.peak(plain=False)
    expected, free = _extrapolate(costs.curve, layers), available_bytes(probe.device)
    plain: int | None = None
    if expected is None or free is None or expected < _MARGIN * free:
        try:
            plain = probe.peak(plain=True)
        except torch.OutOfMemoryError:
            probe.step.optimizer.zero_grad(set_to_none=False)
    costs.curve.append({"layers": layers, "peak": peak, "peak_plain": plain})


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
def _undisturbed() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        yield
