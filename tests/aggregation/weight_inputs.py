"""Jacobians to weigh: one per kind of conflict, one per way to be degenerate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recollect.aggregation import (
    AlignedMTLWeighting,
    CAGradWeighting,
    ConFIGWeighting,
    ConstantWeighting,
    CRMOGMWeighting,
    DualProjWeighting,
    FairGradWeighting,
    GradVacWeighting,
    IMTLGWeighting,
    KrumWeighting,
    MeanWeighting,
    MGDAWeighting,
    MoDoWeighting,
    NashMTLWeighting,
    PCGradWeighting,
    RandomWeighting,
    SDMGradWeighting,
    SumWeighting,
    UPGradWeighting,
    Weighting,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(jacobian: Tensor) -> Tensor:
    return jacobian @ jacobian.T


def wide(m: int, seed: int = 0) -> Tensor:
    """Nearly orthogonal gradients: mild conflict."""
    return normal(m, 20 * m, seed=seed)


def square(m: int, seed: int = 0) -> Tensor:
    return normal(m, m, seed=seed)


def tall(m: int, seed: int = 0) -> Tensor:
    """Fewer parameters than objectives: a Gramian of half the rank, where as many programs as possible are hard."""
    return normal(m, max(m // 2, 1), seed=seed)


def common(m: int, seed: int = 0) -> Tensor:
    """One direction in which all agree."""
    return normal(m, 2 * m, seed=seed) + 0.5 * normal(1, 2 * m, seed=seed + 1)


def camps(m: int, seed: int = 0) -> Tensor:
    """Two camps that pull in opposite directions."""
    return normal(m, 2 * m, seed=seed) + normal(m, 1, seed=seed + 2).sign() * normal(1, 2 * m, seed=seed + 1)


def centred(m: int, seed: int = 0) -> Tensor:
    """Gradients whose mean nearly vanishes: each conflicts with all others together."""
    jacobian = normal(m, 2 * m, seed=seed)
    return jacobian - 0.999 * jacobian.mean(0)


def nearly_singular(m: int, seed: int = 0) -> Tensor:
    u, _, v = torch.linalg.svd(normal(m, m, seed=seed))
    return u @ torch.diag(torch.logspace(0, -7, m, dtype=torch.float64)) @ v


def lengths_apart(m: int, seed: int = 0) -> Tensor:
    return normal(m, 2 * m, seed=seed) * torch.logspace(-3, 3, m, dtype=torch.float64)[:, None]


KINDS: list[Callable[..., Tensor]] = [
    wide, square, tall, common, camps, centred, nearly_singular, lengths_apart,
]  # fmt: skip

DEGENERATE = {
    "one objective": normal(1, 3),
    "one objective, zero": torch.zeros(1, 2, dtype=torch.float64),
    "all zero": torch.zeros(4, 2, dtype=torch.float64),
    "a zero row": torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]], dtype=torch.float64),
    "duplicates": torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64),
    "opposite": torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64),
    "opposite and unequal": torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]], dtype=torch.float64),
    "rank one": torch.tensor([[1.0], [-2.0], [3.0], [0.5]], dtype=torch.float64),
    "no conflict": normal(5, 4).abs(),
    "tiny": normal(5, 4) * 1e-20,
    "huge": normal(5, 4) * 1e20,
    "nothing but rounding": normal(5, 4) * 1e-150,
    "near the end of the range": normal(5, 4) * 1e150,
    "very far apart": normal(5, 4) * torch.logspace(-20, 20, 5, dtype=torch.float64)[:, None],
    "nearly parallel": normal(1, 4) + 1e-9 * normal(5, 4, seed=1),
}


def weightings(m: int) -> dict[str, Weighting]:
    """Make one of each, for m objectives."""
    return {
        "UPGrad": UPGradWeighting(),
        "UPGrad, preference": UPGradWeighting(torch.arange(m, dtype=torch.float64)),
        "DualProj": DualProjWeighting(),
        "MGDA": MGDAWeighting(),
        "PCGrad": PCGradWeighting(torch.Generator().manual_seed(0)),
        "IMTL-G": IMTLGWeighting(),
        "CAGrad": CAGradWeighting(0.5),
        "CAGrad, large c": CAGradWeighting(1.5),
        "Aligned-MTL": AlignedMTLWeighting(),
        "Nash-MTL": NashMTLWeighting(),
        "FairGrad": FairGradWeighting(0.5),
        "FairGrad, large alpha": FairGradWeighting(5.0),
        "ConFIG": ConFIGWeighting(),
        "GradVac": GradVacWeighting(generator=torch.Generator().manual_seed(0)),
        "MoDo": MoDoWeighting(),
        "SDMGrad": SDMGradWeighting(),
        "CR-MOGM": CRMOGMWeighting(UPGradWeighting()),
        "Krum": KrumWeighting(0),
        "mean": MeanWeighting(),
        "sum": SumWeighting(),
        "constant": ConstantWeighting(torch.linspace(-1, 1, m, dtype=torch.float64)),
        "random": RandomWeighting(torch.Generator().manual_seed(0)),
    }
