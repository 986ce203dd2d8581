"""Parameters of which every rank keeps a piece: those of fully_shard."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recollect._devices import widened, widest
from recollect._torch import hooks_of_sharding, reshards_after_backward
from recollect.autogram._checks import is_sharded
from recollect.autogram._operations import declare, handed_on
from recollect.distributed import Ranks, SharesError

__all__ = ["Sharded"]


class Sharded:
    """The modules that fully_shard (FSDP2) has sharded; false if there are none.

    Args:
        modules: an engine's.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        kinds: Any = sys.modules.get("torch.distributed.fsdp")
        found = [child for module in modules for child in module.modules()] if kinds is not None else []
        self._sharded: list[Any] = [child for child in found if isinstance(child, kinds.FSDPModule)]
        if self._sharded:
            for function in hooks_of_sharding():
                declare(function, handed_on)

    def __bool__(self) -> bool:
        return bool(self._sharded)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Have all parameters whole within, on every rank; all ranks enter this together.

        Backward passes within exchange nothing then, and ranks may take different numbers of them.
        """
        settings = [reshards_after_backward(module) for module in self._sharded]
        try:
            for module in self._sharded:
                module.set_reshard_after_backward(False, recurse=False)
                module.unshard()
            yield
        finally:
            for module, setting in zip(self._sharded, settings, strict=True):
                module.set_reshard_after_backward(setting, recurse=False)
                module.reshard()

    def go_through(self, output: Tensor) -> None:
        """Go backward through the graph of no losses: what fully_shard fetches ahead follows from passes before it."""
        leaves = [p for module in self._modules for p in module.parameters() if p.requires_grad]
        if self._sharded and leaves and output.requires_grad:
            torch.autograd.grad(output, leaves, torch.zeros_like(output), retain_graph=True, allow_unused=True)

    def accumulate(self, vector: Tensor | None, weights: Tensor, used: Sequence[int], ranks: Ranks) -> Tensor:
        """Accumulate the gradient of all ranks' weighted losses, which fully_shard reduces; return its squared norm.

        Args:
            vector: this rank's losses, with their graph.
            weights: theirs.
            used: the numbers of the parameters that any rank's losses depend on.
            ranks: those of the mesh.

        Raises:
            SharesError: the mesh has other ranks.
            RuntimeError: fully_shard did not reduce the gradient.
        """
        parameters = [p for module in self._modules for p in module.parameters() if p.requires_grad]
        meshes = {p.device_mesh.size() for p in parameters if is_sharded(p)}  # type: ignore[attr-defined]
        if meshes - {ranks.size}:
            raise SharesError(f"the mesh of fully_shard has {max(meshes)} ranks, and the engine's group {ranks.size}")
        earlier = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            if vector is not None:
                # fully_shard takes the mean over ranks.
                torch.autograd.backward(vector, (weights * ranks.size).to(vector).view(vector.shape))
            return self._reduced(parameters, used, ranks)
        finally:
            for parameter, grad in zip(parameters, earlier, strict=True):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)

    def _reduced(self, parameters: Sequence[Tensor], used: Sequence[int], ranks: Ranks) -> Tensor:
        """Reduce what fully_shard does not manage, and return the squared norm of all gradients."""
        device = next((p.device for p in parameters), torch.device("cpu"))
        pieces = torch.zeros((), dtype=widest(device), device=device)
        whole = torch.zeros_like(pieces)
        is_any = False
        others = [parameter for parameter in parameters if not is_sharded(parameter)]
        for parameter in parameters:
            grad = parameter.grad
            if is_sharded(parameter) and grad is not None:
                local: Tensor = grad.to_local()  # type: ignore[attr-defined]
                pieces += _square(local).to(pieces) / _copies(grad)
                is_any = True
        if others:
            own = {number: other.grad for number, other in enumerate(others) if other.grad is not None}
            is_used = torch.tensor([number in own for number in range(len(others))], device=device, dtype=torch.int32)
            anywhere = ranks.add_up(is_used, "which gradients are used").nonzero().flatten().tolist()
            for number, total in ranks.add_up_all(own, anywhere, others, "gradients that nobody shards"):
                # Not all of what was summed up with it is to be kept for one of them.
                others[number].grad = total / ranks.size
                whole += _square(others[number].grad).to(whole)  # type: ignore[arg-type]
                is_any = True
        if used and not is_any:
            raise RuntimeError(
                "fully_shard has reduced no gradient: an engine over ranks needs set_requires_gradient_sync(True)"
            )
        return ranks.add_up(pieces, "the size of a sharded gradient") + whole


def _square(tensor: Tensor) -> Tensor:
    wide = tensor.float() if tensor.itemsize < 4 else tensor
    return widened(torch.linalg.vector_norm(wide)).square()


def _copies(tensor: Any) -> int:
    """Return how many ranks have the same piece of a DTensor."""
    sizes = enumerate(tensor.placements)
    return int(torch.tensor([tensor.device_mesh.size(k) for k, place in sizes if place.is_replicate()]).prod())
