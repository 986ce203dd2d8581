"""How one unit is treated: what stands in front of its forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from recollect._arguments import Certify
from recollect.frames import Forward, Source, frames_apply, run_frame

__all__ = ["Applied", "Treated", "keep_products"]

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


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def keep_products() -> Any:
    """Return the contexts of a checkpoint that keeps what products return, and computes the rest again."""
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


class Treated(Forward):
    """Runs a module's forward in a frame.

    Args:
        module: whose forward.
        source: where its inputs come from in backward; ``None``: there is no frame, and everything is kept.
        plain: whether frames inside step aside.
        selective: whether what products return is kept.
        certify: what is accepted of a rebuild.
    """

    __slots__ = ("certify", "plain", "selective", "source")

    def __init__(
        self, module: nn.Module, source: Source | None, plain: bool = True, selective: bool = False,
        certify: Certify = True,
    ) -> None:  # fmt: skip
        super().__init__(module)
        self.source = source
        self.plain = plain
        self.selective = selective
        self.certify = certify

    def settings(self) -> tuple[Any, ...]:
        """See :class:`Forward`."""
        return self.source, self.plain, self.selective, self.certify

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        own = self.own(self.plain)
        if self.source is None or not frames_apply():
            return own(*args, **kwargs)
        contexts = keep_products() if self.selective else None
        return run_frame(own, args, kwargs, self.source, certify=self.certify, contexts=contexts)


class Applied:
    """Modules with something in front of their forward, to be taken away again."""

    __slots__ = ("_fronts",)

    def __init__(self, fronts: list[Forward]) -> None:
        self._fronts = fronts
        for front in fronts:
            front.put()

    def remove(self) -> None:
        """Leave the modules as they were; a second call does nothing."""
        while self._fronts:
            self._fronts.pop().take()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()
