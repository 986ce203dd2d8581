"""What a network is and holds, and how two of its runs differ."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def world_of(model: nn.Module) -> dict[str, Any]:
    """Return what planning must leave as it was."""
    return {
        "names": [name for name, _ in model.named_modules(remove_duplicate=False)],
        "classes": [type(m) for m in model.modules()],
        "attributes": [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [p.grad for p in model.parameters()],
        "random state": [torch.get_rng_state()],
        "random state of others": (random.getstate(), str(np.random.get_state())),  # noqa: NPY002
    }


def differences(found: Any, expected: Any, tolerance: float, name: str = "", floor: float = 0.0) -> list[str]:
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
            return [f"{name}: another tensor, or none"]
        if torch.equal(found, expected):
            return []
        error = float(
            (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(max(floor, 1e-6))
        )
        return [] if error <= tolerance else [f"{name}: relative error {error:.1e}"]
    if isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            return [f"{name}: {len(found)} for {len(expected)}"]
        norms = [float(t.double().norm()) for t in expected if isinstance(t, Tensor) and t.is_floating_point()]
        floor = (0.1 if tolerance > 1e-3 else 1e-3) * max(
            [floor, *norms]
        )  # of what is zero but for rounding, as a bias before BatchNorm has it
        parts = zip(found, expected, strict=True)
        return [t for i, (a, b) in enumerate(parts) for t in differences(a, b, tolerance, f"{name} {i}", floor)]
    if isinstance(expected, dict):
        if list(found) != list(expected):
            return [f"{name}: {list(found)} for {list(expected)}"]
        return [t for key in expected for t in differences(found[key], expected[key], tolerance, f"{name} {key}")]
    return [] if found is expected or found == expected else [f"{name}: {found!r} for {expected!r}"]


def numbers_of(model: nn.Module) -> list[tuple[nn.Module, dict[str, int]]]:
    """Return what modules count in attributes."""
    return [(m, {name: vars(m)[name] for name in ("number", "steps") if name in vars(m)}) for m in model.modules()]


def restore(model: nn.Module, state: dict[str, Tensor], numbers: list[tuple[nn.Module, dict[str, int]]]) -> None:
    model.load_state_dict(state)
    for module, values in numbers:
        vars(module).update(values)
