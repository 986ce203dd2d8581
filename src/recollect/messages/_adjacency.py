"""Adjacencies as sparse CSR tensors, their weights, and those of an ``edge_index``, kept while it stays the same."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from recollect._storages import note_kept
from recollect._torch import is_transformed, with_signature

__all__ = [
    "Edges",
    "check_csr",
    "check_rows",
    "described",
    "edges_of",
    "know_edges",
    "known_edges",
    "make_adj_t",
    "narrow_adj_t",
    "row_pointers",
    "rows_of",
    "rows_of_entries",
    "sparse_csr",
    "state_of",
    "values_of",
    "version_of",
    "weights_of",
]

# What a sparse tensor is called that was made of weights with a history: the weights themselves. Frames bring such
# attributes back.
_WEIGHTS = "_recollect_weights"


def sparse_csr(rowptr: Tensor, col: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    """A sparse CSR tensor without a check of its parts, which are known to fit.

    A gradient reaches the values in whatever order the columns are. (Torch's own goes to the wrong ones.)

    Args:
        rowptr: where each row begins, and where the last ends [rows + 1], int64 or int32.
        col: column of each entry [E], of the same type.
        value: of each entry [E].
        size: rows, columns.

    Returns:
        [rows, columns], on the device of its parts, which are not copied.

    Raises:
        TypeError: the values belong to a transform of torch.func, or have a tangent.

    Example:
        >>> import torch
        >>> from recollect.messages import sparse_csr
        >>> adj_t = sparse_csr(torch.tensor([0, 2, 3]), torch.tensor([2, 0, 1]), torch.ones(3), (2, 3))
        >>> adj_t.to_dense()
        tensor([[1., 0., 1.],
                [0., 1., 0.]])
    """
    if is_transformed(value) or _has_tangent(value):
        raise TypeError(
            "these weights belong to a transform of torch.func or have a tangent, and no sparse tensor can: leave the "
            "adjacency as it is, and call propagate(adj_t, x, weights)"
        )
    _hear_of_state()
    if not (torch.is_grad_enabled() and value.requires_grad):
        return _bare_csr(rowptr, col, value, size)
    adj_t: Tensor = _Assembled.apply(value, rowptr, col, size)  # type: ignore[no-untyped-call]
    setattr(adj_t, _WEIGHTS, value)
    return adj_t


def _has_tangent(value: Tensor) -> bool:
    return forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def _bare_csr(rowptr: Tensor, col: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    # On the device of its parts, not on the default device.
    return torch.sparse_csr_tensor(rowptr, col, value, size, device=value.device, check_invariants=False)


def values_of(adj_t: Tensor) -> Tensor:
    """The values of a sparse CSR tensor [E]: those that it was made of, where they have a history.

    Their gradient is then a plain tensor. That of ``adj_t.values()`` is a sparse one, which has no second order.

    Args:
        adj_t: sparse CSR.

    Returns:
        [E], in the order of the entries.

    Example:
        >>> import torch
        >>> from recollect.messages import sparse_csr, values_of
        >>> weights = torch.ones(3, requires_grad=True)
        >>> adj_t = sparse_csr(torch.tensor([0, 2, 3]), torch.tensor([2, 0, 1]), weights, (2, 3))
        >>> values_of(adj_t) is weights
        True
    """
    weights = weights_of(adj_t)
    return adj_t.values() if weights is None else weights


def weights_of(adj_t: Tensor) -> Tensor | None:
    """The weights with a history that a sparse CSR tensor was made of, where it was made here and not detached."""
    weights: Tensor | None = getattr(adj_t, _WEIGHTS, None) if adj_t.requires_grad else None
    return weights


class _Assembled(torch.autograd.Function):
    """A sparse CSR tensor of its values, whose gradient may be sparse, as theirs is, or dense, as that of ``@`` is.

    Torch adds gradients up by places: from a sum one cannot tell what belongs to which edge of several at a place.
    """

    @staticmethod
    @with_signature
    def forward(value: Tensor, rowptr: Tensor, col: Tensor, size: tuple[int, int]) -> Tensor:
        return _bare_csr(rowptr, col, value, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rowptr, col, ctx.size = inputs
        ctx.save_for_backward(rowptr, col)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rowptr, col = ctx.saved_tensors
        found = grad.col_indices() if grad.layout == torch.sparse_csr else None
        if found is not None and found.data_ptr() == col.data_ptr():  # no sum: torch makes new indices for one
            return grad.values(), None, None, None
        row = rows_of_entries(rowptr, col.numel())
        shared = torch.unique(row * ctx.size[1] + col).numel() < col.numel()
        if shared or not (grad.layout == torch.strided or (found is not None and torch.equal(found, col))):
            why = "nodes share several edges, whose weights" if shared else f"{described(grad)}, whose entries"
            raise RuntimeError(
                f"{why} torch's own operations do not tell apart in backward: call propagate(adj_t, x) instead of "
                "adj_t @ x, and adj_t.values() no more than once"
            )
        return grad.values() if grad.layout == torch.sparse_csr else grad[row, col], None, None, None


@functools.cache
def _hear_of_state() -> None:
    """Make a first sparse CSR tensor: torch tells each process once that they are in beta state, and unchecked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")  # torch 2.11
        with torch.device("cpu"):
            nothing = torch.zeros(0, dtype=torch.int64)
            torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int64), nothing, nothing, (0, 0), check_invariants=False)


def rows_of(adj_t: Tensor) -> Tensor:
    """The row of each entry of a sparse CSR tensor, [E] int64: the number of rows that end before it.

    Args:
        adj_t: sparse CSR [rows, columns].

    Returns:
        [E] int64, on its device.

    Example:
        >>> import torch
        >>> from recollect.messages import rows_of, sparse_csr
        >>> rows_of(sparse_csr(torch.tensor([0, 2, 2, 3]), torch.tensor([0, 2, 1]), torch.ones(3), (3, 3)))
        tensor([0, 0, 2])
    """
    return rows_of_entries(adj_t.crow_indices(), adj_t.col_indices().numel())


def rows_of_entries(rowptr: Tensor, number: int) -> Tensor:
    """The row of each of so many entries, [number] int64."""
    end = rowptr[1:]
    ends = torch.zeros(number + 1, dtype=torch.int64, device=end.device)
    ends.index_add_(0, end, torch.ones_like(end, dtype=torch.int64))
    return ends[:-1].cumsum_(0)


def row_pointers(row: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Where each row begins once entries are sorted by row, and where the last ends; the host waits for no device.

    (It does for ``bincount``, which looks for the largest number first.)

    Args:
        row: of each entry, [E], integers from 0 to below ``num_rows``, in any order.
        num_rows: R.
        dtype: of the result.

    Returns:
        [R + 1], on the device of ``row``.

    Example:
        >>> import torch
        >>> from recollect.messages import row_pointers
        >>> row_pointers(torch.tensor([0, 2, 0, 3]), 4, torch.int64)
        tensor([0, 2, 2, 3, 4])
    """
    rowptr = torch.zeros(num_rows + 1, dtype=dtype, device=row.device)
    rowptr[1:].index_add_(0, row, rowptr.new_ones(1).expand(row.numel()))
    return rowptr.cumsum_(0)


def make_adj_t(source: Tensor, target: Tensor, value: Tensor | None, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Sort edges by target, then source; equal edges stay apart, in their order.

    Args:
        source: of each edge [E], int64.
        target: of each edge [E], int64.
        value: of each edge [E]; ``None``: ones, float32.
        num_nodes: N.

    Returns:
        ``adj_t`` [num_nodes, num_nodes] with the values, or ones, and ``order`` [E]: entry ``k`` of ``adj_t`` is
        edge ``order[k]``.

    Example:
        >>> import torch
        >>> from recollect.messages import make_adj_t
        >>> source, target, weight = torch.tensor([2, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([5.0, 6.0, 7.0])
        >>> adj_t, order = make_adj_t(source, target, weight, 3)
        >>> adj_t.to_dense()
        tensor([[0., 7., 5.],
                [6., 0., 0.],
                [0., 0., 0.]])
        >>> torch.equal(adj_t.values(), weight[order])
        True
    """
    rowptr, col, order = _sorted(source, target, num_nodes)
    value = torch.ones(order.numel(), device=order.device) if value is None else value[order]
    return sparse_csr(rowptr, col, value, (num_nodes, num_nodes)), order


def narrow_adj_t(edge_index: Tensor, value: Tensor, num_nodes: int) -> Tensor:
    """The same adjacency, with 32-bit indices where they suffice: for one that is kept."""
    rowptr, col, order = _sorted(edge_index[0], edge_index[1], num_nodes)
    # Not taken from an adjacency with wide ones: its parts are views, which would keep it.
    dtype = torch.int32 if max(num_nodes, order.numel()) < 2**31 else torch.int64
    return sparse_csr(rowptr.to(dtype), col.to(dtype), value[order], (num_nodes, num_nodes))


def _sorted(source: Tensor, target: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.argsort(target * num_nodes + source, stable=True)
    return row_pointers(target, num_nodes, target.dtype), source[order], order


def described(value: Any) -> str:
    """Say what was given in the place of an adjacency or a graph.

    Args:
        value: what was given.

    Returns:
        Words for the message of an error.

    Example:
        >>> import torch
        >>> from recollect.messages import described
        >>> described(torch.eye(2)), described([0, 1])
        ('a tensor of layout torch.strided', 'a list')
    """
    return f"a tensor of layout {value.layout}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_csr(adj_t: Any) -> None:
    """Refuse what is not in sparse CSR form.

    Args:
        adj_t: anything.

    Raises:
        TypeError: it is no tensor in sparse CSR form.

    Example:
        >>> import torch
        >>> from recollect.messages import check_csr, make_adj_t
        >>> check_csr(make_adj_t(torch.tensor([0, 1]), torch.tensor([1, 0]), None, 2)[0])
        >>> try:
        ...     check_csr(torch.eye(2))
        ... except TypeError as error:
        ...     print(str(error).partition(",")[0])
        adj_t is a tensor of layout torch.strided
    """
    if not isinstance(adj_t, Tensor) or adj_t.layout != torch.sparse_csr:
        raise TypeError(
            f"adj_t is {described(adj_t)}, but must be a torch.sparse_csr tensor; to_adj_t(data).adj_t is one"
        )


def check_rows(adj_t: Tensor, x: Any) -> None:
    """Refuse what is not a row of numbers for each source, which kernels would read beyond its end."""
    num_sources = adj_t.size(1)
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        raise TypeError(f"x is {described(x)}, but must be a dense tensor [{num_sources}, channels]")
    if x.dim() != 2 or x.size(0) != num_sources:
        raise ValueError(
            f"x has shape {list(x.shape)}, but adj_t [{adj_t.size(0)}, {num_sources}] has {num_sources} sources: give "
            f"a row for each, [{num_sources}, channels]"
        )
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"x is of {x.dtype}, but must be floating point: write x.float()")


class Edges:
    """One state of an ``edge_index``, which is not held, and the adjacencies made of it.

    Attributes:
        num_nodes: N.
        num_targets: T: edges into other nodes than the first T are in no adjacency.
        state: what is another one when the ``edge_index`` is, as far as torch knows.
        inside: whether all its nodes are among the N.
    """

    def __init__(self, edge_index: Tensor, num_nodes: int, num_targets: int, inside: bool | None = None) -> None:
        self.num_nodes = num_nodes
        self.num_targets = num_targets
        self.state = state_of(edge_index)
        if inside is None:
            low, high = torch.stack(torch.aminmax(edge_index)).tolist()  # in one wait for a device
            inside = low >= 0 and high < num_nodes
        self.inside = inside
        self.adjacencies: dict[Hashable, Tensor] = {}

    def adj_t(self, kind: Hashable, make: Callable[[], Tensor], *, is_copy: bool = True) -> Tensor:
        """Return the adjacency of one kind, sparse CSR [T, N], which is made at the first call.

        Args:
            kind: what tells it from others of the same edges.
            make: returns it, [N, N] or [T, N].
            is_copy: whether nobody else has its parts, so that backward finds them as they are.
        """
        if kind not in self.adjacencies:
            with torch.inference_mode(False), torch.no_grad():  # backward will need it, whoever asks first
                adj_t = self.adjacencies[kind] = _first_rows(make(), self.num_targets)
            if is_copy:
                note_kept(adj_t)
        return self.adjacencies[kind]


# As long as an edge_index lives, what is known of it does.
_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def edges_of(edge_index: Tensor, num_nodes: int, num_targets: int | None = None) -> Edges:
    """Return what is known of the edges [2, E], int64, E at least 1.

    The first call for an ``edge_index`` reads it, which waits for its device; the later ones do not. Other numbers of
    nodes, or of the first of them that are targets (default: all), and a change in place make another graph of it; a
    change that torch does not count (through ``.data`` or NumPy) is not seen.
    """
    known: Edges | None = _KNOWN.get(edge_index, None)  # type: ignore[no-untyped-call]
    num_targets = num_nodes if num_targets is None else num_targets
    this = num_nodes, num_targets, state_of(edge_index)
    if known is None or (known.num_nodes, known.num_targets, known.state) != this:
        # Nodes that are among fewer are among more.
        fit = known is not None and known.inside and known.state == this[2] and known.num_nodes <= num_nodes
        known = Edges(edge_index, num_nodes, num_targets, inside=True if fit else None)
        _KNOWN[edge_index] = known
    return known


def known_edges(edge_index: Tensor) -> Edges | None:
    """Return what is known of the edges, if anything."""
    known: Edges | None = _KNOWN.get(edge_index, None)  # type: ignore[no-untyped-call]
    return known


def know_edges(edge_index: Tensor, edges: Edges) -> None:
    """Note what is known of the edges."""
    _KNOWN[edge_index] = edges


def _first_rows(adj_t: Tensor, number: int) -> Tensor:
    if adj_t.size(0) == number:
        return adj_t
    rowptr = adj_t.crow_indices()[: number + 1].clone()
    col, value = (each[: int(rowptr[-1])].clone() for each in (adj_t.col_indices(), adj_t.values()))
    return sparse_csr(rowptr, col, value, (number, adj_t.size(1)))


def version_of(tensor: Tensor) -> int:
    """Return what grows with each change in place that torch counts, of a sparse tensor's parts too.

    Args:
        tensor: any; those of inference mode have no such number, and stay at 0.

    Example:
        >>> import torch
        >>> from recollect.messages import make_adj_t, version_of
        >>> adj_t, _ = make_adj_t(torch.tensor([1, 0]), torch.tensor([0, 1]), None, 2)
        >>> before = version_of(adj_t)
        >>> _ = adj_t.values().mul_(2.0)
        >>> version_of(adj_t) > before
        True
    """
    return 0 if tensor.is_inference() else tensor._version


def state_of(edge_index: Tensor) -> tuple[int, int, torch.Size]:
    """Return what is another when a tensor of indices was changed, as far as torch knows."""
    return edge_index._version, edge_index.data_ptr(), edge_index.shape  # the last two: ``edge_index.data`` was set
