"""The parts of `bench.gpu`: forms of operations, deep steps, bits, histories, Gramians."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import _graph_histories as histories
from bench._gpu_measure import FAILURES, Make, Row, compare, comparison, ratios
from bench._graph_works import Work as GraphWork
from bench._measure import reason
from bench._objectives_systems import SYSTEMS as GRAMIANS
from bench._objectives_works import Work, cnn, mlp, transformer
from bench._report import Target
from bench._step import Step, relative_error
from bench._systems import Recollect, Workload, build_blocks
from recollect.frames import RebuildError, settle
from recollect.messages import make_adj_t, propagate, row_pointers
from recollect.messages._kernels import edge_dots
from recollect.reversible import GroupAddRev

Found = tuple[Row, list[Target]]


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        nodes: of the graphs whose whole is trained on; `edges` and `channels` of them.
        depths: numbers of layers.
        graph: what is trained on with histories.
        batch: elements, and losses, of the Gramian's works; `width` of their layers.
        repeats: of the timings.
    """

    nodes: int = 20_000
    edges: int = 200_000
    channels: int = 128
    depths: tuple[int, ...] = (8, 32)
    graph: GraphWork = field(default_factory=lambda: histories.LARGE)
    batch: int = 64
    width: int = 1024
    repeats: int = 15


QUICK = Sizes(60, 240, 8, (2,), GraphWork(300, block=30, layers=3, channels=8, part=30, method="random"), 4, 16, 2)


def run_forms(sizes: Sizes, device: torch.device) -> Found:
    """The forms between which `recollect._devices` chooses, and those that it does not choose."""
    torch.manual_seed(0)
    source, target = torch.randint(sizes.nodes, (2, sizes.edges), device=device)
    x = torch.randn(sizes.nodes, sizes.channels, device=device)
    adj_t, order = make_adj_t(source, target, None, sizes.nodes)
    source, target = source[order], target[order]
    rowptr, col = adj_t.crow_indices(), adj_t.col_indices()
    zeros = torch.sparse_csr_tensor(rowptr, col, torch.zeros_like(adj_t.values()), adj_t.shape, check_invariants=False)
    ends = torch.arange(sizes.nodes + 1, device=device)
    forms: dict[str, dict[str, Callable[[], Any]]] = {
        "product": {
            "csr": lambda: propagate(adj_t, x),
            "gather and index_add": lambda: torch.zeros_like(x).index_add_(0, target, x.index_select(0, source)),
        },
        "scalar products at the edges": {
            "blocks": lambda: edge_dots(x, x, rowptr, col, x.dtype),
            "sampled_addmm": lambda: torch.sparse.sampled_addmm(zeros, x, x.t(), beta=0).values(),
        },
        "row pointers": {
            "index_add": lambda: row_pointers(source, sizes.nodes, torch.int64),
            "bincount": lambda: torch.bincount(source, minlength=sizes.nodes).cumsum(0),
            "sort and search": lambda: torch.searchsorted(source.sort()[0], ends),
        },
    }
    row: Row = {}
    for name, these in forms.items():
        row[name] = compare({form: partial(_same, function) for form, function in these.items()}, sizes.repeats, device)
        print(comparison(f"\n{name}", row[name]), flush=True)
    return row, []


def _same(function: Callable[[], Any]) -> Callable[[], Any]:
    return function


def run_depth(sizes: Sizes, device: torch.device) -> Found:
    """A step of a deep reversible network: recollect, torch's checkpoint, torch_geometric, nothing."""
    rows, targets = [], []
    for csr in (False, True):
        work = Workload(sizes.nodes, sizes.edges, sizes.channels, "layer", csr)
        for depth in sizes.depths:
            row = compare(work.steps(depth, device), sizes.repeats, device)
            row |= {"work": asdict(work), "depth": depth, "difference": _differences(work.steps(depth, device))}
            row["ratios"] = {key: ratios(row, key, "plain") for key in ("seconds", "peak_bytes")}
            print(comparison(f"\n{depth} layers; {work}", row), flush=True)
            rows.append(row)
            name = f"{depth} layers, the peers on {'a CSR adjacency' if csr else 'edges'}"
            for key in ("seconds", "peak_bytes"):
                value, why = ratios(row, key, "pyg").get("recollect"), _why(row, "recollect", "pyg")
                targets.append(Target(f"{key} of a step, recollect / pyg, {name}", value, 1.0, why_not_measured=why))
            ours, plains = row["waits"].get("recollect"), row["waits"].get("plain")
            more = None if ours is None or plains is None else float(ours - plains)
            why = _why(row, "recollect", "plain")
            targets.append(Target(f"waits of a step beyond plain's, {name}", more, 0.0, why_not_measured=why))
    return {"rows": rows}, targets


def _why(row: Row, *names: str) -> str:
    """Why there is no figure of one of these."""
    reasons = [row["skipped"][name] for name in names if name in row["skipped"]]
    return reasons[0] if reasons else "torch has no such figure for this device"


def _differences(steps: dict[str, Callable[[], Step]]) -> dict[str, float | str]:
    """How far the gradients of each system are from plain's."""
    found: dict[str, float | str] = {}
    expected: list[Tensor] | None = None
    for name, make in steps.items():
        try:
            gradients = make().result(seed=1).gradients
        except FAILURES as error:
            found[name] = reason(error)
            continue
        if name == "plain":
            expected = gradients
        elif expected is not None:
            found[name] = relative_error([g.cpu() for g in gradients], [g.cpu() for g in expected])
    return found


def run_bits(sizes: Sizes, device: torch.device) -> Found:
    """Which steps are the same bit for bit when they are repeated, with torch's deterministic algorithms and without.

    `restored`: an exact stream's input comes back. `gradients`: of two equal steps. `certified`: the rebuilt tensors
    are those of the forward, by `certify="exact"`.
    """
    row: Row = {"cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG")}
    before = torch.are_deterministic_algorithms_enabled()
    for name, deterministic in (("default", False), ("deterministic", True)):
        torch.use_deterministic_algorithms(deterministic)
        try:
            row[name] = _bits(sizes, device)
        finally:
            torch.use_deterministic_algorithms(before)
        print(f"\nthe same bits, {name}: {row[name]}", flush=True)
    value = row["deterministic"].get("restored")
    missed = None if not isinstance(value, bool) else float(not value)
    return row, [Target("exact streams that do not come back", missed, 0.0, why_not_measured=str(row["deterministic"]))]


def _bits(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    graph = torch.randint(sizes.nodes, (2, sizes.edges), device=device)
    x = torch.randn(sizes.nodes, sizes.channels, device=device, requires_grad=True)
    stacks = build_blocks(sizes.depths[0], sizes.channels, "layer", dtype=torch.float32, device=device)
    parameters = [p for stack in stacks for p in stack.parameters()]

    def step(certify: Any = True) -> Step:
        layers = [GroupAddRev(stack, exact=True, certify=certify) for stack in stacks]
        return Step(Recollect(layers, graph), x, parameters)

    found: dict[str, Any] = {}
    try:
        one, other = step().result(seed=1), step().result(seed=1)
        found["gradients"] = all(map(torch.equal, one.gradients, other.gradients))
        back, _ = step().system.restored(one.given, one.out)
        rounded = (x.detach() * 2.0**16).round() / 2.0**16
        found["restored"] = back is not None and torch.equal(back, rounded)
    except FAILURES as error:
        found["error"] = reason(error)
    found["certified"] = _certified(step)
    return found


def _certified(step: Callable[[Any], Step]) -> bool | str:
    try:
        step("exact").result(seed=1)
        settle()
    except (RebuildError, *FAILURES) as error:
        return reason(error)
    return True


def run_histories(sizes: Sizes, device: torch.device) -> Found:
    """A step on mini-batches with the histories on the card, and on the host and in files, with pools and without."""
    row = histories.measure_steps(sizes.graph, device, repeats=min(sizes.repeats, 7))
    row["overlap"] = {
        place: row["seconds"][place] / row["seconds"][f"{place}, pool"]
        for place in ("memory", "file")
        if row["seconds"].get(f"{place}, pool")
    }
    print(f"\n{sizes.graph}\n{histories.steps_table(row)}\nthe same losses: {row['same_losses']}", flush=True)
    return row, histories.steps_targets(row) if sizes.graph == histories.LARGE else []


def run_gramians(sizes: Sizes, device: torch.device) -> Found:
    """Forward and the Gramian of all losses, beside torchjd's and an ordinary backward pass."""
    rows, targets = [], []
    for make in (
        partial(mlp, sizes.batch, sizes.width, device),
        partial(cnn, sizes.batch, max(sizes.width // 32, 1), device),
        partial(transformer, sizes.batch, max(sizes.width // 4, 8), 2, 64 if sizes.width > 64 else 4, device),
    ):
        torch.manual_seed(0)
        work = make()
        steps: dict[str, Make] = {name: partial(_gramian, name, work) for name in ("plain", "freed", "told", "torchjd")}
        row = compare(steps, sizes.repeats, device)
        row |= {"kind": work.kind, "size": work.size, "difference": _gramian_difference(work)}
        print(comparison(f"\n{work}", row), flush=True)
        rows.append(row)
        for key in ("seconds", "peak_bytes"):
            value = ratios(row, key, "torchjd").get("freed")
            why = _why(row, "freed", "torchjd")
            targets.append(Target(f"{key}, recollect / torchjd, {work}", value, 1.0, why_not_measured=why))
    return {"rows": rows}, targets


def _gramian(name: str, work: Work) -> Callable[[], Tensor | None]:
    model = copy.deepcopy(work.model)
    after = GRAMIANS[name](model, work.batch_dim)
    return lambda: after(work.losses(model))


def _gramian_difference(work: Work) -> float | str:
    """How far torchjd's Gramian is from recollect's."""
    try:
        ours, theirs = (_gramian(name, work)() for name in ("freed", "torchjd"))
    except FAILURES as error:
        return reason(error)
    assert ours is not None
    assert theirs is not None
    return relative_error([theirs.cpu()], [ours.cpu()])


PARTS: dict[str, Callable[[Sizes, torch.device], Found]] = {
    "forms": run_forms,
    "depth": run_depth,
    "bits": run_bits,
    "histories": run_histories,
    "gramians": run_gramians,
}
