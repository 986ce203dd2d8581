"""The opt-in that frees inputs behind the caller's back, as earlier systems always did."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from recollect._torch import storage_use_count, tensor_use_count, when_backward_ends, without_overrides
from recollect.frames._chain import Parts, Stage, whole
from recollect.frames._errors import ReleasedTensorError
from recollect.frames._modes import local

__all__ = ["eager_release"]


@contextmanager
def eager_release(enabled: bool = True) -> Iterator[None]:
    """Empty the storages of the inputs that invertible functions can bring back, even if somebody holds them.

    Normally an input that somebody still holds stays, and one that nobody holds is freed by reference counting. Inside
    this context, after the forward of an invertible function, ``x.untyped_storage().size() == 0`` for each input that
    its inverse restores; backward puts the values back. Left alone are inputs named in ``keep``, views, tensors that
    share their storage with others (outputs included) and tensors that other operations saved for backward.

    Reading a released tensor raises a :class:`~recollect.frames.ReleasedTensorError` that names the module; its
    metadata (shape, dtype, storage size) can be read. What does not ask Python first (``torch.tensor(x)``,
    ``torch.func``, a gradient) finds a tensor without elements.

    Args:
        enabled: with ``False``, the normal behaviour.

    Example:
        >>> import recollect, torch
        >>> x = torch.ones(3, requires_grad=True) * 2
        >>> with recollect.eager_release():
        ...     y = recollect.checkpoint(torch.exp, x, inverse=torch.log)
        >>> x.untyped_storage().size()
        0
        >>> y.sum().backward()
        >>> x
        tensor([2., 2., 2.], grad_fn=<MulBackward0>)
    """
    before, local.policy = local.policy, _Release() if enabled else None
    try:
        yield
    finally:
        local.policy = before


# What may be asked of a tensor that has no values, and what is answered from the layout that it had.
_METADATA = frozenset(
    [
        "_backward_hooks",
        "_base",
        "_grad",
        "_is_view",
        "_use_count",
        "_version",
        "device",
        "dtype",
        "element_size",
        "grad",
        "grad_fn",
        "is_complex",
        "is_cpu",
        "is_cuda",
        "is_floating_point",
        "is_inference",
        "is_leaf",
        "is_sparse",
        "itemsize",
        "layout",
        "names",
        "output_nr",
        "register_hook",
        "requires_grad",
        "retain_grad",
        "retains_grad",
        "storage",
        "untyped_storage",
    ]
)
_LAYOUT = frozenset(
    [
        "dim",
        "is_contiguous",
        "nbytes",
        "ndim",
        "ndimension",
        "nelement",
        "numel",
        "shape",
        "size",
        "storage_offset",
        "stride",
    ]
)


class _ReleasedTensor(Tensor):
    """What a tensor becomes while its memory is given up.

    It is empty underneath, not only its storage: where reading does not ask Python (constructors in C, functorch, the
    autograd engine), it finds no elements, and no address to read from.
    """

    _like: Tensor  # without memory, of the layout that the tensor had
    _released_by: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name in _LAYOUT:
            return func(args[0]._like, *args[1:], **(kwargs or {}))
        if name in _METADATA:
            with without_overrides():
                return func(*args, **(kwargs or {}))
        owner = next(_owners((args, kwargs)), "an invertible function")
        raise ReleasedTensorError(
            f"{name or func}: this tensor is an input of {owner}, which released its memory inside "
            "recollect.eager_release(); it is restored by backward. Name it in keep=(...), read it before, or leave "
            "eager_release, which is not needed to save memory"
        )


def _owners(value: Any) -> Iterator[str]:
    """Yield who released the tensors among a call's arguments."""
    if isinstance(value, _ReleasedTensor):
        yield value._released_by
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _owners(item)


class Released:
    """A tensor whose memory was given up, and the way back.

    Args:
        tensor: the tensor; it is not kept alive.
        name: who released it, for messages.
    """

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor, name: str) -> None:
        self._tensor = weakref.ref(tensor)
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        # Through .data: the tensor is what it was, so its version stays.
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.__class__ = _ReleasedTensor
        tensor.__dict__.update(_like=like, _released_by=name)

    @property
    def waits(self) -> bool:
        """Whether the tensor is still there, and still without values."""
        return isinstance(self._tensor(), _ReleasedTensor)

    def restore(self, value: Tensor) -> None:
        """Put the values back, if the tensor is still there and still without."""
        tensor = self._tensor()
        if not isinstance(tensor, _ReleasedTensor):
            return
        like = tensor._like
        del tensor._released_by, tensor._like
        tensor.__class__ = Tensor  # type: ignore[assignment]
        with torch.no_grad():
            whole = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=value.device)
            tensor.data = whole.copy_(value)


def release(tensor: Tensor, name: str) -> Released | None:
    """Empty the tensor's storage if nobody but Python can reach it; return the way back, or ``None`` if left alone."""
    if type(tensor) is not Tensor or tensor._is_view() or tensor.is_inference() or tensor.layout is not torch.strided:
        return None
    storage = tensor.untyped_storage()
    count = storage_use_count(storage)
    # The tensor and the Python storage made above; a leaf is also held by the node that accumulates its gradient.
    owners = 2 if tensor.is_leaf and tensor.requires_grad else 1
    if count is None or storage.nbytes() == 0 or count > 2 or tensor_use_count(tensor) > owners:
        return None
    return Released(tensor, name)


class _Release:
    """The policy: what a stage can bring back is emptied when its forward is over."""

    def closed(self, stage: Stage, inputs: Sequence[Tensor], outputs: Sequence[Any], name: str) -> None:
        """Release the inputs; they come back with the stage's next inversion, or when a backward pass ends."""
        released = [release(tensor, name) for tensor in inputs]
        waiting = [one for one in released if one is not None]
        if not waiting:
            return

        def restore(values: Sequence[Tensor | Parts]) -> None:
            for one, value in zip(released, values, strict=True):
                if one is not None:
                    one.restore(whole(value))

        stage.restored = restore

        def finish() -> None:
            if any(one.waits for one in waiting):
                stage.invert()

        def note(_: tuple[Tensor, ...]) -> None:
            when_backward_ends(finish)

        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(note)

        # A leaf gets its gradient before backward ends, and then must have its shape. The graph holds the stage.
        reference = weakref.ref(stage)
        handles: list[Any] = []

        def return_to_leaf(_: Tensor) -> None:
            for handle in handles:
                handle.remove()
            maker = reference()
            if maker is not None and any(one.waits for one in waiting):
                maker.invert()

        for tensor, one in zip(inputs, released, strict=True):
            if one is not None and tensor.is_leaf and tensor.requires_grad:
                handles.append(tensor.register_hook(return_to_leaf))  # type: ignore[no-untyped-call]
