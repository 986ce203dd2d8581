"""What corrected histories do to gradients: their bias against the whole graph's, and the time of a step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench._harness import alternating, median
from bench._report import Target, ratio, show, table
from recollect.autoscale import (
    Combination,
    EvalSubgraphLoader,
    SubgraphLoader,
    normalize,
    partition,
    permute,
    to_adj_t,
)
from recollect.data import load
from recollect.models import GCN

Row = dict[str, Any]


@dataclass(frozen=True)
class Course:
    """A GCN in training on mini-batches of parts by METIS, with Adam and a learning rate that falls to a fiftieth.

    Attributes:
        graph: ``"cora"``, ``"pcg"``, or ``"sbm"`` of so many nodes, 10 blocks and degree 10.
        layers: L.
        epochs: of training.
        nodes: of ``"sbm"``.
        channels: of the layers.
        dropout: 0 where gradients are compared, which it makes random.
        parts: of the graph.
        parts_in_batch: so many of them are a mini-batch.
    """

    graph: str
    layers: int
    epochs: int
    nodes: int = 20_000
    channels: int = 64
    dropout: float = 0.0
    parts: int = 40
    parts_in_batch: int = 10
    rate: float = 0.01
    decay: float = 5e-4

    def __str__(self) -> str:
        size = f" of {self.nodes:,} nodes" if self.graph == "sbm" else ""
        drop = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.graph}{size}, {self.layers} layers x {self.channels}{drop}"

    def permuted(self, root: Path | None) -> tuple[Any, Tensor]:
        """The graph in the order of its parts, and where these begin."""
        if self.graph == "pcg":
            data = pcg(root or Path())
        elif self.graph == "sbm":
            data = load("sbm", num_nodes=self.nodes).data
        else:
            data = load(self.graph, root).data
        data = to_adj_t(data)
        data.adj_t = normalize(data.adj_t)
        perm, ptr = partition(data.adj_t, self.parts, "metis", log=False)[:2]
        return permute(data, perm, log=False), ptr

    def model(self, data: Any, seed: int, **options: Any) -> GCN:
        torch.manual_seed(seed)
        classes = data.y.size(1) if data.y.dim() == 2 else int(data.y.max()) + 1
        return GCN(
            data.num_nodes, data.num_features, self.channels, classes, self.layers, dropout=self.dropout, **options
        )

    def steps(self, model: GCN) -> tuple[Callable[[], None], Callable[[], None]]:
        """What comes before a backward pass, and after it."""
        optimizer = torch.optim.Adam(model.parameters(), lr=self.rate, weight_decay=self.decay)
        total = self.epochs * self.parts // self.parts_in_batch
        falling = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.02, (1 + math.cos(math.pi * min(step / total, 1))) / 2)
        )

        def after() -> None:
            optimizer.step()
            falling.step()

        return optimizer.zero_grad, after


def pcg(root: Path) -> Any:
    """The protein graph of "Multi-label Node Classification On Graph-Structured Data", from its CSV files."""
    from torch_geometric.data import Data

    def numbers(name: str) -> Tensor:
        lines = (root / "multilabel/pcg" / name).read_text().split()
        return torch.tensor([[float(word) for word in line.split(",")] for line in lines])

    split = (root / "multilabel/pcg/split.csv").read_text().split()
    features = numbers("features.csv")
    masks = {f"{part}_mask": torch.tensor([word == part for word in split]) for part in ("train", "val", "test")}
    features = (features - features.mean(0)) / features.std(0)
    return Data(x=features, edge_index=numbers("edges.csv").long().t(), y=numbers("labels.csv"), **masks)


def loss_of(out: Tensor, data: Any, total: int) -> Tensor:
    """The training nodes' losses, divided by the number of all training nodes: a sum over nodes times a constant."""
    mask = data.train_mask[: out.size(0)]
    out, y = out[mask], data.y[: mask.size(0)][mask]
    if y.dim() == 2:
        total, loss = total * y.size(1), F.binary_cross_entropy_with_logits(out, y, reduction="sum")
    else:
        loss = F.cross_entropy(out, y, reduction="sum")
    return loss / total


def run(model: GCN, batch: Any, compensate: bool) -> Tensor:
    outward = {"outward": batch.data.outward} if compensate else {}
    out: Tensor = model(batch.data.x, batch.data.adj_t, *batch[1:], **outward)
    return out


def edges_for(model: GCN) -> Any:
    """Which edges to nodes outside the loader brings."""
    return "induced" if model.combine else model.compensate


def train(course: Course, data: Any, ptr: Tensor, seed: int = 0, **options: Any) -> Iterator[tuple[int, GCN]]:
    """Train with histories, and give the model before each epoch and after the last."""
    model = course.model(data, seed, **options)
    loader = SubgraphLoader(
        data, ptr, course.parts_in_batch, log=False, shuffle=True, outward=edges_for(model),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    total = int(data.train_mask.sum())
    before, after = course.steps(model)
    model(loader=EvalSubgraphLoader(data, ptr, course.parts_in_batch, log=False))
    for epoch in range(course.epochs):
        yield epoch, model
        model.train()
        for batch in loader:
            before()
            loss_of(run(model, batch, model.compensate), batch.data, total).backward()
            after()
    yield course.epochs, model


def bias(model: GCN, data: Any, batches: Sequence[Any], compensate: bool) -> float:
    """Relative error of the sum of the mini-batches' gradients, each from the histories as they are now."""
    total = int(data.train_mask.sum())
    whole = copy.deepcopy(model).eval()
    # In evaluation mode the whole graph fills the histories, here those of a copy.
    loss_of(whole(data.x, data.adj_t), data, total).backward()
    sums: list[Any] = [0.0] * len(list(model.parameters()))
    for batch in batches:
        found = copy.deepcopy(model).eval()
        found.zero_grad()
        loss_of(run(found, batch, compensate), batch.data, total).backward()
        sums = [value + p.grad for value, p in zip(sums, found.parameters(), strict=True)]
    expected = [p.grad for p in whole.parameters() if p.grad is not None]
    wrong = sum(float((a - b).square().sum()) for a, b in zip(sums, expected, strict=True))
    return math.sqrt(wrong / sum(float(b.square().sum()) for b in expected))


COLUMNS = {
    "plain": "plain", "corrected_off": "corrected training, left out", "corrected": "corrected", "combined": "combined"
}  # fmt: skip


def measure_bias(course: Course, root: Path | None, epochs: Sequence[int]) -> Row:
    """Bias at some epochs: of plain histories in their own training; in corrected training without and with; combined.

    Combined is what corrected training with ``combine=Combination()`` has.
    """
    data, ptr = course.permuted(root)
    row: Row = {"course": asdict(course), "epochs": list(epochs), **{name: [] for name in COLUMNS}}
    batches = list(SubgraphLoader(data, ptr, course.parts_in_batch, log=False, outward=True))
    for epoch, model in train(course, data, ptr):
        if epoch in epochs:
            row["plain"].append(bias(model, data, batches, False))
    for epoch, model in train(course, data, ptr, compensate=True):
        if epoch in epochs:
            row["corrected_off"].append(bias(model, data, batches, False))
            row["corrected"].append(bias(model, data, batches, True))
    batches = list(SubgraphLoader(data, ptr, course.parts_in_batch, log=False, outward="induced"))
    for epoch, model in train(course, data, ptr, compensate=True, combine=Combination()):
        if epoch in epochs:
            row["combined"].append(bias(model, data, batches, True))
    return row


def measure_rates(course: Course, root: Path | None, warm: int, rates: Sequence[float]) -> list[Row]:
    """Bias after some epochs of corrected training, and nine more at each of some constant learning rates.

    Returns:
        For each rate the means after the fifth, seventh and ninth of these epochs: `off`, without the correction, and
        `on`; and `ratio`, one over the other.
    """
    data, ptr = course.permuted(root)
    total = int(data.train_mask.sum())
    batches = list(SubgraphLoader(data, ptr, course.parts_in_batch, log=False, outward=True))
    warmed = next(model for epoch, model in train(course, data, ptr, compensate=True) if epoch == warm)
    rows = []
    for rate in rates:
        model = copy.deepcopy(warmed)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=course.decay)
        loader = SubgraphLoader(
            data, ptr, course.parts_in_batch, log=False, shuffle=True, outward=True,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        found = []
        for epoch in range(1, 10):
            model.train()
            for batch in loader:
                optimizer.zero_grad()
                loss_of(run(model, batch, True), batch.data, total).backward()
                optimizer.step()
            if epoch in (5, 7, 9):
                found.append([bias(model, data, batches, on) for on in (False, True)])
        off, on = (sum(values) / len(found) for values in zip(*found, strict=True))
        steps = course.parts // course.parts_in_batch
        rows.append({"course": asdict(course), "steps": steps, "rate": rate, "off": off, "on": on, "ratio": off / on})
    return rows


def rates_table(rows: Sequence[Row]) -> str:
    body = [
        [
            row["course"]["graph"], str(row["steps"]), f"{row['rate']:g}",
            *(show(row[name], ".3f") for name in ("off", "on")), show(row["ratio"], ".1f"),
        ]
        for row in rows
    ]  # fmt: skip
    return table(["graph", "steps in an epoch", "learning rate", "left out", "corrected", "ratio"], body)


def measure_step(course: Course, root: Path | None, repeats: int, device: torch.device) -> Row:
    """Time an epoch of mini-batches that are cut already, with plain and with corrected histories in turns.

    Beside the time on the clock goes that which the process had the CPU, of which other work on the machine takes less.
    """
    data, ptr = course.permuted(root)
    total = int(data.train_mask.sum())
    cpu: dict[bool, list[float]] = {False: [], True: []}

    def system(compensate: bool) -> Callable[[], None]:
        model = course.model(data, 0, compensate=compensate)
        before, after = course.steps(model)
        batches = list(SubgraphLoader(data, ptr, course.parts_in_batch, log=False, outward=compensate))

        def epoch() -> None:
            start = time.process_time()
            for batch in batches:
                before()
                loss_of(run(model, batch, compensate), batch.data, total).backward()
                after()
            cpu[compensate].append(time.process_time() - start)

        epoch()
        return epoch

    times = alternating({"plain": system(False), "corrected": system(True)}, repeats, device)
    steps = course.parts // course.parts_in_batch
    found = {name: (median(values) or 0.0) / steps for name, values in times.items()}
    own = {name: (median(cpu[name == "corrected"][1:]) or 0.0) / steps for name in times}
    crossing = SubgraphLoader(data, ptr, course.parts_in_batch, log=False, outward=True)
    edges = [(batch.data.adj_t.values().numel(), batch.data.outward.value.numel()) for batch in crossing]
    return {
        "course": asdict(course),
        "seconds": found,
        "ratio": ratio(found["corrected"], found["plain"]),
        "cpu_seconds": own,
        "cpu_ratio": ratio(own["corrected"], own["plain"]),
        "edges": sum(inside for inside, _ in edges),
        "outward_edges": sum(outside for _, outside in edges),
    }


def bias_table(course: Course, row: Row) -> str:
    body = [[str(epoch), *(show(row[key][k], ".3f") for key in COLUMNS)] for k, epoch in enumerate(row["epochs"])]
    return f"{course}\n" + table(["epoch", *COLUMNS.values()], body)


def step_table(courses: Sequence[Course], rows: Sequence[Row]) -> str:
    body = [
        [
            str(course), *(show(row["seconds"][name], ".1f", 1e-3) for name in ("plain", "corrected")),
            show(row["ratio"], ".2f"), show(row["cpu_ratio"], ".2f"), show(row["outward_edges"] / row["edges"], ".2f"),
        ]
        for course, row in zip(courses, rows, strict=True)
    ]  # fmt: skip
    return table(["step, ms", "plain", "corrected", "ratio", "ratio of CPU time", "edges outward / inward"], body)


def corrected_targets(biases: Sequence[Row], steps: Sequence[Row]) -> list[Target]:
    """Hold both against the numbers to reach."""
    found = []
    for row in biases:
        name = f"{row['course']['graph']}, {row['course']['layers']} layers"
        if row["course"]["layers"] == 4:
            value = ratio(row["corrected"][-1], row["plain"][-1])
            found.append(Target(f"{name}: bias at the end, corrected / plain", value, 0.1))
        worst = max(a / b for a, b in zip(row["corrected"], row["corrected_off"], strict=True) if b)
        found.append(Target(f"{name}: bias with correction / without, same histories, worst epoch", worst, 1.0))
    for row in steps:
        course = row["course"]
        drop = f", dropout {course['dropout']}" if course["dropout"] else ""
        name = f"{course['graph']}, {course['layers']} layers x {course['channels']}{drop}"
        found.append(Target(f"{name}: step, corrected / plain, CPU time", row["cpu_ratio"], 1.3))
    return found
