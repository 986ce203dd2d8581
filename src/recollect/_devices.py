"""Which form of an operation each kind of device gets: the one table of these choices.

A kind of device that is not in the table is taken for an accelerator of which nothing is known but that it computes
beside the host. docs/gpu.md says what is behind each entry, and what was never run on a card.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["FORMS", "OTHERS", "Forms", "forms_of", "widened", "widest"]


@dataclass(frozen=True)
class Forms:
    """How a kind of device computes what has several forms.

    Attributes:
        reads_at_once: the host reads a number without waiting for other work: verdicts are given on the spot, and
            sizes may depend on values, as in `torch.unique`.
        float64: whether it has numbers of double precision.
        double_sums: sums over many pieces of float32 go in float64, which costs nothing there.
        dot_norms: a norm is the root of scalar products, which are faster than torch's norm.
        piece: elements of at most 4 bytes that are copied at a time where a tensor is read piece by piece.
        reductions: torch has products of a sparse CSR tensor by reductions, ``torch.sparse.mm(a, x, reduce)``.
        sampled_products: scalar products of rows at the entries of a CSR tensor are by
            ``torch.sparse.sampled_addmm``; elsewhere rows are gathered in blocks.
        wide_blocks: such a block may be as large as the features, as each block is some programs to start.
        convolutions: convolutions of torch_geometric are computed by products with the adjacency.
        packed_dropout: dropout of `recollect.models` draws four elements from one random number.
    """

    reads_at_once: bool
    float64: bool
    double_sums: bool
    dot_norms: bool
    piece: int
    reductions: bool
    sampled_products: bool
    wide_blocks: bool
    convolutions: bool
    packed_dropout: bool


OTHERS = Forms(
    reads_at_once=False,
    float64=True,
    double_sums=False,  # slow on most cards
    dot_norms=False,
    piece=1 << 22,
    reductions=False,
    sampled_products=False,
    wide_blocks=True,
    convolutions=False,
    packed_dropout=False,
)

FORMS = {
    "cpu": Forms(
        reads_at_once=True,
        float64=True,
        double_sums=True,
        dot_norms=True,
        piece=1 << 18,
        reductions=True,
        sampled_products=True,
        wide_blocks=False,
        convolutions=True,
        packed_dropout=True,
    ),
    "cuda": replace(OTHERS, convolutions=True),
    "mps": replace(OTHERS, float64=False),
}


def forms_of(device: torch.device) -> Forms:
    """Return the forms that a device gets."""
    return FORMS.get(device.type, OTHERS)


def widest(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type that a device has."""
    return torch.float64 if forms_of(device).float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in the widest floating-point type of its device."""
    return tensor.to(widest(tensor.device))
