"""How much of a history in a file is resident memory, in a process of its own.

python -m bench._graph_resident                    # print a small and a large file
python -m bench._graph_resident --nodes 1000000    # what that runs for each: one of them, as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench._harness import process_bytes
from bench._report import MIB, Target, ratio, show, table
from recollect.autoscale import History
from recollect.memory import map_large_blocks

Row = dict[str, Any]


def measure_here(nodes: int, channels: int, batch: int, halo: int, rounds: int = 20) -> Row:
    """Push and pull random mini-batches with a history in a file; what this process holds more than at the start."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, generator=generator)

    def go(history: History) -> None:
        start = int(torch.randint(nodes - batch + 1, (), generator=generator))
        history.push(x, offset=[start], count=[batch])
        history.pull(torch.randint(nodes, (halo,), generator=generator).sort().values)

    with tempfile.TemporaryDirectory() as name:
        go(History(nodes, channels, path=Path(name) / "first"))  # what torch and Python set up at their first use
        history = History(nodes, channels, path=Path(name) / "history")
        for start in range(0, nodes - batch + 1, batch):
            history.push(x, offset=[start], count=[batch])
        before = process_bytes("VmRSS")
        if before is not None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(rounds):
            go(history)
        after, peak = process_bytes("VmRSS"), process_bytes("VmHWM")
        size = os.stat(Path(name) / "history").st_size
        del history
    known = None if before is None or after is None or peak is None else (after - before, peak - before)
    return {
        "nodes": nodes,
        "file_bytes": size,
        "resident_bytes": known and known[0],
        "resident_peak_bytes": known and known[1],
    }


def measure_resident(
    sizes: Sequence[int] = (20_000, 1_000_000), *, channels: int = 256, batch: int = 2000, halo: int = 10_000
) -> list[Row]:
    """Run `measure_here` for each number of nodes, in a process of its own.

    Raises:
        RuntimeError: one failed; what it wrote is in the message.
    """
    rows = []
    for nodes in sizes:
        command = [sys.executable, "-m", "bench._graph_resident", "--nodes", str(nodes)]
        command += ["--channels", str(channels), "--batch", str(batch), "--halo", str(halo)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} failed with exit code {done.returncode}:\n{done.stderr}")
        rows.append(json.loads(done.stdout))
    return rows


def resident_table(rows: Sequence[Row]) -> str:
    """MiB of each size of file."""
    keys = ("file_bytes", "resident_peak_bytes", "resident_bytes")
    body = [[f"{row['nodes']:,}", *(show(row[key], ".1f", MIB) for key in keys)] for row in rows]
    return table(["nodes", "file, MiB", "resident peak, MiB", "resident after, MiB"], body)


def resident_targets(rows: Sequence[Row]) -> list[Target]:
    """The largest graph against the smallest."""
    first, last = rows[0], rows[-1]
    return [
        Target(
            f"resident peak of pushes and pulls with a file, N={last['nodes']:,} / N={first['nodes']:,}",
            ratio(last["resident_peak_bytes"], first["resident_peak_bytes"]),
            1.1,
            why_not_measured="not known on this system",
        )
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2000)
    parser.add_argument("--halo", type=int, default=10_000)
    options = parser.parse_args(arguments)
    sizes = {"channels": options.channels, "batch": options.batch, "halo": options.halo}
    if options.nodes is not None:
        map_large_blocks()  # or the resident peak is that of glibc's heap
        print(json.dumps(measure_here(options.nodes, **sizes)))
        return
    rows = measure_resident(**sizes)
    print(f"{resident_table(rows)}\n\n" + "\n".join(target.line() for target in resident_targets(rows)))


if __name__ == "__main__":
    main()
