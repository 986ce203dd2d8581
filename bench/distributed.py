"""Several processes: time and bytes of an epoch whose histories lie with 1, 2 and 4 of them, on one machine.

    python -m bench.distributed              # 200,000 nodes; some minutes
    python -m bench.distributed --quick      # a small graph: seconds

A GCN is trained on parts of one graph. Each row is a run by torchrun of its own, whose processes have a thread each.
Bytes on the wire are those that ranks counted, beside those that the halos of the mini-batches predict. Times
are medians of epochs, with the exchange of a layer's rows begun one layer ahead, and with none, taking turns. Where
processes outnumber cores, or memory is shared, more processes are not faster: bytes are what carries over to machines
of their own. JSON goes into bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed
from torch.nn import functional as F

from bench._report import Target, finish, header, results_file, show, table
from bench.outofcore import CLASSES, CPU, FEATURES, bounds, make_graph


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=200_000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--part", type=int, default=5_000, help="nodes of a part")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small graph")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--output", type=Path, help="folder of the files; default: bench/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    if parser.parse_args(arguments).quick:
        parser.set_defaults(nodes=2000, channels=8, part=250, ranks=[1, 2], repeats=1, layers=3)
    return parser.parse_args(arguments)


def child(task: dict[str, Any]) -> None:
    """Train some epochs as one of the ranks; the first writes what all found."""
    from recollect.autoscale import History, HistoryOptions, SubgraphLoader, normalize, to_adj_t
    from recollect.distributed import Shares
    from recollect.models import GCN
    from recollect.train._team import team

    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.set_num_threads(task["threads"])
    data, ptr = to_adj_t(make_graph(task["nodes"])), bounds(task["nodes"], task["part"])
    data.adj_t = normalize(data.adj_t)
    data.node_order = torch.arange(task["nodes"])  # parts are consecutive nodes
    shares = Shares(ptr)
    torch.manual_seed(0)
    options = HistoryOptions(process_group=shares if world > 1 else None)
    model = GCN(task["nodes"], FEATURES, task["channels"], CLASSES, task["layers"], histories=options)
    optimizer = torch.optim.Adam(model.parameters())
    loader = SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(shuffle=False))
    start, stop = shares.nodes
    group = team()
    ahead = History.begin_pull

    def at_once(history: History, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
        found = ahead(history, rows)()
        return lambda: found

    def epoch() -> int:
        wanted = 0
        for batch in loader:
            optimizer.zero_grad()
            out = model(batch.data.x, batch.data.adj_t, *batch[1:])
            train = batch.data.train_mask[: batch.batch_size]
            F.cross_entropy(out[train], batch.data.y[: batch.batch_size][train]).backward()
            if group is not None:
                group.add_gradients(model.parameters())
            optimizer.step()
            wanted += int(((batch.n_id < start) | (batch.n_id >= stop)).sum())
        return wanted

    wanted = epoch()  # warms up; and counts what this rank wants of others
    seconds: dict[str, list[float]] = {"ahead": [], "at once": []}
    sent = shares.wire_bytes
    for _ in range(task["repeats"]):
        for name, pull in (("ahead", ahead), ("at once", at_once)):
            History.begin_pull = pull  # type: ignore[method-assign,assignment]
            distributed.barrier()
            begin = time.perf_counter()
            epoch()
            distributed.barrier()
            seconds[name].append(time.perf_counter() - begin)
    epochs = 2 * task["repeats"]
    found: list[Any] = [None] * world
    distributed.all_gather_object(found, ((shares.wire_bytes - sent) / epochs, wanted, stop - start))
    if rank == 0:
        result = {
            "ranks": world,
            "steps": len(loader),
            "seconds": {name: median(times) for name, times in seconds.items()},
            "wire_bytes": sum(row[0] for row in found),
            "predicted_bytes": sum(row[1] for row in found) * (task["layers"] - 1) * task["channels"] * 4,
            "nodes_of_ranks": [row[2] for row in found],
        }
        Path(task["file"]).write_text(json.dumps(result))
    distributed.destroy_process_group()


def measured(options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    names = ("nodes", "layers", "channels", "part", "repeats", "threads")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        task = {**{name: getattr(options, name) for name in names}, "file": str(file)}
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *run, "-m", "bench.distributed", "--child", json.dumps(task)]
        threads = str(options.threads)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"})
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure; print, write and return the report."""
    options = _parse(arguments)
    if options.child:
        child(json.loads(options.child))
        return {}
    rows = [measured(options, ranks) for ranks in options.ranks]
    body = [
        [
            str(row["ranks"]),
            str(row["steps"]),
            show(row["seconds"]["ahead"], ".2f"),
            show(row["seconds"]["at once"], ".2f"),
            show(row["wire_bytes"] / 2**20, ".2f"),
            show(row["predicted_bytes"] / 2**20, ".2f"),
        ]
        for row in rows
    ]
    head = ["processes", "steps", "epoch, s", "without overlap, s", "on the wire, MiB", "predicted, MiB"]
    print(table(head, body), flush=True)
    targets = [
        Target(f"bytes on the wire of {row['ranks']} / predicted", row["wire_bytes"] / row["predicted_bytes"], 1.0)
        for row in rows
        if row["predicted_bytes"]
    ]
    names = ("nodes", "layers", "channels", "part", "ranks", "repeats", "threads")
    report = header(CPU, {name: getattr(options, name) for name in names})
    file = results_file("distributed" + ("-quick" if options.quick else ""), CPU, options.output)
    return {"distributed": finish(report | {"runs": rows}, targets, file)}


if __name__ == "__main__":
    main()
