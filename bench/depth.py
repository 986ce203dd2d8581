"""Depth: what a training step of L grouped reversible layers costs in time and memory, side by side with the peers.

    python -m bench.depth            # L = 4..256 and the targets at L = 16; several minutes
    python -m bench.depth --quick    # a small graph; well under a minute
    python -m bench.depth --long     # 1001 layers too

Every time is the median of alternating repeats in one run; every peak is of tensor bytes beyond the inputs, the
parameters and their gradients. "gradient" compares with plain autograd in the same precision and with the same draws.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench._harness import (
    GB,
    Target,
    alternating,
    default_output,
    machine,
    median,
    peak_bytes,
    ratio,
    show,
    table,
    today,
    versions,
    write_json,
)
from bench._systems import KEEPS_ACTIVATIONS, SYSTEMS, Step, UnavailableError, build, build_blocks


def make_step(name: str, blocks: Sequence[nn.ModuleList], x: torch.Tensor, graph: torch.Tensor) -> Step:
    parameters = [p for stack in blocks for p in stack.parameters()]
    return Step(build(name, blocks, graph), x, parameters)


def relative_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    norm = sum(float(b.double().square().sum()) for b in expected)
    return (error / norm) ** 0.5


def gradient_errors(dtype: torch.dtype, dropout: float, device: torch.device) -> dict[str, float | str]:
    """Compare each system's gradients with plain autograd's at 64 layers of (norm, ReLU, dropout, SAGE)."""
    torch.manual_seed(0)
    graph = torch.randint(200, (2, 1000), device=device)
    x = torch.randn(200, 32, dtype=dtype, device=device, requires_grad=True)
    blocks = [b.to(device, dtype) for b in build_blocks(64, 2, 32, "sage", "layer", dropout)]
    for stack in blocks:
        for block in stack:
            block.dropout = dropout  # each block draws its own mask
    expected = make_step("plain", blocks, x, graph).gradients(seed=1)["gradients"]
    errors: dict[str, float | str] = {}
    for name in SYSTEMS:
        try:
            found = make_step(name, blocks, x, graph).gradients(seed=1)["gradients"]
            errors[name] = relative_error(found, expected)
        except (UnavailableError, RuntimeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"[:160]
    return errors


def measure(depth: int, names: Sequence[str], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time and peak of a step of each system at one depth."""
    torch.manual_seed(0)
    graph = torch.randint(options.nodes, (2, options.edges), device=device)
    x = torch.randn(options.nodes, options.channels, device=device, requires_grad=True)
    blocks = build_blocks(depth, 2, options.channels, "sage", "bare", 0.0)
    for stack in blocks:
        stack.to(device)
    row: dict[str, Any] = {"depth": depth, "skipped": {}, "peak_bytes": {}, "seconds": {}, "drift": {}}
    steps: dict[str, Step] = {}
    # Saved by a SAGE block for backward: the aggregated and the given features, twice a layer, and the sums.
    expected = 4.0 * options.nodes * options.channels * 4 * depth
    for name in names:
        if name in KEEPS_ACTIVATIONS and expected > options.max_plain_gb * GB:
            row["skipped"][name] = f"would keep about {expected / GB:.1f} GB, more than --max-plain-gb"
            continue
        try:
            steps[name] = make_step(name, blocks, x, graph)
            steps[name].zero_gradients()
            steps[name]()
        except (UnavailableError, RuntimeError) as error:
            steps.pop(name, None)
            row["skipped"][name] = f"{type(error).__name__}: {error}"[:160]
            continue
        row["peak_bytes"][name] = peak_bytes(steps[name], device)
        row["drift"][name] = steps[name].system.last_drift()
    times = alternating(dict(steps), options.repeats, device) if depth in options.timed else {}
    row["all_seconds"] = times
    row["seconds"] = {name: median(values) for name, values in times.items()}
    return row


def targets(rows: Sequence[dict[str, Any]], errors: dict[str, dict[str, float | str]]) -> list[Target]:
    """Hold what was measured against the numbers that the project set itself."""
    by_depth = {row["depth"]: row for row in rows}
    seconds = by_depth.get(16, {}).get("seconds", {})
    ours = {depth: row["peak_bytes"].get("recollect") for depth, row in by_depth.items()}
    found = [
        Target(f"step time at L=16, recollect / {peer}", ratio(seconds.get("recollect"), seconds.get(peer)), limit,
               why_not_measured="not timed")
        for peer, limit in (("pyg", 0.70), ("plain", 1.40), ("checkpoint", 1.0))
    ]  # fmt: skip
    deepest = 256 if 256 in ours else max(ours)
    found.append(Target(f"peak at L={deepest} / peak at L=8", ratio(ours[deepest], ours.get(8)), 1.05))
    against = [ratio(row["peak_bytes"].get("recollect"), row["peak_bytes"].get("pyg")) for row in rows]
    known = [value for value in against if value is not None]
    found.append(Target("peak / torch_geometric's, the worst depth", max(known, default=None), 1.0, strict=True))
    for key, limit in (("float64, dropout", 1e-10), ("float32, dropout", 1e-5)):
        value = errors[key]["recollect"]
        found.append(Target(f"gradient error at 64 layers, {key}", value if isinstance(value, float) else None, limit))
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its tables, and write and return its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--timed", type=int, nargs="+", default=[16], help="depths at which steps are timed")
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--edges", type=int, default=200_000)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-plain-gb", type=float, default=6.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small graph and few layers")
    parser.add_argument("--long", action="store_true", help="1001 layers too")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.nodes, options.edges, options.channels = 500, 2000, 32
        options.depths, options.repeats = [4, 8, 16], 3
    if options.long:
        options.depths = [*options.depths, 1001]
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    warnings.simplefilter("ignore")  # the peers' deprecations; drift is a column here
    names = list(SYSTEMS)

    rows = []
    for depth in options.depths:
        rows.append(measure(depth, names, options, device))
        print(f"L={depth}: { ({k: round(v / 2**20, 1) for k, v in rows[-1]['peak_bytes'].items()}) } MiB", flush=True)
    errors = {
        "float64, dropout": gradient_errors(torch.float64, 0.5, device),
        "float32, dropout": gradient_errors(torch.float32, 0.5, device),
        "float32, no dropout": gradient_errors(torch.float32, 0.0, device),
    }
    reached = targets(rows, errors)

    print("\npeak tensor bytes of a step, MiB")
    body = [[str(r["depth"]), *(show(r["peak_bytes"].get(n), ".1f", 2**20) for n in names)] for r in rows]
    print(table(["layers", *names], body))
    print("\nseconds of a step, median")
    body = [[str(r["depth"]), *(show(r["seconds"].get(n), ".3f") for n in names)] for r in rows if r["seconds"]]
    print(table(["layers", *names], body))
    print("\nrelative error of the gradient against plain autograd, 64 layers")
    body = [[k, *(show(e, ".1e") if isinstance(e, float) else "fails" for e in v.values())] for k, v in errors.items()]
    print(table(["", *names], body))
    print("\nnumbers to reach")
    print("\n".join(target.line() for target in reached))

    report = {
        "what": "grouped additive coupling of SAGE layers, 2 groups",
        "date": today(),
        "machine": machine(device),
        "versions": versions("recollect", "torch_geometric", "memcnn"),
        "settings": {k: v for k, v in vars(options).items() if k != "output"},
        "rows": rows,
        "gradient_errors": errors,
        "targets": [target.as_dict() for target in reached],
    }
    write_json(options.output or default_output("depth", device, "-quick" if options.quick else ""), report)
    return report


if __name__ == "__main__":
    main()
