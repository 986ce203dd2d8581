"""One training step of a very deep RevGNN on the graph `tolokers`, in a process of its own.

    python -m bench._tolokers ROOT --layers 20

A process of its own because its resident peak is one of the numbers. `bench.depth --tolokers ROOT` starts it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench._harness import process_bytes, seconds, settings
from bench._report import GB, Target
from recollect.data import GraphDataset, load
from recollect.memory import map_large_blocks, peak_memory, tensor_bytes
from recollect.models import RevGNN

LAYERS, CHANNELS = 1001, 80
RAW_FILE = Path("HeterophilousGraphDataset/tolokers/raw/tolokers.npz")


def in_own_process(root: Path, layers: int, device: torch.device, threads: int | None) -> dict[str, Any]:
    """Run this module as a command and return what it prints.

    Raises:
        RuntimeError: it failed; what it wrote is in the message.
    """
    command = [sys.executable, "-m", "bench._tolokers", str(root.absolute()), "--layers", str(layers)]
    command += ["--device", str(device)] + (["--threads", str(threads)] if threads else [])
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the step on tolokers failed with exit code {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def targets(found: dict[str, Any]) -> list[Target]:
    """Hold the step against the memory that it may take."""
    full = (found["layers"], found["channels"]) == (LAYERS, CHANNELS)
    return [
        Target(
            f"{what} of a training step of {LAYERS} x {CHANNELS} on tolokers, GB",
            found[key] / GB if full and found[key] is not None else None,
            2.0,
            strict=True,
            why_not_measured="not known on this system" if full else f"run with {found['layers']} layers",
        )
        for what, key in (("tensors, parameters included,", "tensor_bytes"), ("resident peak", "resident_bytes"))
    ]


def read(root: Path) -> GraphDataset:
    """Read the graph from a temporary copy of its raw file: reading writes beside it."""
    if not (root / RAW_FILE).is_file():
        return load("tolokers", root)  # which says what is missing
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / RAW_FILE).parent.mkdir(parents=True)
        shutil.copyfile(root / RAW_FILE, Path(name) / RAW_FILE)
        return load("tolokers", name)


def measure(dataset: GraphDataset, layers: int, channels: int, device: torch.device) -> dict[str, Any]:
    """Run one step: forward, loss on the training nodes, backward, Adam, from a state without gradients.

    The time is of the same step as the peak; measuring costs it tens of microseconds per operation.
    """
    torch.manual_seed(0)
    data = dataset.data.to(device)
    model = RevGNN(data.num_node_features, channels, dataset.num_classes, layers, 2, "sage", 0.1, task=dataset.task).to(
        device
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []

    def step() -> None:
        logits = model(data.x, data.edge_index)
        loss = model.loss(logits[data.train_mask], data.y[data.train_mask])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    before = tensor_bytes(model, data.to_dict())
    with peak_memory(device) as memory:
        time = seconds(step, device)
    kept = tensor_bytes(model, optimizer, data.to_dict(), gradients=True)
    return {
        "dataset": dataset.name,
        "nodes": data.num_nodes,
        "edges": data.num_edges,
        "layers": layers,
        "channels": channels,
        "blocks": "layer norm, ReLU, dropout 0.1 (one mask for all layers), SAGE; 2 groups; Adam",
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter_bytes": tensor_bytes(model),
        "tensor_bytes": before + memory.peak_bytes,
        "tensor_bytes_after": kept,
        "resident_bytes": process_bytes("VmHWM"),
        "seconds": time,
        "loss": float(losses[0]),
        "drift": model.last_drift,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of raw files")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--channels", type=int, default=CHANNELS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    map_large_blocks()  # or the resident peak is that of glibc's heap
    with settings(options.threads):
        found = measure(read(options.root), options.layers, options.channels, torch.device(options.device))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
