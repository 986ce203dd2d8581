"""A training step with the histories in memory, in files, with a pool, on a device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench._graph_works import Trainer, Work
from bench._harness import alternating, median
from bench._report import OTHER_DEVICE, Target, ratio, show, table
from recollect.autoscale import SubData, SubgraphLoader

Row = dict[str, Any]


# METIS finds little to cut in so few large blocks: a halo is several times its batch, and much is pulled.
LARGE = Work(100_000, block=10_000, parts_in_batch=2, method="metis")
QUICK = Work(2_000, block=200, channels=32, part=100, parts_in_batch=2, method="metis")


def places(device: torch.device, folder: Path, buffer_size: int, layers: int) -> dict[str, dict[str, Any]]:
    """Options of the model for each place; the first is what the others are held against."""
    pool = {"pool_size": layers - 1, "buffer_size": buffer_size}
    found: dict[str, dict[str, Any]] = {
        "memory": {},
        "memory, pool": pool,
        "file": {"history_path": folder / "plain"},
        "file, pool": {"history_path": folder / "pool", **pool},
    }
    return found if device.type == "cpu" else {"device": {"device": device}, **found}


class Pass:
    """A few training steps of one system, one after the other; every call begins from where the last one ended."""

    def __init__(self, work: Work, batches: Sequence[SubData], device: torch.device, options: dict[str, Any]) -> None:
        self.batches = batches
        self.trainer = Trainer(work, device, linear=True, **options)
        self.trainer.fill()
        self.losses: list[float] = []

    def __call__(self) -> None:
        for batch in self.batches:
            self.losses.append(float(self.trainer.batch(batch)))


def batches_of(work: Work, number: int, device: torch.device) -> list[SubData]:
    """Mini-batches of different parts, the same at each call."""
    loader = SubgraphLoader(
        *work.permuted(work.data()),
        work.parts_in_batch,
        log=False,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
    )
    return [batch.to(device) for batch, _ in zip(loader, range(number), strict=False)]


def measure_steps(work: Work, device: torch.device, *, repeats: int = 7, steps: int = 4) -> Row:
    """Time a training step with the histories in each place, taking turns; also whether all have the same losses."""
    batches = batches_of(work, steps, device)
    halos = [batch.n_id.numel() - batch.batch_size for batch in batches]
    with tempfile.TemporaryDirectory() as name:
        systems: dict[str, Callable[[], None]] = {
            place: Pass(work, batches, device, options)
            for place, options in places(device, Path(name), max(halos), work.layers).items()
        }
        for system in systems.values():
            system()
        times = alternating(systems, repeats, device)
        losses = [system.losses for system in systems.values() if isinstance(system, Pass)]
        systems.clear()
    seconds = {place: [value / steps for value in values] for place, values in times.items()}
    base = next(iter(seconds))
    return {
        "work": asdict(work),
        "batch_nodes": [batch.batch_size for batch in batches],
        "halo_nodes": halos,
        "all_seconds": seconds,
        "seconds": {place: median(values) for place, values in seconds.items()},
        "ratio": {place: ratio(median(values), median(seconds[base])) for place, values in seconds.items()},
        "same_losses": all(found == losses[0] for found in losses),
    }


def steps_table(row: Row) -> str:
    """Milliseconds of a step, and how often it lasts the first one's time."""
    rows = [
        [place, show(row["seconds"][place], ".1f", 1e-3), show(row["ratio"][place], ".3f")] for place in row["ratio"]
    ]
    return table(["histories", "step, ms", "ratio"], rows)


def steps_targets(row: Row) -> list[Target]:
    """Hold the steps against the numbers to reach."""
    on_card = "device" in row["ratio"]
    return [
        Target(
            "step with histories in files and a pool / in memory",
            None if on_card else row["ratio"]["file, pool"],
            1.2,
            why_not_measured=OTHER_DEVICE,
        ),
        Target(
            "step with histories in host memory and a pool / on the device",
            row["ratio"]["memory, pool"] if on_card else None,
            1.15,
            why_not_measured=OTHER_DEVICE,
        ),
    ]
