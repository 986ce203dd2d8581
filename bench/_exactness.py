"""How exact the gradients are: each system against plain autograd, in the same precision, with the same draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench._step import make_step, relative_error
from bench._systems import SYSTEMS, UnavailableError, build_blocks

LAYERS = 64
Errors = dict[str, dict[str, float | str]]


def gradient_errors(
    device: torch.device, layers: int = LAYERS, nodes: int = 200, edges: int = 1000, channels: int = 32
) -> Errors:
    """Relative errors by case and system, of (norm, ReLU, dropout, SAGE) blocks; a string says why there is none."""
    sizes = (layers, nodes, edges, channels)
    return {
        "float64, dropout": _errors(torch.float64, 0.5, sizes, device),
        "float32, dropout": _errors(torch.float32, 0.5, sizes, device),
        "float32, no dropout": _errors(torch.float32, 0.0, sizes, device),
    }


def _errors(dtype: torch.dtype, dropout: float, sizes: Sequence[int], device: torch.device) -> dict[str, float | str]:
    layers, nodes, edges, channels = sizes
    torch.manual_seed(0)
    graph = torch.randint(nodes, (2, edges), device=device)
    x = torch.randn(nodes, channels, dtype=dtype, device=device, requires_grad=True)
    blocks = build_blocks(layers, channels, "layer", dropout=dropout, dtype=dtype, device=device)
    expected = make_step("plain", blocks, x, graph).result(seed=1).gradients
    errors: dict[str, float | str] = {}
    for name in SYSTEMS:
        if name == "plain":
            continue
        try:
            found = make_step(name, blocks, x, graph).result(seed=1).gradients
            errors[name] = relative_error(found, expected)
        except (UnavailableError, RuntimeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"[:160]
    return errors
