"""Message passing without messages.

Where each target reduces the rows of its sources, the sum (or the mean) is the product of the adjacency with these
rows, and nothing with a row for each edge is made: neither in forward nor in backward, which is the product with the
transpose. :func:`propagate` is that product, :func:`extreme` the largest or smallest of the rows, and :func:`convolve`
calls a convolution of torch_geometric, or a block with convolutions in it, by means of them.

The other names are what the package shares about sparse CSR adjacencies.
"""

from recollect.messages._adjacency import (
    check_csr,
    described,
    make_adj_t,
    row_pointers,
    rows_of,
    sparse_csr,
    values_of,
    version_of,
)
from recollect.messages._convolutions import convolve, for_targets
from recollect.messages._extreme import extreme
from recollect.messages._kernels import multiplied
from recollect.messages._made import Made, adjacency_of_edges, made_of, take_made
from recollect.messages._pairs import naming_pairs
from recollect.messages._products import propagate, shifted, transposed_rows
from recollect.messages._weights import with_weights

__all__ = [
    "Made",
    "adjacency_of_edges",
    "check_csr",
    "convolve",
    "described",
    "extreme",
    "for_targets",
    "made_of",
    "make_adj_t",
    "multiplied",
    "naming_pairs",
    "propagate",
    "row_pointers",
    "rows_of",
    "shifted",
    "sparse_csr",
    "take_made",
    "transposed_rows",
    "values_of",
    "version_of",
    "with_weights",
]
