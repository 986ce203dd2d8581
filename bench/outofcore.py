"""Whole graphs out of core: memory and time of exact steps part by part, beside the same network in memory.

    python -m bench.outofcore                # N from 20,000 to 200,000, L from 8 to 64; some minutes
    python -m bench.outofcore --quick        # a small graph: seconds
    python -m bench.outofcore --nodes 20000 1000000 --depths 8 256   # as large as the disk allows

Graphs are blocks of 500 nodes: 10 edges a node, of which 1 in 100 leads out of its block. Resident memory is measured
in a process of its own for each size, during a step after the graph was given up, beyond what the process takes before
there is a network. Times against the plain network and the reversible one take turns in one process. JSON goes into
bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from bench._harness import alternating, process_bytes, settings
from bench._report import Target, finish, header, results_file, show, table

CPU = torch.device("cpu")
BLOCK, DEGREE, FEATURES, CLASSES = 500, 10, 32, 5


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--part", type=int, default=10_000, help="nodes of a part")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small graph")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder of the files; default: bench/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    if parser.parse_args(arguments).quick:
        parser.set_defaults(nodes=[1000, 2000], depths=[2, 4], channels=16, part=500, repeats=1)
    return parser.parse_args(arguments)


def make_graph(nodes: int) -> Any:
    """A graph whose parts, which are consecutive nodes, have few edges between them."""
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(0)
    target = torch.arange(nodes).repeat_interleave(DEGREE)
    inside = target // BLOCK * BLOCK + torch.randint(BLOCK, target.shape, generator=generator)
    anywhere = torch.randint(nodes, target.shape, generator=generator)
    out = torch.rand(target.shape, generator=generator) < 0.01
    source = torch.where(out, anywhere, inside.clamp_(max=nodes - 1))
    return Data(
        x=torch.randn(nodes, FEATURES, generator=generator),
        edge_index=torch.stack([source, target]),
        y=torch.randint(CLASSES, (nodes,), generator=generator),
        train_mask=torch.rand(nodes, generator=generator) < 0.5,
    )


def bounds(nodes: int, part: int) -> torch.Tensor:
    return torch.tensor([*range(0, nodes, part), nodes])


def make_model(channels: int, depth: int) -> Any:
    from recollect.models import RevGNN

    torch.manual_seed(0)
    return RevGNN(FEATURES, channels, CLASSES, depth, exact=True)


def criterion(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, y, reduction="sum") / 1000


def child(task: dict[str, Any]) -> dict[str, Any]:
    """One step in this process; what it adds to the resident memory, and how long it takes."""
    from recollect.outofcore import WholeGraph

    torch.set_num_threads(task["threads"])
    before = process_bytes("VmRSS") or 0
    model, data = make_model(task["channels"], task["depth"]), make_graph(task["nodes"])
    whole = WholeGraph(model, data, bounds(task["nodes"], task["part"]), task["store"], memory=0)
    del data
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], process_bytes("VmRSS") or 0)

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.perf_counter()
    whole.step(criterion)
    seconds = time.perf_counter() - start
    over.set()
    watching.join()
    tables = [file for file in Path(task["store"]).glob("*.table") if file.name != "gradients.table"]  # of parameters
    files = sum(file.stat().st_size for file in tables)
    return {"resident_bytes": peak[0] - before, "seconds": seconds, "table_bytes": files}


def resident(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A process for each size."""
    rows = []
    for nodes in options.nodes:
        for depth in options.depths:
            with tempfile.TemporaryDirectory() as store:
                task = {
                    **{"nodes": nodes, "depth": depth, "channels": options.channels, "part": options.part},
                    **{"store": store, "threads": options.threads},
                }
                command = [sys.executable, "-W", "ignore", "-m", "bench.outofcore", "--child", json.dumps(task)]
                # What is freed is given back, or what the graph took while it was cut would count.
                surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings)
                rows.append({"nodes": nodes, "depth": depth, **json.loads(done.stdout.splitlines()[-1])})
                print(rows[-1], flush=True)
    return rows


def times(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step on the smallest graph, taking turns."""
    from recollect.outofcore import WholeGraph

    nodes, depth = min(options.nodes), min(options.depths)
    model, data = make_model(options.channels, depth), make_graph(nodes)

    def in_memory(disable: bool) -> None:
        model.disable = disable
        logits = model(data.x, data.edge_index)
        criterion(logits[data.train_mask], data.y[data.train_mask]).backward()

    with tempfile.TemporaryDirectory() as store:
        ptr = bounds(nodes, options.part)
        tables, files = WholeGraph(model, data, ptr), WholeGraph(model, data, ptr, store)
        functions: dict[str, Callable[[], object]] = {
            "plain": lambda: in_memory(True),
            "reversible": lambda: in_memory(False),
            "tables in memory": lambda: tables.step(criterion),
            "tables in files": lambda: files.step(criterion),
        }
        for function in functions.values():
            function()
        found = alternating(functions, options.repeats, CPU)
    return {name: median(values) for name, values in found.items()}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure; print, write and return the report."""
    options = _parse(arguments)
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return {}
    with settings(options.threads):
        seconds = times(options)
        rows = resident(options)
    plain = seconds["plain"]
    body = [[name, show(value, ".3f"), show(value / plain, ".2f")] for name, value in seconds.items()]
    print(f"\na step of {min(options.depths)} layers on {min(options.nodes):,} nodes")
    print(table(["", "seconds", "of plain"], body))
    least = rows[0]["resident_bytes"]
    body = [
        [
            f"{row['nodes']:,}",
            str(row["depth"]),
            show(row["resident_bytes"] / 2**20, ".1f"),
            show(row["table_bytes"] / 2**20, ".1f"),
            show(row["seconds"], ".1f"),
        ]
        for row in rows
    ]
    print(table(["nodes", "layers", "resident, MiB", "tables, MiB", "seconds"], body), flush=True)
    targets = [
        Target("step with tables in files / plain", seconds["tables in files"] / plain, 2.0),
        *(
            Target(
                f"resident memory at {row['nodes']:,} nodes and {row['depth']} layers / that of the first",
                row["resident_bytes"] / least,
                1.1,
            )
            for row in rows[1:]
        ),
    ]
    names = ("nodes", "depths", "channels", "part", "repeats", "threads")
    report = header(CPU, {name: getattr(options, name) for name in names})
    file = results_file("outofcore" + ("-quick" if options.quick else ""), CPU, options.output)
    return {"outofcore": finish(report | {"seconds": seconds, "resident": rows}, targets, file)}


if __name__ == "__main__":
    main()
