"""What exactness costs: steps and peaks of exact streams beside those that round, and accuracies of both."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench._harness import alternating, median, peak_bytes
from recollect import invertible
from recollect.data import load
from recollect.models import RevGNN
from recollect.reversible import BDIA, Midpoint

CPU = torch.device("cpu")
Step = Callable[[], None]


class _Kept(nn.Module):
    """The ordinary residual network."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def _mlp(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
    )


def _step(net: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    return lambda: net(x).square().mean().backward()


def _couplings(exact: bool, layers: int, rows: int) -> Step:
    torch.manual_seed(0)
    net = invertible.Sequential(*(invertible.AdditiveCoupling(_mlp(64), _mlp(64), exact=exact) for _ in range(layers)))
    return _step(net, torch.randn(rows, 128))


def _midpoint(exact: bool, layers: int, rows: int) -> Step:
    torch.manual_seed(0)
    return _step(Midpoint((_mlp(128) for _ in range(layers)), exact=exact), torch.randn(rows, 128))


def _bdia(exact: bool, layers: int, rows: int) -> Step:
    """Beside the midpoint form that rounds: BDIA is exact or not at all."""
    if not exact:
        return _midpoint(False, layers, rows)
    torch.manual_seed(0)
    return _step(BDIA(_mlp(128) for _ in range(layers)), torch.randn(rows, 128))


def _graph(exact: bool, layers: int, rows: int) -> Step:
    torch.manual_seed(0)
    x, edges = torch.randn(rows, 64), torch.randint(rows, (2, 5 * rows))
    net = RevGNN(64, 128, 5, num_layers=layers, num_groups=2, conv="sage", dropout=0.1, exact=exact)
    return lambda: net(x, edges).square().mean().backward()


COSTS: dict[str, Callable[[bool, int, int], Step]] = {
    "couplings of (norm, Linear, GELU, Linear)": _couplings,
    "RevGNN": _graph,
    "Midpoint": _midpoint,
    "BDIA beside Midpoint": _bdia,
}


def costs(layers: int, rows: int, repeats: int) -> dict[str, Any]:
    """Seconds and peaks of a step, by workload: of the stream that rounds, and of the exact one."""
    found = {}
    for name, make in COSTS.items():
        steps = {"float": make(False, layers, rows), "exact": make(True, layers, rows)}
        for step in steps.values():
            step()
        peaks = {key: peak_bytes(step, CPU) for key, step in steps.items()}
        times = alternating(steps, repeats, CPU)
        medians = {key: median(values) for key, values in times.items()}
        found[name] = {
            "seconds": medians,
            "all_seconds": times,
            "peak_bytes": peaks,
            "step_ratio": medians["exact"] / medians["float"] if repeats else None,  # type: ignore[operator]
            "peak_ratio": peaks["exact"] / peaks["float"],
        }
    return found


# Accuracies.


def _fit(net: nn.Module, forward: Callable[[], Tensor], data: Any, epochs: int, rate: float) -> float:
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, weight_decay=5e-4)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(forward()[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        right = (forward().argmax(1) == data.y)[data.test_mask]
    return 100 * float(right.float().mean())


def _digits(kind: str, seed: int, epochs: int) -> float:
    data = load("digits", seed=seed).data
    torch.manual_seed(seed)
    if kind in ("float", "exact"):
        couplings = [invertible.AdditiveCoupling(_mlp(32), _mlp(32), exact=kind == "exact") for _ in range(8)]
        stack: nn.Module = invertible.Sequential(*couplings)
    else:
        stack = {"residual": _Kept, "BDIA": BDIA, "Midpoint": Midpoint}[kind]([_mlp(64) for _ in range(8)])
    net = nn.Sequential(stack, nn.LayerNorm(64), nn.Linear(64, 10))
    return _fit(net, lambda: net(data.x), data, epochs, 3e-3)


def _cora(root: Path | None, kind: str, seed: int, epochs: int) -> float:
    data = load("cora", root=root).data
    torch.manual_seed(seed)
    net = RevGNN(1433, 64, 7, num_layers=8, conv="gcn", dropout=0.5, exact=kind == "exact")
    return _fit(net, lambda: net(data.x, data.edge_index), data, epochs, 5e-3)


def accuracies(seeds: int, epochs: int, root: Path | None) -> dict[str, Any]:
    """Test accuracy in percent after so many epochs: mean, standard deviation and all, by data and network."""
    runs: dict[str, Callable[[int], float]] = {}
    for kind in ("float", "exact", "residual", "BDIA", "Midpoint"):
        runs[f"digits, {kind}"] = functools.partial(_digits, kind, epochs=epochs)
    for kind in ("float", "exact") if root is not None else ():
        runs[f"cora, {kind}"] = functools.partial(_cora, root, kind, epochs=epochs)
    found = {}
    for name, run in runs.items():
        values = [run(seed) for seed in range(seeds)]
        spread = statistics.stdev(values) if seeds > 1 else 0.0
        found[name] = {"mean": statistics.mean(values), "standard_deviation": spread, "all": values}
        print(f"  {name:<20} {found[name]['mean']:.2f} ({spread:.2f})", flush=True)
    return found
