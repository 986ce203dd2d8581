"""GPU: what can be told on a card alone, in one run of at most eight minutes.

    python -m bench.gpu                       # on the accelerator that torch finds
    python -m bench.gpu --only depth gramians
    python -m bench.gpu --quick               # small sizes: whether everything runs

Parts: forms of operations that differ by device (docs/gpu.md); a deep reversible step beside torch's checkpoint and
torch_geometric; which steps repeat bit for bit; histories on the card, on the host and in files, with pools and
without; Gramians beside torchjd. Times are medians of repeats, the systems taking turns; peaks are the allocator's;
waits of the host are counted by torch's sync debug mode, and on CUDA by the profiler too. A part that would begin after
--minutes is left out. A JSON file goes into bench/results after each part, with the reason for every number that is
missing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench._gpu_parts import PARTS, QUICK, Sizes
from bench._harness import settings
from bench._measure import reason
from bench._report import Target, finish, header, results_file, write_json

NEEDS = (
    "bench.gpu needs a card, and torch {version} finds none here{asked}. It takes CUDA (a build of torch for it, a "
    "driver, and about 8 GB of memory on the card), or another accelerator of torch by --device. What it compares is "
    "measured on CPUs by bench.depth, bench.graph and bench.objectives"
)


def device_of(name: str | None) -> torch.device:
    """The device that is asked for, or the one that torch finds.

    Raises:
        SystemExit: it is the CPU, or not there; the text says what is needed.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    device = found if name is None else torch.device(name)
    if device is None or device.type == "cpu" or found is None or device.type != found.type:
        asked = f" (--device {name} was asked for)" if name is not None else ""
        raise SystemExit(NEEDS.format(version=torch.__version__, asked=asked))
    return device


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run")
    parser.add_argument("--minutes", type=float, default=7.0, help="no part begins after so many")
    parser.add_argument("--repeats", type=int, help="of the timings; default: 15, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--device", help="default: the accelerator that torch finds")
    parser.add_argument("--threads", type=int, help="of the host; default: torch's own choice")
    parser.add_argument("--output", type=Path, help="folder of the JSON file; default: bench/results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts; print, write and return the report."""
    options = _parse(arguments)
    device = device_of(options.device)
    # Read when cuBLAS is first used: torch's deterministic algorithms need it, in the part "bits".
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sizes = QUICK if options.quick else Sizes()
    if options.repeats:
        sizes = Sizes(**{**vars(sizes), "repeats": options.repeats})
    used = {key: value for key, value in vars(options).items() if key not in ("output", "quick", "device")}
    file = results_file("gpu-quick" if options.quick else "gpu", device, options.output)
    targets: list[Target] = []
    start = time.monotonic()
    with settings(options.threads):
        report = header(device, used) | {"parts": {}, "skipped": {}, "part_seconds": {}}
        for name in options.only:
            begun = time.monotonic()
            if begun - start > 60 * options.minutes:
                report["skipped"][name] = f"{options.minutes:g} minutes were over"
                continue
            try:
                report["parts"][name], found = PARTS[name](sizes, device)
                targets += found
            except Exception as error:  # the other parts are measured all the same: time on a card is short
                report["skipped"][name] = reason(error)
                print(f"\n{name} failed: {reason(error)}", flush=True)
            report["part_seconds"][name] = time.monotonic() - begun
            write_json(file, report)
    return finish(report, targets, file)


if __name__ == "__main__":
    main()
