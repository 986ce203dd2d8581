"""What is measured of functions on a card, side by side: times, the allocator's peak, and where the host waits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from bench._harness import alternating, median, peak_bytes
from bench._measure import reason
from bench._report import MIB, ratio, show, table
from bench._step import UnavailableError

Row = dict[str, Any]
Make = Callable[[], Callable[[], Any]]

# What a function that is measured may raise: it is told in the report, and the others are measured all the same.
FAILURES = (UnavailableError, RuntimeError, ValueError, NotImplementedError, TypeError)

_SYNCHRONIZES = "called a synchronizing"
_MEASURED = "what is measured"


def host_waits(function: Callable[[], Any], device: torch.device) -> int | None:
    """How often the host waits for a value of the device in one call, as torch's sync debug mode tells.

    It tells of copies to the host that block, and not of events that are waited for.

    Returns:
        None where the device has no such mode.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "set_sync_debug_mode"):
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            module.set_sync_debug_mode("default")
    return sum(_SYNCHRONIZES in str(one.message) for one in caught)


def profiled_waits(function: Callable[[], Any], device: torch.device) -> int | None:
    """How often the host waits in one call, as the profiler sees it: for streams, events or the device.

    Returns:
        None on other devices than CUDA, and where the profiler does not run.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function(_MEASURED):
            function()
    except RuntimeError:
        return None
    return synchronizations(profile.events())


def synchronizations(events: Iterable[Any] | None) -> int:
    """How many of a profile's events are waits of the host, of those in the range of what is measured."""
    events = list(events or ())
    ranges = [event.time_range for event in events if event.name == _MEASURED]
    return sum(
        any(part.start <= event.time_range.start <= part.end for part in ranges)
        for event in events
        if event.name.endswith("Synchronize")
    )


def compare(makers: Mapping[str, Make], repeats: int, device: torch.device, warm_up: int = 2) -> Row:
    """Measure functions that do the same, taking turns.

    Args:
        makers: make each of them.
        repeats: of the timing.
        device: the card.
        warm_up: calls that count nowhere: libraries choose their kernels and allocate workspaces in the first ones.

    Returns:
        By name: `seconds` (median), `all_seconds`, `peak_bytes` (of the allocator, above what was there before; CUDA
        alone), `waits` (by torch's sync debug mode), `profiled_waits` (by the profiler; CUDA alone); and `skipped`,
        with reasons.
    """
    row: Row = {"skipped": {}, "peak_bytes": {}, "waits": {}, "profiled_waits": {}}
    functions: dict[str, Callable[[], Any]] = {}
    for name, make in makers.items():
        try:
            function = make()
            for _ in range(warm_up):
                function()
            row["waits"][name] = host_waits(function, device)
            row["profiled_waits"][name] = profiled_waits(function, device)
            row["peak_bytes"][name] = peak_bytes(function, device) if device.type == "cuda" else None
        except FAILURES as error:
            row["skipped"][name] = reason(error)
            continue
        functions[name] = function
    row["all_seconds"] = alternating(functions, repeats, device)
    row["seconds"] = {name: median(values) for name, values in row["all_seconds"].items()}
    return row


def ratios(row: Row, key: str, base: str) -> dict[str, float | None]:
    """Each one's figure over that of another one."""
    return {name: ratio(value, row[key].get(base)) for name, value in row[key].items()}


def comparison(title: str, row: Row) -> str:
    """A table of all that was measured, and why the rest was not."""
    body = [
        [
            name,
            show(row["seconds"][name], ".3f", 1e-3),
            show(row["peak_bytes"].get(name), ".1f", MIB),
            show(row["waits"].get(name), ".0f"),
            show(row["profiled_waits"].get(name), ".0f"),
        ]
        for name in row["seconds"]
    ]
    body += [[name, *"----"] for name in row["skipped"]]
    lines = [title, table(["", "ms", "peak, MiB", "waits", "profiled"], body)]
    return "\n".join(lines + [f"  {name}: {why}" for name, why in row["skipped"].items()])
