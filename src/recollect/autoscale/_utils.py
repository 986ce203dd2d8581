"""What training scripts of this field share."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from recollect.messages import check_csr, values_of, with_weights

__all__ = ["compute_micro_f1", "dropout", "gen_masks"]


def compute_micro_f1(logits: Tensor, y: Tensor, mask: Tensor | None = None) -> float:
    """Micro-averaged F1 score; for one label a node it is the accuracy.

    Args:
        logits: [N, C], any real dtype.
        y: [N] integer: the class of each node, the prediction is the largest logit; or [N, C]: which labels a node
            has, as zeros and ones or booleans, and a label is predicted where its logit is positive.
        mask: [N] bool: the nodes that count; default: all.

    Returns:
        From 0 to 1; 0 where nothing is right, also because there is nothing.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> import torch
        >>> from recollect.autoscale import compute_micro_f1
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
        >>> compute_micro_f1(logits, torch.tensor([0, 1, 1, 1]))  # three of four are right
        0.75
    """
    if logits.dim() != 2 or y.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and y {tuple(y.shape)}, but must have [N, C] and [N] or [N, C]"
        )
    if mask is not None:
        if mask.shape != y.shape[:1] or mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}, but must be bool [{y.size(0)}]")
        logits, y = logits[mask], y[mask]
    if y.dim() == 1:
        right, total = logits.argmax(dim=-1) == y, 2 * y.numel()
    else:
        predicted, true = logits > 0, y > 0.5
        right, total = predicted & true, int(predicted.sum()) + int(true.sum())
    return 2 * int(right.sum()) / max(total, 1)


def gen_masks(
    y: Tensor,
    train_per_class: int = 20,
    val_per_class: int = 30,
    num_splits: int = 20,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random splits with so many nodes of each class for training and validation; the rest is for testing.

    A class with too few nodes fills training first, then validation. Nodes without a label (negative) are in none.

    Args:
        y: [N] integer, the class of each node.
        train_per_class: Nodes of each class for training, not negative.
        val_per_class: Nodes of each class for validation, not negative.
        num_splits: Independent splits: S, at least 1.
        generator: Of the random numbers, on the CPU; default: torch's own.

    Returns:
        Masks for training, validation and testing, each [N, S] bool on ``y``'s device.

    Raises:
        ValueError: An argument is out of its range, or ``y`` holds no single class for each node.

    Example:
        >>> import torch
        >>> from recollect.autoscale import gen_masks
        >>> y = torch.arange(40) % 4  # ten nodes of each class
        >>> train, val, test = gen_masks(y, train_per_class=3, val_per_class=2, num_splits=5)
        >>> train.shape, train.sum(0).tolist(), test.sum(0).tolist()
        (torch.Size([40, 5]), [12, 12, 12, 12, 12], [20, 20, 20, 20, 20])
    """
    if y.dim() != 1 or y.dtype.is_floating_point or y.dtype == torch.bool:
        raise ValueError(f"y is {y.dtype} of shape {tuple(y.shape)}, but must hold integer classes [N]")
    if train_per_class < 0 or val_per_class < 0 or num_splits < 1:
        raise ValueError(
            f"train_per_class is {train_per_class}, val_per_class {val_per_class} and num_splits {num_splits}, "
            f"but must be at least 0, 0 and 1"
        )
    order = torch.stack([_rank_in_class(y.cpu(), generator) for _ in range(num_splits)], dim=1).to(y.device)
    labelled = (y >= 0).unsqueeze(1)
    train = labelled & (order < train_per_class)
    val = labelled & ~train & (order < train_per_class + val_per_class)
    return train, val, labelled & ~train & ~val


def _rank_in_class(y: Tensor, generator: Generator | None) -> Tensor:
    """The place of each node in a random order of its class, [N] int64 from 0."""
    shuffled = torch.randperm(y.numel(), generator=generator, device="cpu")
    by_class = shuffled[torch.argsort(y[shuffled], stable=True)]
    _, counts = torch.unique_consecutive(y[by_class], return_counts=True)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.empty_like(by_class).scatter_(0, by_class, torch.arange(y.numel(), device="cpu") - first)


def dropout(adj_t: Tensor, p: float, training: bool = True) -> Tensor:
    """Drop edges: set each value of an adjacency to zero with probability ``p``, and scale the others by 1/(1 - p).

    Args:
        adj_t: ``torch.sparse_csr``, of a whole graph or a mini-batch.
        p: From 0 to 1.
        training: Otherwise ``adj_t`` is returned as it is.

    Returns:
        An adjacency of the same edges.

    Raises:
        TypeError: ``adj_t`` is no sparse CSR tensor.
        ValueError: ``p`` is out of its range.

    Example:
        >>> import torch
        >>> from recollect.autoscale import dropout, get_data
        >>> adj_t = get_data(None, "karate").data.adj_t
        >>> sorted(set(dropout(adj_t, p=0.5).values().tolist()))
        [0.0, 2.0]
        >>> dropout(adj_t, p=0.5, training=False) is adj_t
        True
    """
    check_csr(adj_t)
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}, but must be from 0 to 1")
    if not training or p == 0:
        return adj_t
    return with_weights(adj_t, torch.nn.functional.dropout(values_of(adj_t), p))
