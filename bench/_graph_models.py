"""Memory of a training step as the graph grows, and one epoch of a large graph in mini-batches and at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._graph_works import CLASSES, Trainer, Work
from bench._harness import peak_bytes, synchronize
from bench._report import GB, MIB, Target, ratio, show, table
from recollect.autoscale import SubgraphLoader

Row = dict[str, Any]


PEAKS = (Work(20_000), Work(1_000_000))
QUICK = (Work(2_000, channels=32, part=200), Work(10_000, channels=32, part=200))
EPOCH = Work(1_000_000, part=5_000, parts_in_batch=5, method="metis")
QUICK_EPOCH = Work(5_000, channels=32, part=500, parts_in_batch=2, method="metis")


def measure_peaks(works: Sequence[Work], device: torch.device, steps: int = 4) -> list[Row]:
    """Peak tensor bytes of a step beyond graph, parameters and histories: cut a mini-batch, train on it, push it."""
    rows = []
    for work in works:
        data, ptr = work.permuted(work.data())
        loader = SubgraphLoader(data, ptr, work.parts_in_batch, log=False)
        trainer, batches = Trainer(work, device, dropout=0.5), iter(loader)
        sizes: list[list[int]] = []
        peaks = []
        trainer.batch(next(batches))  # the optimizer's state, the loader's table of nodes
        for _ in range(steps):

            def step(trainer: Trainer = trainer, batches: Any = batches, sizes: list[list[int]] = sizes) -> None:
                batch = next(batches)
                sizes.append([batch.batch_size, batch.n_id.numel()])
                trainer.batch(batch)

            peaks.append(peak_bytes(step, device))
        rows.append(
            {
                "work": asdict(work),
                "nodes": work.nodes,
                "batch_and_halo": sizes,
                "all_peak_bytes": peaks,
                "peak_bytes": max(peaks),
                "history_bytes": work.history_bytes(),
            }
        )
    return rows


def peaks_table(rows: Sequence[Row]) -> str:
    """MiB of a step, and beside it of the histories."""
    body = []
    for row in rows:
        batch, nodes = max(row["batch_and_halo"], key=lambda sizes: sizes[1])
        cells = [f"{row['nodes']:,}", f"{batch:,}", f"{nodes - batch:,}"]
        body.append([*cells, show(row["peak_bytes"], ".1f", MIB), show(row["history_bytes"], ".0f", MIB)])
    return table(["nodes", "batch", "halo", "step, MiB", "histories, MiB"], body)


def peaks_targets(rows: Sequence[Row]) -> list[Target]:
    """The largest graph against the smallest."""
    first, last = rows[0], rows[-1]
    name = f"peak tensor bytes of a step, N={last['nodes']:,} / N={first['nodes']:,}"
    return [Target(name, ratio(last["peak_bytes"], first["peak_bytes"]), 1.1)]


def measure_epoch(work: Work, device: torch.device) -> Row:
    """Time and peak of one epoch in mini-batches, and of one step on the whole graph where that fits into memory."""
    row: Row = {"work": asdict(work), "description": str(work), "history_bytes": work.history_bytes(), "skipped": {}}
    row["seconds"], row["peak_bytes"] = {}, {}
    data = work.data()
    start = time.perf_counter()
    data, ptr = work.permuted(data)
    row["partition_seconds"] = time.perf_counter() - start
    _in_batches(row, work, data, ptr, device)
    needed, there = _foretold(work, device), _available(device)
    row["foretold_bytes"] = needed
    if there is not None and needed > 0.9 * there:
        row["skipped"]["whole graph"] = f"needs about {needed / GB:.1f} GB, and {there / GB:.1f} GB are there"
        return row
    whole = _whole(work, device)
    data = data.to(device)
    _once(row, "whole graph", device, lambda: whole.whole(data))
    return row


def _in_batches(row: Row, work: Work, data: Any, ptr: Tensor, device: torch.device) -> None:
    loader = SubgraphLoader(data, ptr, work.parts_in_batch, log=False, shuffle=True)
    trainer = Trainer(work, device, dropout=0.5)
    trainer.batch(next(iter(loader)))

    def epoch() -> None:
        for batch in loader:
            trainer.batch(batch)

    _once(row, "histories", device, epoch)
    row["batches"], row["staleness"] = len(loader), trainer.model.staleness()


def _once(row: Row, name: str, device: torch.device, function: Callable[[], Any]) -> None:
    """Time a pass, and measure the peak of the next one."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    row["seconds"][name] = time.perf_counter() - start
    row["peak_bytes"][name] = peak_bytes(function, device)


def _whole(work: Work, device: torch.device) -> Trainer:
    """A trainer without histories, which the whole graph does not need."""
    return Trainer(replace(work, nodes=1), device, dropout=0.5)


def _foretold(work: Work, device: torch.device) -> int:
    """Peak of a step on the whole graph, from that on a twentieth of it."""
    small = replace(work, nodes=work.nodes // 20)
    data, trainer = small.data().to(device), _whole(small, device)
    data.y = data.y % CLASSES
    trainer.whole(data)  # the optimizer's state
    return 20 * peak_bytes(lambda: trainer.whole(data), device)


def _available(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def epoch_table(row: Row) -> str:
    """Seconds and peaks of both ways."""
    body = [
        [name, show(row["seconds"][name], ".1f"), show(row["peak_bytes"][name], ".2f", GB)] for name in row["seconds"]
    ]
    body += [[name, "-", reason] for name, reason in row["skipped"].items()]
    lines = [
        row["description"],
        f"partition: {row['partition_seconds']:.1f} s; histories: {row['history_bytes'] / GB:.2f} GB; "
        f"{row['batches']} batches; mean age of the histories: {', '.join(f'{age:.1f}' for age in row['staleness'])}",
        table(["one epoch", "seconds", "peak, GB"], body),
    ]
    return "\n".join(lines)
