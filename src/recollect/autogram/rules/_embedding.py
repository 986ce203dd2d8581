"""Tables that are looked up: only the entries that were looked up have a gradient.

Letters: r rows of indices (m, or 1 where all objectives share them), T look-ups in a row, B bags, L look-ups in a bag,
d elements in an entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recollect.autogram._factors import Factor, Lookups, NotCovered, Picked
from recollect.autogram.rules._view import needs, one_input, wide

__all__ = ["embedding", "embedding_bag", "embedding_bag_sharing"]


@one_input
def embedding(layer: nn.Embedding, index: Tensor, grad: Tensor) -> dict[str, Factor]:
    """Embedding of indices [*].

    Raises:
        NotCovered: frequencies in a whole batch scale the gradient of one element of it.
    """
    if not needs(layer, "weight"):
        return {}
    index, grad = index.reshape(len(index), -1), wide(grad).reshape(len(grad), -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        grad = grad * _present(layer, index).unsqueeze(-1)
    if layer.scale_grad_by_freq:
        if len(index) > 1:
            raise NotCovered("scale_grad_by_freq, by frequencies in more than one row of the inputs")
        number = index.new_zeros(layer.num_embeddings)  # not bincount, for which the host waits
        grad = grad / number.index_add_(0, index[0], torch.ones_like(index[0]))[index].unsqueeze(-1)
    return {"weight": Picked(grad, index, layer.num_embeddings)}


def embedding_bag_sharing(
    layer: nn.EmbeddingBag, inputs: tuple[Any, ...], axes: tuple[int | None, ...]
) -> tuple[int | None, ...] | None:
    """Bags that stand one behind the other, [T] with offsets, have no axis of the batch: every row sees them all."""
    with_offsets = len(inputs) > 1 and inputs[1] is not None
    return (None if with_offsets else 0,) * len(inputs) if axes == (0,) else None


def embedding_bag(
    layer: nn.EmbeddingBag, inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...]
) -> dict[str, Factor]:
    """EmbeddingBag of bags [B, L], or of indices [T] and the offsets [B] at which the bags begin.

    Raises:
        NotCovered: frequencies scale the gradient, which PyTorch counts differently by device; or every row has
            several bags of those with offsets, and may have any of them.
    """
    (index, offsets, scales), grad = (*inputs, None, None)[:3], grads[0]
    if grad is None or not needs(layer, "weight"):
        return {}
    if layer.scale_grad_by_freq:
        raise NotCovered("scale_grad_by_freq, by frequencies in bags")
    grad, present = wide(grad), _present(layer, index.flatten(1))
    if offsets is None:
        count = index.shape[1]
        bag = torch.arange(index.shape[1], device=index.device).repeat_interleave(index.shape[2])
    else:
        starts = offsets[0, :-1] if layer.include_last_offset else offsets[0]
        count = len(starts)
        places = torch.arange(index.shape[1], device=starts.device, dtype=starts.dtype)
        bag = torch.searchsorted(starts, places, right=True) - 1
    index = index.flatten(1)
    weights = _weights(layer, index, bag, present, count, scales)
    if offsets is not None and grad.shape[1] < count:  # every row has a bag of its own
        if grad.shape[1] > 1 or len(grad) != count:
            raise NotCovered("several bags with offsets for each element of the batch")
        found = grad[bag, 0] * weights[0]
        return {"weight": Lookups(found, index[0], bag, count, layer.num_embeddings)}
    return {"weight": Picked(grad[:, bag] * weights, index, layer.num_embeddings)}


def _present(layer: nn.Embedding | nn.EmbeddingBag, index: Tensor) -> Tensor:
    """Return 1 for each look-up [r, T], 0 for padding."""
    padding = -1 if layer.padding_idx is None else layer.padding_idx
    return (index != padding).to(wide(layer.weight).dtype)


def _weights(
    layer: nn.EmbeddingBag, index: Tensor, bag: Tensor, present: Tensor, count: int, scales: Tensor | None
) -> Tensor:
    """Return by how much each look-up counts in its bag, one of ``count``, [r, T, 1 or d]."""
    weights = present
    if scales is not None:
        weights = weights * wide(scales).flatten(1)
    if layer.mode == "mean":
        sizes = weights.new_zeros(len(index), count).index_add(1, bag, present)
        weights = weights / sizes[:, bag].clamp(min=1)
    weights = weights.unsqueeze(-1)
    return weights * _is_first_largest(layer, index, bag, present, count) if layer.mode == "max" else weights


def _is_first_largest(layer: nn.EmbeddingBag, index: Tensor, bag: Tensor, present: Tensor, count: int) -> Tensor:
    """Return which look-up of a bag has the largest element of all, and is the first to have it, [r, T, d]."""
    values = wide(layer.weight.detach())[index].masked_fill((present == 0).unsqueeze(-1), -torch.inf)
    places = torch.arange(len(bag), device=bag.device).view(1, -1, 1).expand_as(values)
    into = bag.view(1, -1, 1).expand_as(values)
    shape = (len(index), count, layer.embedding_dim)
    largest = values.new_full(shape, -torch.inf).scatter_reduce(1, into, values, "amax").gather(1, into)
    places = places.where(values == largest, len(bag))
    return places == places.new_full(shape, len(bag)).scatter_reduce(1, into, places, "amin").gather(1, into)
