"""Memory of a training step as the graph grows, and one epoch of a large graph in mini-batches and at once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench._harness import peak_bytes, settings, synchronize
from bench._report import GB, MIB, Target, ratio, show, table
from recollect.autoscale import SubData, SubgraphLoader, history_bytes, normalize, partition, permute, to_adj_t
from recollect.data import load
from recollect.models import GCN

Row = dict[str, Any]
FEATURES, CLASSES = 64, 10


@dataclass(frozen=True)
class Work:
    """A GCN on a generated graph of many small blocks, most of whose edges stay inside: there is something to cut.

    Attributes:
        nodes: N.
        block: nodes of a block, whatever N is.
        part: nodes of a part, on average.
        method: of the partition; ``blocks``: whole blocks, without a search.
    """

    nodes: int
    degree: float = 10.0
    homophily: float = 0.8
    block: int = 100
    layers: int = 4
    channels: int = 256
    part: int = 1000
    parts_in_batch: int = 1
    method: str = "blocks"

    def __str__(self) -> str:
        return (
            f"{self.layers} layers x {self.channels} channels, {self.nodes:,} nodes of degree {self.degree:g} in "
            f"blocks of {self.block}, {self.part * self.parts_in_batch:,} nodes in a batch ({self.method})"
        )

    def data(self) -> Any:
        """The graph, normalised, with few classes."""
        data = load(
            "sbm",
            "",
            num_nodes=self.nodes,
            num_classes=self.nodes // self.block,
            average_degree=self.degree,
            homophily=self.homophily,
            num_features=FEATURES,
        ).data
        data = to_adj_t(data)
        data.adj_t = normalize(data.adj_t)
        return data

    def permuted(self, data: Any) -> tuple[Any, Tensor]:
        """The graph in the order of its parts, and where these begin."""
        parts = self.nodes // self.part
        if self.method == "blocks":
            perm = data.y.argsort(stable=True)
            ptr = torch.arange(parts + 1) * self.nodes // parts
        else:
            perm, ptr = partition(data.adj_t, parts, self.method, log=False)[:2]
        data = permute(data, perm, log=False)
        data.y = data.y % CLASSES
        return data, ptr

    def history_bytes(self) -> int:
        return (self.layers - 1) * history_bytes(self.nodes, self.channels)


PEAKS = (Work(20_000), Work(1_000_000))
QUICK = (Work(2_000, channels=32, part=200), Work(10_000, channels=32, part=200))
EPOCH = Work(1_000_000, part=5_000, parts_in_batch=5, method="metis")
QUICK_EPOCH = Work(5_000, channels=32, part=500, parts_in_batch=2, method="metis")


class Trainer:
    """A model and its optimizer; steps on mini-batches, or on the whole graph."""

    def __init__(self, work: Work, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = GCN(work.nodes, FEATURES, work.channels, CLASSES, work.layers, dropout=0.5).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def batch(self, batch: SubData) -> None:
        batch = batch.to(self.device)
        data = batch.data
        out = self.model(data.x, data.adj_t, batch.batch_size, batch.n_id, batch.offset, batch.count)
        self._learn(out, data.y[: batch.batch_size])

    def whole(self, data: Any) -> None:
        self._learn(self.model(data.x, data.adj_t), data.y)

    def _learn(self, out: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(out, y).backward()
        self.optimizer.step()


def measure_peaks(works: Sequence[Work], device: torch.device, steps: int = 4) -> list[Row]:
    """Peak tensor bytes of a step beyond graph, parameters and histories: cut a mini-batch, train on it, push it."""
    rows = []
    for work in works:
        data, ptr = work.permuted(work.data())
        loader = SubgraphLoader(data, ptr, work.parts_in_batch, log=False)
        trainer, batches = Trainer(work, device), iter(loader)
        sizes, peaks = [], []
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
    trainer = Trainer(work, device)
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
    return Trainer(replace(work, nodes=1), device)


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--epoch", action="store_true", help="the epoch, and not the peaks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    with settings(options.threads):
        if options.epoch:
            print(epoch_table(measure_epoch(QUICK_EPOCH if options.quick else EPOCH, torch.device(options.device))))
            return
        rows = measure_peaks(QUICK if options.quick else PEAKS, torch.device(options.device))
    print(peaks_table(rows) + "\n\n" + "\n".join(target.line() for target in peaks_targets(rows)))


if __name__ == "__main__":
    main()
