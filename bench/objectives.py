"""Objectives: what the Gramian of many losses costs, and weights from it, side by side with the peers.

    python -m bench.objectives               # MLP, CNN, Transformer, GNN, ResNet, ViT, GPT, LSTM, collections, weights
    python -m bench.objectives --quick       # small sizes; seconds
    python -m bench.objectives --works mlp upgrad --mlp-batches 32 512

Times are medians of repeats in one run, the systems taking turns after a first run that does not count. Peaks are of
tensor bytes beyond the inputs, the parameters and their gradients. Gramians are compared with each other. A JSON file
goes into bench/results, with the reason for every number that is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench._harness import settings
from bench._objectives_certificate import certificate_line, certificate_row
from bench._objectives_collections import collection, collection_row, collection_table, collection_targets
from bench._objectives_measure import Row, measure
from bench._objectives_networks import gpt, lstm, resnet, vit
from bench._objectives_systems import NOTES, SYSTEMS
from bench._objectives_tables import progress, weight_table, work_tables
from bench._objectives_targets import certificate_targets, targets, weight_targets
from bench._objectives_weights import weight_rows
from bench._objectives_works import Work, cnn, gnn, mlp, transformer
from bench._report import finish, header, results_file

WORKS = ("mlp", "cnn", "transformer", "gnn", "resnet", "vit", "gpt", "lstm", "collections", "certificate", "upgrad")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--mlp-batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--mlp-width", type=int, default=1024)
    parser.add_argument("--cnn-batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--cnn-channels", type=int, default=32, help="of the first convolution")
    parser.add_argument("--transformer-batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--transformer-width", type=int, default=256)
    parser.add_argument("--transformer-layers", type=int, default=4)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=5_000)
    parser.add_argument("--edges", type=int, default=50_000)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=112)
    parser.add_argument("--resnet-batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--resnet-channels", type=int, default=32, help="of the first convolution")
    parser.add_argument("--width", type=int, default=192, help="of the ViT and the GPT")
    parser.add_argument("--vit-batch", type=int, default=32)
    parser.add_argument("--vit-layers", type=int, default=6)
    parser.add_argument("--gpt-batch", type=int, default=16)
    parser.add_argument("--gpt-layers", type=int, default=4)
    parser.add_argument("--gpt-positions", type=int, default=128)
    parser.add_argument("--lstm-batch", type=int, default=32)
    parser.add_argument("--lstm-hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64, help="of the LSTM")
    parser.add_argument("--collection-batch", type=int, default=8, help="of networks as in public collections")
    parser.add_argument("--collection-width", type=int, default=192)
    parser.add_argument("--collection-layers", type=int, default=4)
    parser.add_argument("--upgrad-sizes", type=int, nargs="+", default=[64, 112, 256], help="numbers of losses")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--patience", type=float, default=5.0, help="seconds: what takes longer is timed only twice")
    parser.add_argument("--max-gb", type=float, default=6.0, help="skip a system that would need more")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--output", type=Path, help="folder of the JSON file; default: bench/results")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(mlp_batches=[8], mlp_width=32, cnn_batches=[4], cnn_channels=4, repeats=3)
        parser.set_defaults(transformer_batches=[4], transformer_width=16, transformer_layers=2, positions=8)
        parser.set_defaults(resnet_batches=[4], resnet_channels=8, width=16, vit_batch=4, vit_layers=2, gpt_batch=4)
        parser.set_defaults(gpt_layers=2, gpt_positions=8, lstm_batch=4, lstm_hidden=16, steps=8)
        parser.set_defaults(collection_batch=2, collection_width=64, collection_layers=1)
        parser.set_defaults(nodes=60, edges=200, channels=8, layers=3, tasks=6, upgrad_sizes=[8, 16])
    return parser.parse_args(arguments)


def _makers(options: argparse.Namespace, device: torch.device) -> Iterator[Callable[[], Work]]:
    """How to make each work that was asked for."""
    if "mlp" in options.works:
        yield from (partial(mlp, batch, options.mlp_width, device) for batch in options.mlp_batches)
    if "cnn" in options.works:
        yield from (partial(cnn, batch, options.cnn_channels, device) for batch in options.cnn_batches)
    if "transformer" in options.works:
        size = (options.transformer_width, options.transformer_layers, options.positions, device)
        yield from (partial(transformer, batch, *size) for batch in options.transformer_batches)
    if "gnn" in options.works:
        yield partial(gnn, options.nodes, options.edges, options.channels, options.layers, options.tasks, device)
    if "resnet" in options.works:
        yield from (partial(resnet, batch, options.resnet_channels, device) for batch in options.resnet_batches)
    if "vit" in options.works:
        yield partial(vit, options.vit_batch, options.width, options.vit_layers, device)
    if "gpt" in options.works:
        yield partial(gpt, options.gpt_batch, options.width, options.gpt_layers, options.gpt_positions, device)
    if "lstm" in options.works:
        yield partial(lstm, options.lstm_batch, options.lstm_hidden, options.steps, device)


def run_works(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure one work after the other, each on the same random draws in every run."""
    rows: list[Row] = []
    for make in _makers(options, device):
        torch.manual_seed(0)
        row = measure(make(), repeats=options.repeats, patience=options.patience, max_gb=options.max_gb, device=device)
        print(progress(row, SYSTEMS), flush=True)
        rows.append(row)
    if rows:
        print(f"\n{work_tables(rows, SYSTEMS)}", flush=True)
    return rows


def run_collections(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure small networks in the forms of public collections, where they were asked for."""
    if "collections" not in options.works:
        return []
    rows: list[Row] = []
    size = (options.collection_batch, options.collection_width, options.collection_layers, device)
    for make in collection(*size).values():
        torch.manual_seed(0)
        rows.append(collection_row(make(), options.repeats, device))
    print(f"\n{collection_table(rows)}", flush=True)
    return rows


def run_certificates(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure the certificate in `Engine.backward` of the MLP, where it was asked for."""
    if "certificate" not in options.works:
        return []
    rows: list[Row] = []
    for batch in options.mlp_batches:
        torch.manual_seed(0)
        rows.append(certificate_row(mlp(batch, options.mlp_width, device), options.repeats, device))
    print(f"\n{certificate_line(rows)}", flush=True)
    return rows


def run_weights(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure UPGrad's weights, where they were asked for."""
    if "upgrad" not in options.works:
        return []
    rows = weight_rows(options.upgrad_sizes, options.repeats, options.patience, device)
    print(f"\n{weight_table(rows)}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what was asked for; print, write and return the report."""
    options = _parse(arguments)
    device = torch.device(options.device)
    used = {key: value for key, value in vars(options).items() if key not in ("output", "quick")}
    with settings(options.threads):
        report = header(device, used)  # before the work: the load average is then the others', not its own
        report |= {"systems": NOTES, "rows": run_works(options, device)}
        report["collections"] = run_collections(options, device)
        report |= {"certificates": run_certificates(options, device), "weights": run_weights(options, device)}
        found = targets(report["rows"]) + collection_targets(report["collections"])
        found += certificate_targets(report["certificates"]) + weight_targets(report["weights"])
    size = "-quick" if options.quick else ""
    return finish(report, found, results_file("objectives" + size, device, options.output))


if __name__ == "__main__":
    main()
