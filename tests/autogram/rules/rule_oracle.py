"""What a rule says, against the Jacobian that autograd finds row by row from the layer itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from factor_oracle import dense
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recollect.autogram._contract import gramian
from recollect.autogram._factors import Factor
from recollect.autogram._registry import Registry
from recollect.autogram.rules import RULES

OBJECTIVES = 5
REGISTRY = Registry(RULES)


def tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def explicit(layer: nn.Module, outputs: list[Tensor], cotangents: list[list[Tensor]]) -> dict[str, Tensor]:
    """One vector-Jacobian product for each objective: cotangents[i] has one tensor for each output."""
    names, parameters = zip(*((n, p) for n, p in layer.named_parameters() if p.requires_grad), strict=True)
    used = [k for k, output in enumerate(outputs) if output.requires_grad]
    rows = [
        torch.autograd.grad(
            [outputs[k] for k in used], parameters, [one[k] for k in used], retain_graph=True, materialize_grads=True
        )
        for one in cotangents
    ]
    return {name: torch.stack([row[k].to_dense() for row in rows]) for k, name in enumerate(names)}


def rows_form(layer: nn.Module, inputs: Sequence[Any]) -> tuple[dict[str, Tensor], tuple[Any, ...], list[Tensor]]:
    """Objectives that are weighted sums of all outputs; inputs [1, *], gradients [m, *]."""
    outputs = tensors(layer(*inputs))
    grads = [torch.randn(OBJECTIVES, *output.shape, dtype=output.dtype) for output in outputs]
    jacobian = explicit(layer, outputs, [[grad[i] for grad in grads] for i in range(OBJECTIVES)])
    return jacobian, pytree.tree_map_only(Tensor, lambda x: x.detach().unsqueeze(0), tuple(inputs)), grads


def split(tensor: Tensor, axis: int) -> Tensor:
    """Every element of the batch as a batch of one, [m, *]."""
    return tensor.detach().movedim(axis, 0).unsqueeze(1 + axis)


def batch_form(
    layer: nn.Module, inputs: Sequence[Any], axes: Sequence[int]
) -> tuple[dict[str, Tensor], tuple[Any, ...], list[Tensor]]:
    """One objective for each element of the batch, which stands along ``axes[k]`` of output k; inputs [m, *]."""
    outputs = tensors(layer(*inputs))
    grads = [torch.randn_like(output) for output in outputs]
    count = outputs[0].shape[axes[0]]

    def only(grad: Tensor, axis: int, i: int) -> Tensor:
        return torch.zeros_like(grad).index_copy(axis, torch.tensor([i]), grad.narrow(axis, i, 1))

    cotangents = [[only(grad, axis, i) for grad, axis in zip(grads, axes, strict=True)] for i in range(count)]
    sharing = REGISTRY.find(type(layer)).sharing
    sources = sharing(layer, tuple(inputs), tuple(axes))

    def view(value: Any, source: int | None) -> Any:
        change = (lambda x: x.detach().unsqueeze(0)) if source is None else (lambda x: split(x, source))
        return pytree.tree_map_only(Tensor, change, value)

    rows = tuple(view(value, source) for value, source in zip(inputs, sources, strict=True))
    return explicit(layer, outputs, cotangents), rows, [split(g, a) for g, a in zip(grads, axes, strict=True)]


def apply(layer: nn.Module, inputs: tuple[Any, ...], grads: list[Tensor]) -> Mapping[str, Factor]:
    return REGISTRY.find(type(layer)).rule(layer, inputs, tuple(grads))


def check(layer: nn.Module, *inputs: Any, axes: Sequence[int] | None = None, tolerance: float = 1e-10) -> None:
    """Assert that the rule's Jacobian and Gramian are those of autograd; rows share the inputs if ``axes`` is None."""
    jacobian, views, grads = rows_form(layer, inputs) if axes is None else batch_form(layer, inputs, axes)
    factors = apply(layer, views, grads)
    assert set(factors) == set(jacobian)
    for name, rows in jacobian.items():
        found, rows = dense(factors[name]), rows.to(torch.promote_types(rows.dtype, torch.float32))
        scale = rows.abs().max().item() if rows.numel() else 0.0
        torch.testing.assert_close(found, rows, rtol=0, atol=tolerance * scale)
        products = rows.flatten(1) @ rows.flatten(1).T
        bound = tolerance * products.diagonal().max().item()
        torch.testing.assert_close(gramian([factors[name]]), products, rtol=0, atol=bound)
