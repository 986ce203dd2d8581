"""How much memory is free, to not try what would end the process."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["available_bytes"]


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; ``None`` where the system does not say."""
    if device.type not in ("cpu", "mps"):  # mps has the machine's memory too
        module = torch.get_device_module(device)
        if not hasattr(module, "mem_get_info"):
            return None
        free: int = module.mem_get_info(device)[0]
        return free + int(module.memory_reserved(device)) - int(module.memory_allocated(device))
    known = [value for value in (_meminfo(), _cgroup()) if value is not None]
    return min(known, default=None)


def _meminfo(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control group (a container's limit, version 2) leaves; its file cache can be given back."""
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        if limit == "max":
            return None
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(int(limit) - used + int(stat.get("inactive_file", 0)), 0)
