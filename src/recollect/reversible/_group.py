"""Grouped additive reversible layers over any graph network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from recollect._arguments import Certify
from recollect._parameters import reset_parameters
from recollect.frames import DRIFT_THRESHOLD, Lattice, check_exact, checkpoint, couple, digits_of, uncouple
from recollect.messages import convolve
from recollect.reversible._beside import Beside
from recollect.reversible._module import InvertibleModule

__all__ = ["GroupAddRev", "GroupRevRes"]


class _Grouped(InvertibleModule):
    """The coupling over ``self._blocks()``; subclasses say how a block is called.

    Args:
        blocks: f_1..f_C.
        split_dim: the dimension of ``x`` that holds the groups.
        chunk_args: which extra arguments are split over the groups, by position or name; ``None``: those that look like
            node features.
        exact: whether the stream is on a lattice.
        **options: of :class:`InvertibleModule`.
    """

    exact: bool | int = False  # modules that were pickled before there was such a stream have none

    def __init__(
        self,
        blocks: nn.ModuleList,
        split_dim: int,
        chunk_args: Sequence[int | str] | None,
        exact: bool | int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        _check_groups(len(blocks))
        self.exact = check_exact(exact)
        self.split_dim = split_dim
        self.chunk_args = None if chunk_args is None else frozenset(chunk_args)

    def _blocks(self) -> Sequence[Any]:
        raise NotImplementedError

    def _couple(
        self, x: Tensor, graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], beside: Beside | None = None
    ) -> Tensor:
        blocks = self._blocks()
        arguments, keywords = self._arguments(x, graph, args, kwargs, len(blocks))
        sources = None
        if beside is not None:
            blocks, arguments, sources = beside.put(blocks, arguments, x, self.split_dim)
        x = self._widened(x)
        self._forget_drift()
        try:
            y = couple(
                blocks,
                x,
                arguments,
                kwargs=keywords,
                dim=self.split_dim,
                gauge=self._gauge,
                anchor_every=self.anchor_every,
                enabled=not self.disable,
                certify=self.certify,
                certificate=self.certificate,
                exact=digits_of(self.exact, x.dtype),
                sources=sources,
            )
        except Exception as error:
            part, whole = x.size(self.split_dim) // len(blocks), x.size(self.split_dim)
            error.add_note(f"{type(self).__name__}: each of the {len(blocks)} blocks gets {part} of {whole} channels.")
            raise
        self._limit_passes(y)
        return y

    def _uncouple(self, y: Tensor, graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        blocks = self._blocks()
        arguments, keywords = self._arguments(y, graph, args, kwargs, len(blocks))
        y = self._widened(y)
        exact = digits_of(self.exact, y.dtype)
        return uncouple(blocks, y, arguments, kwargs=keywords, dim=self.split_dim, exact=exact)

    def inverse(self, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`_inverse`, trainable as :meth:`forward` is.

        Its input is kept: the blocks run in another order than in :meth:`forward`, and what they draw (dropout) could
        not be replayed through that.
        """
        run = functools.partial(self._inverse, **kwargs) if kwargs else self._inverse
        return run(*args) if self.disable else checkpoint(run, *args, certify=self.certify)

    def _arguments(
        self, x: Tensor, graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], groups: int
    ) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
        """Return what each block gets beside its group, by position and by keyword."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: x must be a tensor (got {type(x).__name__})")
        if not -x.dim() <= self.split_dim < x.dim():
            raise ValueError(f"{type(self).__name__}: split_dim={self.split_dim} of an x of shape {list(x.shape)}")
        channels = x.size(self.split_dim)
        if channels % groups != 0:
            low = channels - channels % groups
            nearest = [str(c) for c in (low, low + groups) if c > 0]
            raise ValueError(
                f"{type(self).__name__}: the size of x in dimension {self.split_dim} must be divisible by the number "
                f"of groups, {groups} (got {channels}); the nearest allowed: {' or '.join(nearest)}"
            )
        given: dict[int | str, Any] = dict(enumerate(args))
        given.update(kwargs)
        if self.chunk_args is not None and given and not self.chunk_args <= set(given):
            raise ValueError(
                f"{type(self).__name__}: chunk_args={sorted(self.chunk_args, key=str)} names positions (from 0) or "
                f"keywords that are not among the extra arguments {list(given)}"
            )
        split = {
            key: torch.chunk(arg, groups, self.split_dim) if self._is_chunked(key, arg, x) else (arg,) * groups
            for key, arg in given.items()
        }
        positional = [(graph, *(split[i][group] for i in range(len(args)))) for group in range(groups)]
        return positional, [{name: split[name][group] for name in kwargs} for group in range(groups)]

    def _is_chunked(self, key: int | str, arg: Any, x: Tensor) -> bool:
        if not isinstance(arg, Tensor):
            return False
        has_dim = -arg.dim() <= self.split_dim < arg.dim()
        if self.chunk_args is not None:
            if key in self.chunk_args and (not has_dim or arg.size(self.split_dim) % self.num_groups):
                raise ValueError(
                    f"{type(self).__name__}: argument {key!r} is to be split over {self.num_groups} groups in "
                    f"split_dim={self.split_dim}, which must exist and be divisible (got shape {list(arg.shape)})"
                )
            return key in self.chunk_args
        # Along the first dimension of an argument lie its nodes or edges, unless the groups lie there in x too.
        if not has_dim or (self.split_dim % arg.dim() == 0 and self.split_dim % x.dim() != 0):
            return False
        return arg.size(0) == x.size(0) and arg.size(self.split_dim) == x.size(self.split_dim)

    def block(self, group: int) -> Any:
        """Return block ``group``, counted from 0, as the layer calls it: with z, the graph, and what follows."""
        return self._blocks()[group]

    def add(self, group: int, x: Tensor, found: Tensor) -> Tensor:
        """Return x + f, of a group and the output of its block, as the layer adds them; without a gradient.

        Raises:
            LatticeError: the sum is out of range, with ``exact``.
        """
        digits = digits_of(self.exact, x.dtype)
        if digits is None:
            return x + found
        lattice = Lattice(digits)
        with torch.no_grad():
            (total,) = lattice(x, found)
        lattice.check(total, [total], [self.block(group)])
        return total

    @property
    def num_groups(self) -> int:
        """The number of groups C."""
        return len(self._blocks())

    def reset_parameters(self) -> None:
        """Draw all parameters anew, in blocks that can."""
        for block in self._blocks():
            reset_parameters(block.module if isinstance(block, _Called) else block)


def _check_module(name: str, module: Any, allowed: str, refused: tuple[type, ...] | type = ()) -> None:
    if not isinstance(module, nn.Module) or isinstance(module, refused):
        found = f"the class {module.__name__} itself" if isinstance(module, type) else f"a {type(module).__name__}"
        raise TypeError(f"{name} must be {allowed} (got {found})")


def _check_groups(number: int) -> None:
    if not isinstance(number, SupportsIndex):
        raise TypeError(f"the number of groups must be an integer (got {number!r})")
    if number < 2:
        raise ValueError(
            f"The number of groups should not be smaller than 2 (got {number}): a lone group has no other group to "
            "take its block's input from, and so no inverse"
        )


def _copies(module: nn.Module, number: int) -> nn.ModuleList:
    """Return ``module`` and copies of it with parameters of their own."""
    _check_groups(number)
    modules = nn.ModuleList([module])
    for _ in range(number - 1):
        duplicate = copy.deepcopy(module)
        reset_parameters(duplicate)
        modules.append(duplicate)
    return modules


class GroupAddRev(_Grouped):
    """The grouped reversible layer of "Training Graph Neural Networks with 1000 Layers" (arXiv 2106.07476, eq. 3, 4).

    Takes the place of ``torch_geometric.nn.GroupAddRev``. The input is never freed behind the caller's back, and the
    gradient is that of plain autograd, also with dropout or BatchNorm inside a block.

    Args:
        conv: a seed GNN ``conv(x, edge_index, *args)`` with equal input and output channels (those of one group), which
            is copied ``num_groups - 1`` times with parameters drawn anew; or a ``ModuleList`` with one for each group.
        split_dim: the dimension of ``x`` that is split into groups.
        num_groups: C, at least 2; needed for a single ``conv``.
        disable: run plain, keeping everything.
        num_bwd_passes: ``None`` for any number of backward passes; an integer is enforced.
        chunk_args: which extra arguments are split over the groups: positions among the positional ones (from 0), and
            names of keyword ones. By default those are split that look like node features: tensors with as many rows as
            ``x`` and its size in ``split_dim``.
        anchor_every: keep every s-th activation of a chain of layers; bounds drift.
        drift_threshold: relative reconstruction error above which a warning is given.
        certify: whether what backward rebuilds is compared with the forward: ``True`` allows for rounding, ``"exact"``
            takes equal bits alone, ``False`` compares nothing.
        fuse: compute blocks that are convolutions of torch_geometric without a row for each edge, where
            :func:`recollect.messages.convolve` can; the same up to rounding, in less time and memory. ``False``: call
            them as they are.
        exact: keep the stream on the multiples of 2^-k, so that it comes back bit for bit at any depth: k, or ``True``
            for 16 in float32 and 40 in float64. Values must stay below 2^(24-k), in float64 below 2^(53-k). Each block
            must then compute the same bits twice.

    Shapes:
        - ``x``: [num_nodes, C * channels]; output: the same. Under autocast x is widened to float32, or to the
          parameters' type if that is wider: a stream in half precision does not come back.

    Raises:
        TypeError: ``conv`` is no module, but a list or a class.
        ValueError: fewer than two groups, ``num_groups`` missing, channels not divisible by the groups, or a block
            whose output has another shape than its input.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import SAGEConv
        >>> from recollect.reversible import GroupAddRev
        >>> layer = GroupAddRev(SAGEConv(16, 16), num_groups=2)
        >>> x, edge_index = torch.randn(4, 32), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        >>> y = layer(x, edge_index)
        >>> torch.allclose(layer.inverse(y, edge_index), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        conv: nn.Module,
        split_dim: int = -1,
        num_groups: int | None = None,
        disable: bool = False,
        num_bwd_passes: int | None = None,
        *,
        chunk_args: Sequence[int | str] | None = None,
        anchor_every: int | None = None,
        drift_threshold: float = DRIFT_THRESHOLD,
        certify: Certify = True,
        fuse: bool = True,
        exact: bool | int = False,
    ) -> None:
        _check_module("conv", conv, "a module, or a torch.nn.ModuleList of one for each group")
        if isinstance(conv, nn.ModuleList):
            if num_groups is not None and num_groups != len(conv):
                raise ValueError(f"num_groups={num_groups}, but the ModuleList has {len(conv)} blocks; leave one out")
            convs = conv
        elif num_groups is None:
            raise ValueError(
                "num_groups is missing: a single conv is copied for each group, so say how many, e.g. num_groups=2"
            )
        else:
            convs = _copies(conv, num_groups)
        super().__init__(
            convs,
            split_dim,
            chunk_args,
            exact,
            disable=disable,
            num_bwd_passes=num_bwd_passes,
            anchor_every=anchor_every,
            drift_threshold=drift_threshold,
            certify=certify,
        )
        self.convs = convs
        self.fuse = fuse

    def forward(self, x: Tensor, edge_index: Any, *args: Any, beside: Beside | None = None, **kwargs: Any) -> Tensor:
        """Return the coupled features, of the shape of ``x``.

        Args:
            x: node features [num_nodes, C * channels].
            edge_index: the graph, in whatever form the blocks take.
            *args: further arguments of the blocks; see ``chunk_args``.
            beside: rows of further nodes, which the blocks see behind those of ``x`` and return nothing for. The graph,
                and arguments with a row for each node, are then of all these nodes.
            **kwargs: further arguments of the blocks by keyword; as ``args``.
        """
        return self._couple(x, edge_index, args, kwargs, beside)

    def _forward(self, x: Tensor, edge_index: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._couple(x, edge_index, args, kwargs)

    def _inverse(self, y: Tensor, edge_index: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._uncouple(y, edge_index, args, kwargs)

    def _blocks(self) -> Sequence[Any]:
        return [_Called(conv, convolve) for conv in self.convs] if self.fuse else list(self.convs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.convs[0]}, num_groups={self.num_groups})"


class _Called:
    """A module as a block ``f(z, graph, *args)``, which is called as ``how(module, z, graph, *args)``."""

    __slots__ = ("_how", "module", "owner")

    def __init__(self, module: nn.Module, how: Callable[..., Any]) -> None:
        self.module = module
        self.owner = module  # whom messages name
        self._how = how

    def __call__(self, z: Tensor, graph: Any, *args: Any, **kwargs: Any) -> Any:
        return self._how(functools.partial(self.module, **kwargs) if kwargs else self.module, z, graph, *args)


def _graph_first(module: Callable[..., Any], z: Tensor, graph: Any, *args: Any) -> Any:
    return module(graph, z, *args)


class GroupRevRes(_Grouped):
    """The same layer with DGL's calling convention: the graph comes first and is never looked at.

    Takes the place of ``dgl.nn.GroupRevRes``.

    Args:
        gnn_module: called as ``gnn_module(g, x, *args)``, with equal input and output sizes (those of one group); it is
            copied ``groups - 1`` times with parameters drawn anew.
        groups: C, at least 2.
        disable: run plain, keeping everything.
        num_bwd_passes: ``None`` for any number of backward passes; an integer is enforced.
        chunk_args: as in :class:`GroupAddRev`.
        anchor_every: as in :class:`GroupAddRev`.
        drift_threshold: as in :class:`GroupAddRev`.
        certify: as in :class:`GroupAddRev`.
        exact: as in :class:`GroupAddRev`.

    Shapes:
        - ``x``: [num_nodes, groups * channels]; output: the same.

    Raises:
        TypeError: ``gnn_module`` is not one module.
        ValueError: as :class:`GroupAddRev`.

    Example:
        >>> import torch
        >>> from recollect.reversible import GroupRevRes
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(4, 4)
        ...     def forward(self, g, x):
        ...         return self.linear(x).relu()
        >>> layer, graph = GroupRevRes(Block(), groups=2), None  # a graph of DGL
        >>> x = torch.randn(5, 8)
        >>> y = layer(graph, x)
        >>> torch.allclose(layer.inverse(graph, y), x, atol=1e-6)
        True
    """

    def __init__(
        self,
        gnn_module: nn.Module,
        groups: int = 2,
        disable: bool = False,
        num_bwd_passes: int | None = None,
        *,
        chunk_args: Sequence[int | str] | None = None,
        anchor_every: int | None = None,
        drift_threshold: float = DRIFT_THRESHOLD,
        certify: Certify = True,
        exact: bool | int = False,
    ) -> None:
        _check_module("gnn_module", gnn_module, "one module, of which each group gets a copy", nn.ModuleList)
        modules = _copies(gnn_module, groups)
        super().__init__(
            modules,
            -1,
            chunk_args,
            exact,
            disable=disable,
            num_bwd_passes=num_bwd_passes,
            anchor_every=anchor_every,
            drift_threshold=drift_threshold,
            certify=certify,
        )
        self.gnn_modules = modules

    def forward(self, g: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the coupled features, of the shape of ``x``.

        Args:
            g: any graph object.
            x: node features [num_nodes, groups * channels].
            *args: further arguments of the modules.
            **kwargs: further arguments of the modules by keyword.
        """
        return self._couple(x, g, args, kwargs)

    def inverse(self, g: Any, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``x`` of ``y = forward(g, x, *args)``, trainable as :meth:`forward` is."""
        output: Tensor = super().inverse(y, g, *args, **kwargs)
        return output

    def _forward(self, x: Tensor, g: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._couple(x, g, args, kwargs)

    def _inverse(self, y: Tensor, g: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._uncouple(y, g, args, kwargs)

    def _blocks(self) -> Sequence[Any]:
        return [_Called(module, _graph_first) for module in self.gnn_modules]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.gnn_modules[0]}, groups={self.num_groups})"
