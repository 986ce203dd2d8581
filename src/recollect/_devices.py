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
        sends_at_once: a copy to the device from memory that is not pinned, where it is not to block, has read that when
            the call returns, and waits for no other work. (On mps it is read later, when it may hold something else.)
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
        onednn: products and convolutions have forms of oneDNN's, where it is there.
        tanh_of_exponentials: tanh is made of ``expm1``, a third of the time that torch's own takes.
        tensor_floats: products of float32 may be rounded to ten binary digits, as settings of torch say.

    How much of an engine's work is done at once: what a CPU's cache holds, or a launch's worth on a GPU.

        row_bytes: of rows that are formed, or of products of positions.
        norm_bytes: the same where only norms are wanted.
        dense_bytes: of dense layers' rows, which are most of the work: as many as they are formed from, within these
            bounds. (More than 32 MiB, the C library takes page by page from the system each time, which takes as long
            as forming them.)
        unfolded_bytes: of what a convolution sees, unfolded: in a cache with some rows for each core.
        grouped_bytes: of rows that torch forms where nothing is unfolded. (Measured on CPU, 32 to 128 channels, 32 and
            128 rows: within 10 % of the best everywhere; a fourth takes up to twice as long, four times as much too.)
        columns: of a Gramian's blocks: narrower ones leave out more of the upper half, and keep the processor less
            busy. (Measured on CPU, 128 rows of 16,384: a whole product at 94 GFlop/s, columns of 32 at 80, of 16 at 68;
            with 32 rows, those of 16 take 7 to 15 % less time; with 256 rows and more, those of 64 as long as those of
            32 by oneDNN, and on an Intel Xeon 11 to 16 % longer by its own library.)
        short_columns: the same for rows of at most 256 elements, whose products take no longer than to call for them.
            (Measured on an Intel Xeon, 128 to 1,024 rows, float32 and float64: those of 128 take 0.3 to 0.7 of the time
            of 32 where rows have 1 to 64 elements, and 0.9 to 1.03 with 256.)
        paired_columns: the same where two products are multiplied entry by entry.
        mirrored_rows: of a block in which the upper half is filled. (All at once, 2,048 rows take as long as a layer
            of 512; 256 rows in blocks of 64 take two thirds of the time of one of 256.)
        position_columns: for so many losses products of pairs of positions are computed by all that come behind. (Three
            positions, 256 losses: a fourth less time than position by position; sixteen: half.)
        single_columns: the same of a single position, whose products are narrower.
        thin_parts: in so many parts long rows are multiplied at once, if there are few of them, a core each: processors
            share one product of thin matrices badly. (Measured on 2 cores: 32 rows of 65,792 are 10 % faster, 128 rows
            6 %, 256 rows none.)
        small_layer: elements for one loss: where no layer has as many, calls cost more than the work, and all losses go
            at once. On a CPU one after the other is as fast.
    """

    reads_at_once: bool
    sends_at_once: bool
    float64: bool
    double_sums: bool
    dot_norms: bool
    piece: int
    reductions: bool
    sampled_products: bool
    wide_blocks: bool
    convolutions: bool
    packed_dropout: bool
    onednn: bool
    tanh_of_exponentials: bool
    tensor_floats: bool
    row_bytes: int
    norm_bytes: int
    dense_bytes: tuple[int, int]
    unfolded_bytes: int
    grouped_bytes: int
    columns: int
    short_columns: int
    paired_columns: int
    mirrored_rows: int
    position_columns: int
    single_columns: int
    thin_parts: int
    small_layer: int


OTHERS = Forms(
    reads_at_once=False,
    sends_at_once=False,  # as far as is known
    float64=True,
    double_sums=False,  # slow on most cards
    dot_norms=False,
    piece=1 << 22,
    reductions=False,
    sampled_products=False,
    wide_blocks=True,
    convolutions=False,
    packed_dropout=False,
    onednn=False,
    tanh_of_exponentials=False,
    tensor_floats=True,
    row_bytes=2**26,
    norm_bytes=2**26,
    dense_bytes=(2**26, 2**28),
    unfolded_bytes=2**26,
    grouped_bytes=2**26,
    columns=256,
    short_columns=256,
    paired_columns=1024,
    mirrored_rows=4096,
    position_columns=1024,
    single_columns=1024,
    thin_parts=1,
    small_layer=2**20,
)

FORMS = {
    "cpu": Forms(
        reads_at_once=True,
        sends_at_once=True,
        float64=True,
        double_sums=True,
        dot_norms=True,
        piece=1 << 18,
        reductions=True,
        sampled_products=True,
        wide_blocks=False,
        convolutions=True,
        packed_dropout=True,
        onednn=True,
        tanh_of_exponentials=True,
        tensor_floats=False,
        row_bytes=2**23,
        norm_bytes=2**22,
        dense_bytes=(2**22, 2**24),
        unfolded_bytes=2**22,
        grouped_bytes=2**20,
        columns=32,
        short_columns=128,
        paired_columns=128,
        mirrored_rows=64,
        position_columns=32,
        single_columns=128,
        thin_parts=4,
        small_layer=0,
    ),
    "cuda": replace(OTHERS, sends_at_once=True, convolutions=True),
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
