"""What is compared of two runs of a program: numbers, and everything that modules and plain objects hold."""

from __future__ import annotations

import types
from collections import deque
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def _describe_tensor(t: Tensor) -> tuple[Any, ...]:
    flags = (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.requires_grad, t.grad_fn is None)
    return ("tensor", *flags, t.detach().clone())


def snapshot(value: Any) -> Any:
    """Return plain data for what matters in a Python object."""
    if isinstance(value, Tensor):
        return "not materialised" if is_lazy(value) else _describe_tensor(value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, (list, tuple, deque, set)):
        return [type(value).__name__, *(snapshot(v) for v in value)]
    if isinstance(value, dict):
        return {str(k): snapshot(v) for k, v in value.items()}
    if isinstance(value, types.SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        return {k: snapshot(v) for k, v in vars(value).items()}
    return getattr(value, "__name__", type(value).__name__)


# Made of a piece's own wrapping, not of what it holds.
_SKIP = {"_modules", "_parameters", "_buffers", "pieces", "body"}


def state_of(module: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {"class": type(module).__name__}
    attributes = {} if isinstance(module, torch.jit.ScriptModule) else vars(module)
    for name, value in attributes.items():
        if name in _SKIP:
            continue
        if "_hooks" in name or name == "_non_persistent_buffers_set":
            state[name] = len(value) if value is not None else None  # hooks are counted: none of ours may stay
        else:
            state[name] = snapshot(value)
    state["parameters"] = {n: snapshot(p) for n, p in module.named_parameters(recurse=False)}
    state["buffers"] = {n: snapshot(b) for n, b in module._buffers.items()} if attributes else {}
    return state


def difference(a: Any, b: Any, tolerance: float, path: str, exact: Any = None) -> str | None:
    """Return where two snapshots differ, if they do.

    Args:
        a: one snapshot.
        b: the other.
        tolerance: relative to a tensor's norm.
        path: what they are of.
        exact: the first with finer numbers: where sums cancel, it is far off by itself, and the other may be so too.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{path}: {a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}"
        if torch.equal(a, b):
            return None
        a, b = a.double(), b.double()
        error, scale = float((a - b).norm()), max(float(a.norm()), 0.1)
        allowed = tolerance * scale
        if isinstance(exact, Tensor) and exact.shape == a.shape:
            allowed = max(allowed, 3 * float((a - exact.double()).norm()))  # an inverse rounds anew
        return None if error <= allowed else f"{path}: relative error {error / scale:.1e}"
    if type(a) is not type(b):
        return f"{path}: {str(a)[:50]} became {str(b)[:50]}"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{path}: keys {sorted(set(a) ^ set(b))} on one side only"
        finer = exact if isinstance(exact, dict) else {}
        found = (difference(a[k], b[k], tolerance, f"{path}.{k}", finer.get(k)) for k in a)
        return next((d for d in found if d is not None), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{path}: {len(a)} items became {len(b)}"
        finer = exact if isinstance(exact, (list, tuple)) and len(exact) == len(a) else [None] * len(a)
        found = (
            difference(u, v, tolerance, f"{path}.{i}", e) for i, (u, v, e) in enumerate(zip(a, b, finer, strict=True))
        )
        return next((d for d in found if d is not None), None)
    return None if a == b else f"{path}: {str(a)[:50]} became {str(b)[:50]}"
