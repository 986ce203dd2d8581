"""Depth, graph and objectives together: peak and time of a step against L layers, N nodes and m objectives.

    python -m bench.axes                    # L to 256, N to 1,000,000, m to 112: long, and 10 GB of files
    python -m bench.axes --quick            # tiny sizes: seconds
    python -m bench.axes --accuracies DATA  # real graphs instead: folders pcg and blogcatalog.npz, or RECOLLECT_DATA
    python -m bench.axes --seconds 60       # leave out steps that would take longer
    python -m bench.axes --systems plain    # one after the other: a file .jsonl beside the JSON keeps what is measured
    python -m bench.axes --kept             # of which this makes the report; all else is "not run"

The network is a RevGNN with SAGE convolutions, the graph blocks of 500 nodes with 10 edges a node, of which 1 in 100
leads out of its block. All three: reversible layers, mini-batches with histories (int8, in files), UPGrad by the
engine's Gramian, the head and the losses of 8 labels at a time. Depth alone: reversible layers on the whole graph.
Graph alone: mini-batches with histories, every activation kept. Objectives alone: the engine, on the whole graph with
every activation kept. Plain has none of them. Where there is no engine the Jacobian is explicit, a backward pass for
each of its rows.

Peaks are of tensors of a step, above parameters, gradients, the graph and the histories. A system's peak at other sizes
is estimated from its smallest one: activations in proportion to the layers (where they are kept) and to the nodes
(where there is no mini-batch), and the Jacobian's 4 m P bytes. A step that needs more than --memory by this estimate is
not run ("does not fit"), nor one that would take longer than --seconds, in proportion to layers, nodes and objectives.
JSON and a figure go into bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import _axes_accuracy as real
from bench._axes_figure import draw
from bench._harness import peak_bytes, settings
from bench._report import Target, finish, header, results_file, show, table
from bench.outofcore import FEATURES, make_graph
from recollect import checkpoint
from recollect.aggregation import UPGradWeighting
from recollect.autogram import Engine
from recollect.autoscale import SubgraphLoader, to_adj_t
from recollect.models import RevGNN

CPU = torch.device("cpu")
PARTS_OF = 500  # nodes
LABELS = 8  # whose logits are there at once, where all three are together
AGAIN = 5.0  # seconds below which a step is taken twice: the first also looks at the losses' graph
Row = dict[str, Any]


@dataclass(frozen=True)
class System:
    """Which of the three a system has."""

    name: str
    depth: bool
    graph: bool
    objectives: bool


SYSTEMS = (
    System("all three", True, True, True),
    System("depth alone", True, False, False),
    System("graph alone", False, True, False),
    System("objectives alone", False, False, True),
    System("plain", False, False, False),
)


@dataclass(frozen=True)
class Size:
    """L, N and m."""

    layers: int
    nodes: int
    objectives: int


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--nodes", type=int, nargs="+", default=[20_000, 100_000, 1_000_000])
    parser.add_argument("--objectives", type=int, nargs="+", default=[1, 16, 112])
    parser.add_argument("--systems", nargs="+", default=[system.name for system in SYSTEMS])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1000, help="nodes of a mini-batch")
    parser.add_argument("--row-bytes", type=int, default=2**28, help="of the engine")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that a step may take by the estimate")
    parser.add_argument("--seconds", type=float, default=600.0, help="that a step may take by the estimate")
    parser.add_argument("--accuracies", metavar="DATA", nargs="?", const=os.environ.get("RECOLLECT_DATA") or False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kept", action="store_true", help="measure nothing: report what the .jsonl has")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder of the files; default: bench/results")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(layers=[2, 4], nodes=[1000, 2000], objectives=[1, 3], channels=8, batch=500)
    options = parser.parse_args(arguments)
    if options.accuracies is False:
        parser.error("--accuracies needs a folder: --accuracies DATA, or set the environment variable RECOLLECT_DATA")
    return options


def explicit(losses: Tensor, parameters: Sequence[Tensor]) -> None:
    """UPGrad's gradient from the Jacobian itself, as it is done without an engine."""
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    update = UPGradWeighting()(jacobian @ jacobian.T) @ jacobian
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, update.split(sizes), strict=True):
        assert parameter.grad is not None
        parameter.grad.add_(part.view_as(parameter))


class Trunk(RevGNN):
    """A RevGNN without its head, whose logits come with the losses, a block of objectives at a time."""

    def classify(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.norm(x).relu()
        return out


def losses_in_blocks(head: torch.nn.Linear, h: Tensor, target: Tensor, block: int) -> Tensor:
    """The loss of each label [m], from a head's input; logits of a block of labels are computed again in backward."""

    def losses(h: Tensor, start: int) -> Tensor:
        labels = slice(start, start + block)
        return real.label_losses(F.linear(h, head.weight[labels], head.bias[labels]), target[:, labels])

    return torch.cat([checkpoint(losses, h, start) for start in range(0, target.size(1), block)])


def step_of(
    system: System, size: Size, data: Any, options: argparse.Namespace, folder: Path
) -> tuple[RevGNN, Callable[[], None], Callable[[], None]]:
    """Return a network, what takes the gradients of a step, and an ordinary step, after which all is looked at."""
    torch.manual_seed(0)
    histories: dict[str, Any] = {}
    if system.graph:
        histories = {"num_nodes": size.nodes, "history_dtype": torch.int8, "history_path": folder}
    shape = (FEATURES, options.channels, size.objectives, size.layers)
    in_blocks = system.depth and system.graph and system.objectives
    kind = Trunk if in_blocks else RevGNN
    model = kind(*shape, disable=not system.depth, task="multilabel", **histories)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    engine, weighting = Engine(model, row_bytes=options.row_bytes), UPGradWeighting()
    if system.graph:
        ptr = torch.tensor([*range(0, size.nodes, PARTS_OF), size.nodes])
        batch = next(iter(SubgraphLoader(data, ptr, options.batch // PARTS_OF, log=False)))
        inputs, data = (batch.data.x, batch.data.adj_t, *batch[1:]), batch.data
    else:
        inputs = (data.x, data.edge_index)

    target = data.y[: options.batch if system.graph else size.nodes].float()

    def losses_of() -> Tensor:
        out = model(*inputs)
        return losses_in_blocks(model.head, out, target, LABELS) if in_blocks else real.label_losses(out, target)

    def step() -> None:
        losses = losses_of()
        if size.objectives == 1:
            losses.sum().backward()
        elif system.objectives:
            engine.backward(losses, weighting)
        else:
            explicit(losses, parameters)

    return model, step, lambda: losses_of().sum().backward()


def estimate(system: System, size: Size, first: Row, number: int) -> tuple[float, float]:
    """Return bytes and seconds of a step from those of the smallest one; see the top.

    Args:
        system: which.
        size: of the step.
        first: the row of the smallest size.
        number: parameters P.
    """
    layers = size.layers / first["layers"]
    nodes = 1.0 if system.graph else size.nodes / first["nodes"]
    kept = first["peak_bytes"] * nodes * (1.0 if system.depth else layers)
    rows = 4 * size.objectives * number if size.objectives > 1 else 0
    return kept + rows, first["seconds"] * layers * nodes * size.objectives


def expected(system: System, size: Size, options: argparse.Namespace, first: Row | None) -> Row:
    """Return what is known of a step before it is taken, with estimates if the smallest one was measured."""
    labels = size.objectives
    number = sum(p.numel() for p in RevGNN(FEATURES, options.channels, labels, size.layers).parameters())
    row: Row = {"system": system.name, **asdict(size), "parameters": number, "peak_bytes": None, "seconds": None}
    row["row_bytes"] = min(options.row_bytes, 4 * labels * number) if labels > 1 and system.objectives else 0
    if first is not None and first["peak_bytes"] is not None:
        row |= dict(zip(("estimated_bytes", "estimated_seconds"), estimate(system, size, first, number), strict=True))
    return row


def _too_much(row: Row, options: argparse.Namespace) -> str | None:
    if row.get("estimated_bytes", 0) > options.memory * 2**30:
        return "does not fit"
    seconds = row.get("estimated_seconds", 0)
    return f"not run: about {seconds:,.0f} s" if seconds > options.seconds else None


def measure(system: System, size: Size, data: Any, options: argparse.Namespace, first: Row | None) -> Row:
    """Measure a step, or say why not.

    Returns:
        ``peak_bytes`` and ``seconds`` of the processor, or None; ``estimated_bytes`` and ``why`` there is no number;
        ``row_bytes``: what the engine may hold of the objectives' rows, which is part of the peak.
    """
    row = expected(system, size, options, first)
    if (why := _too_much(row, options)) is not None:
        return row | {"why": why}
    with tempfile.TemporaryDirectory() as folder:
        model, step, first_step = step_of(system, size, data, options, Path(folder))
        first_step()
        for _ in range(2):
            start = time.process_time()
            row["peak_bytes"] = peak_bytes(step, CPU)
            row["seconds"] = time.process_time() - start
            if row["seconds"] > AGAIN:
                break
        row["history_bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        del model, step, first_step
    return row


def rows_of(options: argparse.Namespace, kept: Path) -> Iterator[Row]:
    """Measure all sizes, those of a graph together; a file keeps the rows that it has, and gets the others."""
    known = {_key(row): row for row in map(json.loads, kept.read_text().splitlines() if kept.exists() else ())}
    least = (min(options.layers), min(options.nodes), min(options.objectives))
    for nodes in sorted(options.nodes):
        made: dict[bool, Any] = {}
        for system in SYSTEMS:
            if system.name not in options.systems:
                continue
            for layers in sorted(options.layers):
                for objectives in sorted(options.objectives):
                    size = Size(layers, nodes, objectives)
                    if (key := (system.name, *asdict(size).values())) not in known:
                        first = known.get((system.name, *least))
                        if options.kept:
                            row = expected(system, size, options, first)
                            yield row | {"why": _too_much(row, options) or "not run"}
                            continue
                        made = made or _graphs(nodes, max(options.objectives))
                        data = _first_labels(made[system.graph], objectives)
                        known[key] = measure(system, size, data, options, first)
                        with kept.open("a") as file:
                            file.write(json.dumps(known[key]) + "\n")
                    yield known[key]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("system", "layers", "nodes", "objectives"))


def _graphs(nodes: int, labels: int) -> dict[bool, Any]:
    """Return the graph as a whole, and as mini-batches want it."""
    data = make_graph(nodes)
    data.y = torch.randint(2, (nodes, labels), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    data.node_order = torch.arange(nodes)  # as they lie, blocks are parts
    return {False: data, True: to_adj_t(data)}


def _first_labels(data: Any, number: int) -> Any:
    data = data.__copy__()
    data.y = data.y[:, :number]
    return data


def _apart(row: Row) -> float | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] - row["row_bytes"]


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """Hold the largest step with all three against the smallest."""
    ours = [row for row in rows if row["system"] == SYSTEMS[0].name]
    if not ours:
        return []
    smallest, largest = _apart(ours[0]), _apart(ours[-1])
    value = largest / smallest if smallest and largest else None
    last = ours[-1]
    name = f"peak at ({last['layers']}, {last['nodes']:,}, {last['objectives']}) over that of the smallest step"
    return [Target(f"{name}, apart from the row block", value, 1.5, why_not_measured=last.get("why", ""))]


def rows_table(rows: Sequence[Row]) -> str:
    """Lay out the rows; an estimate has a tilde."""
    body = []
    for row in rows:
        peak = show(row["peak_bytes"], ",.1f", 2**20)
        if row["peak_bytes"] is None:
            peak = f"~{show(row.get('estimated_bytes'), ',.0f', 2**20)} ({row['why']})"
        apart = show(_apart(row), ",.1f", 2**20)
        sizes = [f"{row[key]:,}" for key in ("layers", "nodes", "objectives")]
        body.append([row["system"], *sizes, peak, apart, show(row["seconds"], ".2f")])
    return table(["", "layers", "nodes", "objectives", "peak, MiB", "without rows", "s / step"], body)


def run_accuracies(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Train on real graphs."""
    root, runs = Path(options.accuracies), file.with_suffix(".jsonl")
    plan = [("pcg", root / "pcg", ((2, 2),) if options.quick else ((8, 40), (56, 20)))]
    if (root / "blogcatalog.npz").exists():
        plan.append(("blogcatalog", root / "blogcatalog.npz", ((2, 1),) if options.quick else ((8, 5),)))
    rows: list[Row] = real.read_rows(runs)
    for name, path, courses in () if options.kept else plan:
        graph = real.Graph.read(name, path, 16)
        given = [real.Course(layers, epochs) for layers, epochs in courses]
        rows = real.measure_all([graph], given, range(options.seeds), real.WAYS, runs)
    found = real.gathered(rows)
    print(real.accuracy_table(found))
    return {"rows": found, "runs": rows}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run; print, write and return the report."""
    options = _parse(arguments)
    name = "axes-accuracies" if options.accuracies else "axes"
    file = results_file(name + ("-quick" if options.quick else ""), CPU, options.output)
    shown = {key: value for key, value in vars(options).items() if key not in ("output", "accuracies")}
    with settings(options.threads):
        report = header(CPU, shown)
        file.parent.mkdir(parents=True, exist_ok=True)
        if options.accuracies:
            return finish(report | run_accuracies(options, file), [], file)
        rows: list[Row] = []
        for row in rows_of(options, file.with_suffix(".jsonl")):
            rows.append(row)
            print(rows_table([row]).splitlines()[-1], flush=True)
        print(rows_table(rows))
        draw(rows, file.with_suffix(".svg"))
        return finish(report | {"rows": rows}, targets_of(rows), file)


if __name__ == "__main__":
    main()
