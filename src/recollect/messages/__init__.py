"""Message passing without messages.

Where each target sums up (or averages) the rows of its sources, the sums are the product of the adjacency with these
rows, and nothing with a row for each edge is made: neither in forward nor in backward, which is the product with the
transpose. :func:`propagate` is that product, and :func:`convolve` calls convolutions of torch_geometric by means of it.
"""

from recollect.messages._convolve import convolve
from recollect.messages._propagate import propagate

__all__ = ["convolve", "propagate"]
