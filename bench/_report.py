"""What every benchmark here writes: where the numbers come from, which are reached, tables, JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

GB = 1e9
MIB = 2**20

# Why a number was not asked for. The JSON has these reasons as well; what is printed leaves such numbers out.
OTHER_PART, OTHER_SIZE, OTHER_DEVICE = "not part of this run", "set for another size", "set for another device"


@dataclass(frozen=True)
class Target:
    """A number to reach: `value` measured against `limit`; without a value, the reason why there is none."""

    name: str
    value: float | None
    limit: float
    strict: bool = False
    why_not_measured: str = OTHER_PART

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value < self.limit if self.strict else self.value <= self.limit

    @property
    def asked(self) -> bool:
        """Whether this run is to reach it."""
        return self.value is not None or self.why_not_measured not in (OTHER_PART, OTHER_SIZE, OTHER_DEVICE)

    def as_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "reached": self.reached}
        if self.value is not None:
            del found["why_not_measured"]
        return found

    def line(self) -> str:
        word = {True: "reached", False: "NOT REACHED", None: "not measured"}[self.reached]
        sign = "<" if self.strict else "<="
        value = f"{self.value:.3g}" if self.value is not None else self.why_not_measured
        return f"  {word:<13} {self.name}: {value} ({sign} {self.limit:g})"


def ratio(above: float | None, below: float | None) -> float | None:
    """Divide where both are measured."""
    return above / below if above is not None and below else None


def processor() -> str:
    """The CPU's name, from Linux's list where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def machine(device: torch.device) -> dict[str, Any]:
    """Describe where the numbers come from, without the machine's name or folders."""
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


def header(device: torch.device, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The first part of every report."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions("torch-recollect", "torch_geometric", "invtorch", "memcnn", "torchjd"),
        "settings": dict(settings),
    }


def finish(report: Mapping[str, Any], targets: Sequence[Target], file: Path) -> dict[str, Any]:
    """Print what is reached of what was asked for, add all to the report, write that to a file and return it."""
    done = {**report, "targets": [target.as_dict() for target in targets]}
    if targets:
        lines = [target.line() for target in targets if target.asked]
        if others := len(targets) - len(lines):
            lines.append(f"  {others} of other parts, sizes or devices: listed in {file.name}")
        print("\nnumbers to reach", *lines, sep="\n", flush=True)
    write_json(file, done)
    return done


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out columns: the first to the left, all others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, ["-" * w for w in widths], *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def show(value: Any, form: str, scale: float = 1.0) -> str:
    """Format a number; a dash for what is missing, for which the JSON has the reason."""
    return format(value / scale, form) if isinstance(value, int | float) else "-"


def results_file(name: str, device: torch.device, folder: Path | None = None) -> Path:
    """Results of each kind of device stand apart; those of a card name it."""
    place = device.type
    if device.type == "cuda":
        place += "-" + torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return (folder or Path(__file__).parent / "results") / f"{name}-{place}.json"


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_valid(report), indent=2, allow_nan=False) + "\n")


def _valid(value: Any) -> Any:
    """JSON has no word for NaN and infinity: say them as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _valid(item) for key, item in value.items()}
    return [_valid(item) for item in value] if isinstance(value, list | tuple) else value
