"""What every benchmark here shares: alternating timings, allocator records, machine, targets, tables, JSON."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from recollect.memory import peak_memory

GB = 1e9


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time one call, after a collection of garbage that is not its own."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def alternating(
    functions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each function `repeats` times, taking turns, so that a slow spell of the machine hits all of them.

    The order is turned by one from round to round: nobody always runs after the same other.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(functions[name], device))
    return times


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Peak tensor bytes above what was live before; see `recollect.memory.peak_memory`."""
    gc.collect()
    with peak_memory(device) as memory:
        function()
    return memory.peak_bytes


def allocator_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes of the CPU allocator above the start, from the profiler's records; None on other devices.

    A second opinion on `peak_bytes`: it also sees buffers inside kernels, and random states.
    """
    if device.type != "cpu":
        return None
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    results = record.profiler.kineto_results if record.profiler is not None else None
    if results is None:
        return None
    current = peak = 0
    for event in sorted(
        (event for event in results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def processor() -> str:
    """The CPU's name, from Linux's list where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def machine(device: torch.device) -> dict[str, Any]:
    """Describe where the numbers come from."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "cpu": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "device": str(device),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB, 1)
    if hasattr(os, "getloadavg"):
        found["load_average"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        found["card"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python and of packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def today() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Target:
    """A number to reach: `value` measured against `limit`; `reached` is None where this run did not measure it."""

    name: str
    value: float | None
    limit: float
    strict: bool = False
    why_not_measured: str = ""

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value < self.limit if self.strict else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reached": self.reached}

    def line(self) -> str:
        word = {True: "reached", False: "NOT REACHED", None: "not measured"}[self.reached]
        sign = "<" if self.strict else "<="
        value = f"{self.value:.3g}" if self.value is not None else self.why_not_measured
        return f"  {word:<13} {self.name}: {value} ({sign} {self.limit:g})"


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def ratio(above: float | None, below: float | None) -> float | None:
    """Divide where both are measured."""
    return above / below if above is not None and below else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out columns: the first to the left, all others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (header, ["-" * w for w in widths], *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def show(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value / scale, form)


def default_output(name: str, device: torch.device, suffix: str = "") -> Path:
    """Results of each kind of device stand apart; those of a card name it."""
    place = device.type
    if device.type == "cuda":
        place += "-" + torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return Path(__file__).parent / "results" / f"{name}-{place}{suffix}.json"


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
