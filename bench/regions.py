"""Regions: what a checkpoint itself costs around little work, side by side with torch's own.

    python -m bench.regions                  # forward and backward of small regions, microseconds
    python -m bench.regions --quick          # few calls: seconds

A region computes next to nothing here, so what is measured is what surrounds it: conditions, random state, what ran
and what it wrote, and the certificate. Every region is run plain, under torch.utils.checkpoint.checkpoint
(use_reentrant=False), under recollect.checkpoint, and under the latter with certify=False. Recollect's coupling is a
stage of its own, without a checkpoint around it.

Times are medians of repeats in one run, the systems taking turns; each repeat is the mean of some calls. A JSON file
goes into bench/results.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import recollect
from bench._harness import alternating, median, settings
from bench._invertible_systems import PlainCoupling
from bench._report import OTHER_DEVICE, Target, finish, header, ratio, results_file, show, table
from recollect import invertible

Function = Callable[[Tensor], Tensor]
Checkpoint = Callable[[Function, Tensor], Tensor]

SYSTEMS: dict[str, Checkpoint] = {
    "plain": lambda function, x: function(x),
    "checkpoint": functools.partial(torch_checkpoint, use_reentrant=False),
    "recollect": recollect.checkpoint,
    "uncertified": functools.partial(recollect.checkpoint, certify=False),
}

NOTES = {
    "linears": "two 8 x 8 Linears, a batch of 8",
    "norm": "Linear, BatchNorm, Dropout, 8 channels, a batch of 8",
    "transformer": "TransformerEncoderLayer of width 16 with 2 heads, 2 sequences of 4",
    "nested": "four checkpoints, one within the other, each with one 8 x 8 Linear",
    "coupling": "an additive coupling of two 4 x 4 Linears; recollect's keeps its output alone",
}


def _under(wrap: Checkpoint, module: nn.Module) -> Function:
    return lambda x: wrap(module, x)


def _nested(wrap: Checkpoint) -> Function:
    layers = [nn.Linear(8, 8) for _ in range(4)]

    def level(i: int) -> Function:
        within = level(i + 1) if i + 1 < len(layers) else nn.Identity()
        return lambda x: wrap(lambda x: within(layers[i](x)), x)

    return level(0)


def _coupling(name: str, wrap: Checkpoint) -> Function:
    f, g = nn.Linear(4, 4), nn.Linear(4, 4)
    if name in ("recollect", "uncertified"):
        return invertible.AdditiveCoupling(f, g, certify=name == "recollect")
    return _under(wrap, PlainCoupling(f, g))


def build(region: str, name: str, device: torch.device) -> Function:
    """Return a region of `NOTES` as one of `SYSTEMS` runs it; the weights are the same for all of these."""
    wrap = SYSTEMS[name]
    torch.manual_seed(0)
    with device:
        if region == "linears":
            return _under(wrap, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
        if region == "norm":
            return _under(wrap, nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.1)))
        if region == "transformer":
            return _under(wrap, nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
        return _nested(wrap) if region == "nested" else _coupling(name, wrap)


def example(region: str, device: torch.device) -> Tensor:
    """Return what the region is given: a leaf, of which the region gets a copy."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*((2, 4, 16) if region == "transformer" else (8, 8)), generator=generator)
    return x.to(device).requires_grad_()


def steps(region: str, calls: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """How each system goes forward and backward through the region, some times in a row."""

    def repeat(function: Function, x: Tensor) -> None:
        for _ in range(calls):
            function(x * 1).sum().backward()

    return {name: functools.partial(repeat, build(region, name, device), example(region, device)) for name in SYSTEMS}


def measure(region: str, repeats: int, calls: int, device: torch.device) -> dict[str, Any]:
    """Return microseconds of one forward and backward, by system."""
    for step in steps(region, 1, device).values():
        step()
    runs = steps(region, calls, device)
    for run in runs.values():  # what is learned in the first calls is a matter of the first calls
        run()
    all_seconds = alternating(runs, repeats, device)
    all_microseconds = {name: [1e6 * value / calls for value in values] for name, values in all_seconds.items()}
    return {
        "note": NOTES[region],
        "microseconds": {name: median(values) for name, values in all_microseconds.items()},
        "all_microseconds": all_microseconds,
    }


def targets(regions: Mapping[str, Mapping[str, Any]], device: torch.device) -> list[Target]:
    """Hold recollect, with certificate and observation, against torch's checkpoint."""
    found = {name: row["microseconds"] for name, row in regions.items() if device.type == "cpu"}
    return [
        Target(
            f"forward and backward of a small region, {name}, recollect / checkpoint",
            ratio(found.get(name, {}).get("recollect"), found.get(name, {}).get("checkpoint")),
            1.0,
            why_not_measured=OTHER_DEVICE,
        )
        for name in NOTES
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--calls", type=int, default=50, help="in one repeat")
    parser.add_argument("--quick", action="store_true", help="few calls")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="small tensors gain nothing from more")
    parser.add_argument("--output", type=Path, help="folder of the JSON file; default: bench/results")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(repeats=5, calls=5)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every region; print, write and return the report."""
    options = _parse(arguments)
    device = torch.device(options.device)
    used = {key: getattr(options, key) for key in ("repeats", "calls", "device", "threads")}
    with settings(options.threads):
        report = header(device, used)
        regions = {name: measure(name, options.repeats, options.calls, device) for name in NOTES}
    body = [
        [
            name,
            *(show(row["microseconds"][system], ".0f") for system in SYSTEMS),
            show(ratio(row["microseconds"]["recollect"], row["microseconds"]["checkpoint"]), ".2f"),
        ]
        for name, row in regions.items()
    ]
    print(f"\nforward and backward of a small region, microseconds, median; {device}")
    print(table(["", *SYSTEMS, "recollect / checkpoint"], body))
    size = "-quick" if options.quick else ""
    report |= {"regions": regions}
    return finish(report, targets(regions, device), results_file("regions" + size, device, options.output))


if __name__ == "__main__":
    main()
