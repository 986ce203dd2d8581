"""Checkpoints that keep what products return, and compute the rest again.

The work is done by two dispatch modes: one stands around the forward and keeps, the other around the rebuild and hands
out. A product whose output was written to since (an in-place activation) is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect._torch import TorchDispatchMode, counted_alias

__all__ = ["keep_products"]

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    getattr(_aten, name).default
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(_aten, name)
)  # fmt: skip


class _Product:
    """What one product returned."""

    __slots__ = ("function", "is_tuple", "items", "versions")

    def __init__(self, function: Any, output: Any) -> None:
        self.function = function
        self.is_tuple = isinstance(output, tuple)
        # Aliases: autograd makes a part of its graph of the tensors themselves.
        self.items = [_alias(item) for item in (output if self.is_tuple else (output,))]
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [item._version for item in self.items if isinstance(item, Tensor)]

    def is_unchanged(self) -> bool:
        return self.versions == self._versions()

    def output(self) -> Any:
        items = [_alias(item) for item in self.items]
        return tuple(items) if self.is_tuple else items[0]


def _alias(item: Any) -> Any:
    return counted_alias(item) if isinstance(item, Tensor) else item


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, products: list[_Product]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self.products.append(_Product(func, output))
        return output


class _Handing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, products: list[_Product]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = products
        self.next = 0

    def __enter__(self) -> Any:
        self.next = 0  # a region may be rebuilt several times
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            at, self.next = self.next, self.next + 1
            product = self.products[at] if at < len(self.products) else None
            if product is not None and product.function is func and product.is_unchanged():
                return product.output()
        return func(*args, **(kwargs or {}))


def keep_products() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts of one checkpoint: of the forward, and of its rebuilds."""
    products: list[_Product] = []
    return _Keeping(products), _Handing(products)
