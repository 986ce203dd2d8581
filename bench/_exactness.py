"""How exact the gradients are: each system against plain autograd, in the same precision, with the same draws."""

from __future__ import annotations

import torch

from bench._measure import Work, reason
from bench._step import UnavailableError, relative_error

LAYERS = 64
Errors = dict[str, dict[str, float | str]]
CASES = {
    "float64, dropout": (torch.float64, True),
    "float32, dropout": (torch.float32, True),
    "float64, no dropout": (torch.float64, False),
    "float32, no dropout": (torch.float32, False),
}


def gradient_errors(work: Work, device: torch.device, layers: int = LAYERS, dropout: float = 0.5) -> Errors:
    """Relative errors by case and system; a string says why there is none."""
    return {
        case: _errors(work, layers, device, dtype, dropout if draws else 0.0) for case, (dtype, draws) in CASES.items()
    }


def _errors(
    work: Work, layers: int, device: torch.device, dtype: torch.dtype, dropout: float
) -> dict[str, float | str]:
    makes = work.steps(layers, device, dtype, dropout)
    expected = makes.pop("plain")().result(seed=1).gradients
    errors: dict[str, float | str] = {}
    for name, make in makes.items():
        try:
            errors[name] = relative_error(make().result(seed=1).gradients, expected)
        except (UnavailableError, RuntimeError) as error:
            errors[name] = reason(error)
    return errors
