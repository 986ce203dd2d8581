"""What UPGrad's weights cost from a Gramian that is there, and how good they are: recollect beside torchjd.

The Gramians are of random Jacobians: of half the rank, square (the one that the headline is of), wide and nearly
orthogonal, and with one direction in which all agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._harness import alternating, median, seconds
from bench._measure import reason
from bench._report import ratio
from bench._step import UnavailableError, imported
from recollect.aggregation import UPGradWeighting

REG_EPS = 1e-4  # what torchjd adds to the diagonal; the default here too
HEADLINE = "square"
CALLS = 10  # of recollect's weighting in one timing: a call alone is short beside what a clock sees
MANY = 128  # with more objectives only the headline is measured: torchjd takes seconds for each


def gramian(kind: str, objectives: int, device: torch.device) -> Tensor:
    """Make the Gramian of a random Jacobian, in float32 as an engine gives it."""
    m, generator = objectives, torch.Generator().manual_seed(0)
    columns = {"half the rank": max(m // 2, 1), "square": m, "wide": 20 * m, "common direction": 2 * m}[kind]
    jacobian = torch.randn(m, columns, generator=generator, dtype=torch.float64)
    if kind == "common direction":
        jacobian += 0.3 * torch.randn(columns, generator=generator, dtype=torch.float64)
    return (jacobian @ jacobian.T).float().to(device)


KINDS = ("half the rank", "square", "wide", "common direction")


def weight_rows(sizes: Sequence[int], repeats: int, patience: float, device: torch.device) -> list[dict[str, Any]]:
    """Measure UPGrad's weights for each number of objectives.

    Args:
        sizes: numbers of objectives.
        repeats: timings of each; twice where torchjd's first takes longer than `patience`, in seconds.
        patience: see `repeats`.
        device: of the Gramians.

    Returns:
        One row a size: the headline's `seconds` by system, its `objective_difference` (the sum of the programs'
        values, recollect's over torchjd's, minus one) and recollect's `residual`; the same for each of its `kinds`;
        and `why_not_measured` where torchjd has no number.
    """
    return [_row(m, repeats, patience, device) for m in sizes]


def _row(objectives: int, repeats: int, patience: float, device: torch.device) -> dict[str, Any]:
    names = KINDS if objectives <= MANY else (HEADLINE,)
    kinds = {kind: _measure(gramian(kind, objectives, device), repeats, patience) for kind in names}
    return {"objectives": objectives, **kinds[HEADLINE], "kinds": kinds}


def _measure(matrix: Tensor, repeats: int, patience: float) -> dict[str, Any]:
    weighting = UPGradWeighting(reg_eps=REG_EPS)
    weighting(matrix)
    found: dict[str, Any] = {"residual": weighting.last_residual, "objective_difference": None, "seconds": {}}

    def several() -> None:
        for _ in range(CALLS):
            weighting(matrix)

    functions: dict[str, Callable[[], Any]] = {"recollect": several}
    try:
        peer, values = _peer(matrix)
        first = seconds(lambda: peer(matrix), matrix.device)
        found["objective_difference"] = _value(weighting, matrix) / values() - 1
        functions["torchjd"] = lambda: peer(matrix)
        repeats = repeats if first <= patience else min(repeats, 2)
    except (UnavailableError, RuntimeError, ValueError, ImportError) as error:
        found["why_not_measured"] = reason(error)
    times = alternating(functions, repeats, matrix.device)
    found["seconds"] = {name: median(values) for name, values in times.items()}
    if found["seconds"]["recollect"] is not None:
        found["seconds"]["recollect"] /= CALLS
    found["ratio"] = ratio(found["seconds"].get("torchjd"), found["seconds"]["recollect"])
    return found


def _peer(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[], float]]:
    """Torchjd's weighting, and the sum of the values of the programs that it solved last."""
    aggregation, linalg = imported("torchjd.aggregation"), imported("torchjd.linalg")

    class Remembering(linalg.QuadprogProjector):  # type: ignore[name-defined,misc]
        """Its projector, which keeps what it found."""

        def __call__(self, U: Tensor, G: Tensor) -> Tensor:
            found: Tensor = super().__call__(U, G)
            self.found = found
            return found

    projector = Remembering(norm_eps=REG_EPS, reg_eps=REG_EPS)
    weighting: Callable[[Tensor], Tensor] = aggregation.UPGradWeighting(projector=projector)
    return weighting, lambda: _total(projector.found, matrix)


def _value(weighting: UPGradWeighting, matrix: Tensor) -> float:
    """The sum of the values of all programs that the weighting solves for this Gramian."""
    m = len(matrix)
    rows = torch.eye(m, dtype=torch.float64, device=matrix.device) / m
    return _total(weighting.project(matrix, rows), matrix)


def _total(rows: Tensor, matrix: Tensor) -> float:
    """Sum vᵀ (G / trace(G) + reg_eps) v over rows v."""
    exact, rows = matrix.double(), rows.double()
    exact = exact / exact.trace() + REG_EPS * torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    return float(((rows @ exact) * rows).sum())
