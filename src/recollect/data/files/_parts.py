"""The split of a graph that was read: the file's own, or one that is made."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recollect.data._errors import InvalidFileError
from recollect.data._splits import check_split, stratified_masks
from recollect.data.files._found import PARTS, Found
from recollect.data.files._labels import Labels

_TRAIN, _VAL = 0.6, 0.2


def choose_masks(found: Found, labels: Labels, split: int, seed: int, name: str) -> tuple[tuple[Tensor, ...], int]:
    """Take a split of the file's, or make one; nodes without a label are in no part.

    Args:
        found: With masks or without.
        labels: Say which nodes have one.
        split: Which of the file's splits.
        seed: Of one that is made.
        name: The graph's, for messages.

    Returns:
        Train, validation and test mask, [N] bool each; and the number of splits in the file, at least 1.

    Raises:
        InvalidFileError: Parts of the split overlap.
        ValueError: There is no such split.
    """
    if found.masks is None:
        check_split(name, split, 1)
        found.notes.append(
            f"no split in the file: made from seed {seed}, {_TRAIN:.0%} / {_VAL:.0%} / {1 - _TRAIN - _VAL:.0%} of "
            f"{'each class' if labels.task == 'multiclass' else 'the nodes of each rarest label'}"
        )
        return _make(labels, seed), 1
    num_splits = found.masks[0].shape[1]
    if not num_splits:
        raise InvalidFileError(f"{found.source}: the masks have no column; give one for each split, or no masks")
    check_split(name, split, num_splits)
    if num_splits > 1:
        found.notes.append(f"there are {num_splits} splits: number {split} is taken, as the option split says")
    chosen = np.stack([mask[:, split] for mask in found.masks])
    if (twice := np.flatnonzero(chosen.sum(0) > 1)).size:
        parts = " and ".join(part for part, there in zip(PARTS, chosen[:, twice[0]], strict=True) if there)
        raise InvalidFileError(
            f"{found.source}: {twice.size} nodes are in two parts of the split, node {twice[0]} in {parts}; each node "
            f"may be in one"
        )
    known = labels.known.numpy()
    if dropped := int((chosen & ~known).sum()):
        found.notes.append(f"{dropped} nodes of the split have no known label and are left out of it")
    return tuple(torch.from_numpy(mask & known) for mask in chosen), num_splits


def _make(labels: Labels, seed: int) -> tuple[Tensor, ...]:
    nodes = labels.known.nonzero().view(-1)
    kinds = labels.y[nodes] if labels.task == "multiclass" else _rarest(labels.y[nodes])
    masks = torch.zeros(3, labels.known.numel(), dtype=torch.bool)
    for mask, part in zip(masks, stratified_masks(kinds, train=_TRAIN, val=_VAL, seed=seed), strict=True):
        mask[nodes[part]] = True
    return masks[0], masks[1], masks[2]


def _rarest(y: Tensor) -> Tensor:
    """The rarest label of each node, [N] int64; K for nodes that have none of the K."""
    has = y.nan_to_num(0) > 0
    order = has.sum(0).argsort(stable=True)  # from the rarest to the most frequent
    first = has[:, order].to(torch.int8).argmax(1)
    return torch.where(has.any(1), order[first], y.size(1))
