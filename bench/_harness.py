"""Measurements that every benchmark here shares: alternating times, peaks, the allocator's record."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from recollect.memory import peak_memory


@contextlib.contextmanager
def settings(threads: int | None) -> Iterator[None]:
    """Set the number of threads (None: torch's own), silence warnings, and put all back at the end.

    The peers use what torch has deprecated; drift, of which recollect warns, is a column of the tables. What is there
    already is spared by the collections of garbage, of which every measurement starts with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    gc.collect()
    gc.freeze()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def process_bytes(name: str) -> int | None:
    """A figure of this process in bytes, from Linux; None elsewhere.

    Args:
        name: "VmRSS", what is resident, or "VmHWM", the most that was. (`getrusage` gives a new process its parent's.)
    """
    path = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) * 1024 if found else None


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time one call, after a collection of garbage that is not its own."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def alternating(
    functions: Mapping[str, Callable[[], Any]], repeats: int | Mapping[str, int], device: torch.device
) -> dict[str, list[float]]:
    """Time each function `repeats` times, taking turns, so that a slow spell of the machine hits all of them.

    The order is turned by one from round to round: nobody always runs after the same other. With repeats by name,
    who is through with its own is left out from then on.
    """
    wanted = dict.fromkeys(functions, repeats) if isinstance(repeats, int) else repeats
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(max(wanted.values(), default=0)):
        names = [name for name in functions if turn < wanted[name]]
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(functions[name], device))
    return times


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Peak tensor bytes above what was live before; see `recollect.memory.peak_memory`."""
    gc.collect()
    with peak_memory(device) as memory:
        function()
        synchronize(device)
    return memory.peak_bytes


def allocator_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes of the CPU allocator above the start, from the profiler's record; None on other devices.

    A second opinion on `peak_bytes`: it also sees buffers inside kernels, and random states.
    """
    if device.type != "cpu":
        return None
    gc.collect()
    with _silent_errors(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
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


@contextlib.contextmanager
def _silent_errors() -> Iterator[None]:
    """Keep out of sight what compiled code writes to stderr: the profiler reports each start and stop there."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
