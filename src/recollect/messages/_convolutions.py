"""Convolutions of torch_geometric, by products with the adjacency, wherever they stand in a block."""

from __future__ import annotations

import os
import sys
import threading
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from recollect._devices import forms_of
from recollect._torch import is_recorded, saved_tensor_hooks, stands_in
from recollect.messages._adjacency import edges_of
from recollect.messages._recall import asks_again, recalled
from recollect.messages._rules import Rule, Sources, known

__all__ = ["convolve", "for_targets"]

Hooks = tuple[Any, Any] | None


def convolve(block: Any, *args: Any, **kwargs: Any) -> Any:
    """Return ``block(*args, **kwargs)``, its convolutions computed without a row for each edge where they allow it.

    ``block`` is a convolution, or any module with convolutions among its modules: behind a norm, several, nested. Those
    that allow it are torch_geometric's own SAGEConv, GraphConv, GCNConv and GINConv (no subclasses of them) where they
    sum, average, or on the CPU take the largest or smallest of the rows of the sources, and GATConv where it drops no
    attention, on a plain ``edge_index`` and without further arguments. All others are called as they are; so are
    convolutions that are compiled, that cache a graph of their own (``cached=True``), with a hook on them, in a
    checkpoint within the block or under explanation, and all under torch.func transforms and in what is compiled,
    traced or captured in a CUDA graph. Of these, torch_geometric's own that take self-loops out and put them in, or
    normalize weights, find what was made of the same ``edge_index`` before, where that is all that it is made of. The
    result is the same up to rounding. The edges are sorted once for an ``edge_index``, and what is made of it is kept
    as long as that lives and is not changed; changes that torch does not count, made through ``.data`` or NumPy, are
    not seen.

    Args:
        block: the convolution, or the block; any callable.
        *args: its arguments.
        **kwargs: its arguments by name.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import SAGEConv
        >>> from recollect.messages import convolve
        >>> conv = SAGEConv(4, 4)
        >>> x, edge_index = torch.randn(3, 4), torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> torch.allclose(convolve(conv, x, edge_index), conv(x, edge_index), atol=1e-6)
        True
    """
    with _by_products(block):
        return block(*args, **kwargs)


@contextmanager
def for_targets(number: int) -> Iterator[None]:
    """Let the convolutions in blocks that :func:`convolve` calls return rows for the first nodes alone.

    Those that are computed by products do; other ones of torch_geometric are given a pair, all rows and those of the
    first nodes, which not all take, and which must be edges into these alone. So a block either returns the first rows
    of what it returns otherwise, or it fails, or it returns others: whether it does the first is for the caller to see.

    Args:
        number: of these nodes.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import SAGEConv
        >>> from recollect.messages import convolve, for_targets
        >>> conv, x = SAGEConv(4, 4), torch.randn(3, 4)
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 0, 1]])  # into the first two nodes alone
        >>> with for_targets(2):
        ...     rows = convolve(conv, x, edge_index)
        >>> torch.allclose(rows, conv(x, edge_index)[:2], atol=1e-6)
        True
    """
    before, _RUNNING.targets = _RUNNING.targets, number
    try:
        yield
    finally:
        _RUNNING.targets = before


# Reaching the convolutions of a block.


class _Running(threading.local):
    """What blocks run in this thread.

    Attributes:
        convs: their convolutions, by id, and how many times.
        targets: how many nodes they return rows for; ``None``: all.
        hooks: the saved-tensor hooks around the innermost one.
    """

    def __init__(self) -> None:
        self.convs: Counter[int] = Counter()
        self.targets: int | None = None
        self.hooks: Hooks = None

    def is_in_checkpoint(self) -> bool:
        """Whether other hooks have come in the block: what runs under them runs again without the block around it."""
        now, then = saved_tensor_hooks(), self.hooks
        return now is not then and (now is None or then is None or now[0] is not then[0] or now[1] is not then[1])


_RUNNING = _Running()
_CHANGING = threading.Lock()
_HELD: Counter[int] = Counter()  # by id, how many blocks of all threads hold a convolution's ``forward``


@contextmanager
def _by_products(block: Any) -> Iterator[None]:
    """Compute the convolutions in a block by products, in this thread, until the end."""
    held: list[nn.Module] = []
    before, _RUNNING.hooks = _RUNNING.hooks, None if torch.compiler.is_compiling() else saved_tensor_hooks()
    try:
        for conv in _reached(block):
            if _hold(conv):
                held.append(conv)
        yield
    finally:
        _RUNNING.hooks = before
        for conv in held:
            _let_go(conv)


def _reached(block: Any) -> list[nn.Module]:
    """Return the convolutions among the modules of a block, but for those in what is compiled."""
    found: list[nn.Module] = []
    if "torch_geometric" not in sys.modules or not isinstance(block, nn.Module) or is_recorded():
        return found
    waiting, seen = [block], {id(block)}
    while waiting:
        module = waiting.pop()
        if module._compiled_call_impl is not None or type(module).__module__.startswith("torch._dynamo."):
            continue
        kind = type(module)
        if known(kind) is not None or asks_again(kind) or (_RUNNING.targets is not None and _passes_messages(module)):
            found.append(module)
        for child in module.children():
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return found


def _passes_messages(module: nn.Module) -> bool:
    """Whether a module is a convolution of torch_geometric, or of its kind."""
    return isinstance(module, sys.modules["torch_geometric.nn.conv"].MessagePassing)


def _hold(conv: nn.Module) -> bool:
    """Give a convolution the ``forward`` of this file; ``False`` where somebody gave it another."""
    own = vars(conv)
    with _CHANGING:
        if "forward" in own and not _is_ours(own["forward"]):
            _note_called(conv)
            return False
        if not _HELD[id(conv)]:
            own["forward"] = types.MethodType(forward, conv)
        _HELD[id(conv)] += 1
    _RUNNING.convs[id(conv)] += 1
    return True


def _let_go(conv: nn.Module) -> None:
    _RUNNING.convs[id(conv)] -= 1
    if not _RUNNING.convs[id(conv)]:
        del _RUNNING.convs[id(conv)]
    own = vars(conv)
    with _CHANGING:
        _HELD[id(conv)] -= 1
        if not _HELD[id(conv)]:
            del _HELD[id(conv)]
            if _is_ours(own.get("forward")):
                del own["forward"]


@stands_in
def forward(conv: Any, *args: Any, **kwargs: Any) -> Any:
    """What a convolution has as ``forward`` while a block runs that it is in.

    The class's own where it is not this thread's block, and in copies that were made meanwhile and so kept it. (Its
    name is that of a method, as pickle finds methods by name.)
    """
    if not torch.compiler.is_compiling() and id(conv) in _RUNNING.convs:
        if _RUNNING.is_in_checkpoint():
            out = type(conv).forward(conv, *args, **kwargs)
            return out if _RUNNING.targets is None else out[: _RUNNING.targets]
        given = _given(conv, *args, **kwargs)
        rule = None if given is None else _rule_of(conv, *given)
        if given is not None and rule is not None:
            x, edge_index = given
            edges = edges_of(edge_index, x.size(0), _RUNNING.targets)
            if edges.inside:  # the convolution says what is wrong
                return rule(conv, x, Sources(edges, edge_index))
        if _RUNNING.targets is not None and given is not None and _has_no_edges(given[1]):
            # Products are made for edges, and a convolution that goes by products elsewhere need not take a pair.
            out = type(conv).forward(conv, *args, **kwargs)
            return out[: _RUNNING.targets] if isinstance(out, Tensor) else out
        if _RUNNING.targets is not None and args and type(args[0]) is Tensor:
            args = ((args[0], args[0][: _RUNNING.targets]), *args[1:])
        if _can_recall(conv, *args, **kwargs):
            return recalled(conv)(*args, **kwargs)
    return type(conv).forward(conv, *args, **kwargs)


def _is_ours(method: Any) -> bool:
    return isinstance(method, types.MethodType) and method.__func__ is forward


def _given(conv: Any, x: Any = None, edge_index: Any = None, *further: Any, **options: Any) -> tuple[Any, Any] | None:
    """Return the two arguments of a convolution that is given no others, but for such that are ``None``."""
    if further or options:
        code = type(conv).forward.__code__
        names = code.co_varnames[3 : code.co_argcount]  # after self, x and edge_index
        if len(further) > len(names) or not options.keys() <= set(names[len(further) :]):
            return None  # the convolution says that it takes no such arguments
        if any(value is not None for value in (*further, *options.values())):
            return None
    return x, edge_index


# When they are.

# Convolutions that were called for what was on them: a backward pass that repeats the call must find it the same, even
# if that (a hook) was taken off in between.
_CALLED: WeakSet[nn.Module] = WeakSet()


def _note_called(conv: nn.Module) -> None:
    if torch.is_grad_enabled():
        _CALLED.add(conv)


def _rule_of(conv: Any, x: Any, edge_index: Any) -> Rule | None:
    """Return how a convolution, as it is set, is computed on these; ``None`` where it must be called."""
    found = known(type(conv))
    if found is None or conv in _CALLED or not isinstance(conv.aggr, str):
        return None
    if found.aggregations.get(conv.aggr) != type(conv.aggr_module).__name__:
        return None
    if not (_is_untouched(conv) and _is_untouched(conv.aggr_module)):
        _note_called(conv)
        return None
    cached = getattr(conv, "cached", False)  # goes by the first graph that it meets, whatever it is called with
    if conv.flow != "source_to_target" or conv.node_dim != found.node_dim or conv.explain or cached:
        return None
    if not found.allows(conv):
        return None
    if not _are_plain(x, edge_index) or (conv.aggr in ("max", "min") and not forms_of(x.device).reductions):
        return None
    return found.rule


_METHODS = frozenset(
    {"aggregate", "edge_update", "edge_updater", "forward", "message", "message_and_aggregate", "propagate", "update"}
)


# Those that torch_geometric writes, and does not make of others.
_WRITTEN = ("aggregate", "edge_update", "forward", "message", "message_and_aggregate", "update")


def _is_library(method: Any) -> bool:
    """Whether a method's code stands in torch_geometric's files, whatever it is called."""
    code = getattr(method, "__code__", None)
    folder = os.path.dirname(sys.modules["torch_geometric"].__file__ or "")
    return method is None or (code is not None and code.co_filename.startswith(folder + os.sep))


def _is_untouched(conv: nn.Module) -> bool:
    """Whether no hook and no method was put on this one or on its class, and it is not compiled."""
    if not all(_is_library(getattr(type(conv), name, None)) for name in _WRITTEN):
        return False
    own = vars(conv).copy()  # in one go: another thread may put its forward there
    methods = _METHODS.intersection(own)
    if any(not _is_ours(own[name]) for name in methods) or own.get("_compiled_call_impl") is not None:
        return False
    return not any(value for name, value in own.items() if name.endswith("_hooks"))


def _can_recall(conv: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a convolution may ask for what was made of its edges, and hands that to nobody."""
    if not asks_again(type(conv)) or is_recorded() or not _is_untouched(conv) or conv.explain:
        return False
    code = type(conv).forward.__code__
    given = dict(zip(code.co_varnames[1 : code.co_argcount], args, strict=False)) | kwargs
    return given.get("return_attention_weights") is None and not _is_captured()


def _is_captured() -> bool:
    """Whether a CUDA graph is captured: what is made then has no values."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _has_no_edges(edge_index: Any) -> bool:
    return isinstance(edge_index, Tensor) and edge_index.numel() == 0


def _are_plain(x: Any, edge_index: Any) -> bool:
    """Whether these are the tensors that products are made for, and not what will be run again with other numbers."""
    if is_recorded() or type(edge_index) is not Tensor or type(x) not in (Tensor, nn.Parameter):
        return False
    if edge_index.dtype != torch.int64 or edge_index.layout != torch.strided or edge_index.is_inference():
        return False
    if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.numel() == 0:
        return False
    if not forms_of(x.device).convolutions or (x.is_cuda and _is_captured()):
        return False
    return bool(x.dim() == 2 and x.is_floating_point() and x.device == edge_index.device)
