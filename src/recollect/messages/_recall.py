"""What convolutions of torch_geometric make of the edges alone, made once for an ``edge_index``.

Self-loops are taken out by a mask, which waits for the device, and put in, and weights are normalized, at each call and
in each layer. The functions that do so are asked with the edges and plain settings alone, and have no randomness: a
convolution's own ``forward`` runs here with such functions that remember what they returned. So nothing else changes,
neither the order of the edges nor what is drawn for them.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recollect._storages import note_kept, storages_within
from recollect.messages._adjacency import state_of

__all__ = ["asks_again", "recalled"]

Function = Callable[..., Any]

# By the names of the files that they stand in.
_FUNCTIONS = {
    "add_remaining_self_loops": "torch_geometric.utils.loop",
    "add_self_loops": "torch_geometric.utils.loop",
    "gcn_norm": "torch_geometric.nn.conv.gcn_conv",
    "remove_self_loops": "torch_geometric.utils.loop",
}
# A method of edges and settings: it is asked by ``self``, of which it takes nothing.
_METHODS = {"torch_geometric.nn.conv.cheb_conv.ChebConv": "__norm__"}
_PLAIN = (type(None), bool, int, float, str, torch.dtype)

# As long as an edge_index lives: its state, and by function and settings what came back, with its state then.
_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


_ASKING: dict[type, bool] = {}  # torch_geometric's own classes


def asks_again(kind: type) -> bool:
    """Return whether a class is one of torch_geometric's convolutions that asks one of these functions."""
    if not kind.__module__.startswith("torch_geometric.nn.conv."):
        return False
    if kind not in _ASKING:
        forward = vars(kind).get("forward")
        asks = isinstance(forward, types.FunctionType) and (_method_of(kind) is not None or bool(_asked(forward)))
        _ASKING[kind] = asks
    return _ASKING[kind]


def recalled(conv: Any) -> Function:
    """Return the ``forward`` of a convolution's class for it, with functions that remember what they returned.

    Neither the class nor the convolution is changed: whoever calls it elsewhere, at the same time too, finds them as
    they were.
    """
    kind = type(conv)
    forward, name = kind.forward, _method_of(kind)
    if name is not None:
        if name in vars(conv) or not _is_of(getattr(kind, name), kind.__module__, f"{kind.__qualname__}.{name}"):
            return types.MethodType(forward, conv)
        other = object.__new__(kind)  # the same parameters and modules, and another method
        vars(other).update(vars(conv))
        vars(other)[name] = _remembering(functools.partial(getattr(kind, name), conv), name)
        return types.MethodType(forward, other)
    # Made at each call of what the file has now: a function that somebody put there instead is called as it is.
    named = {
        **forward.__globals__,
        **{each: _remembering(function, each) for each, function in _asked(forward).items()},
    }
    copied = types.FunctionType(forward.__code__, named, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(copied, conv)


def _method_of(kind: type) -> str | None:
    return _METHODS.get(f"{kind.__module__}.{kind.__qualname__}")


def _asked(forward: types.FunctionType) -> Mapping[str, Any]:
    """Return torch_geometric's own functions of edges that a method asks by these names."""
    found = {name: forward.__globals__.get(name) for name in forward.__code__.co_names if name in _FUNCTIONS}
    return {name: function for name, function in found.items() if _is_of(function, _FUNCTIONS[name], name)}


def _is_of(function: Any, module: str, name: str) -> bool:
    """Whether a function's code was written by this name in this file, whatever the function says of itself."""
    file = sys.modules.get(module)
    return (
        isinstance(function, types.FunctionType)
        and function.__globals__ is getattr(file, "__dict__", None)
        and function.__code__.co_qualname == name
    )


def _remembering(function: Function, name: str) -> Function:
    """Return a function that calls another where it is given more than edges and settings, or did not see them yet."""

    def ask(edge_index: Any, *args: Any, **kwargs: Any) -> Any:
        if not _are_edges(edge_index) or not all(type(each) in _PLAIN for each in (*args, *kwargs.values())):
            return function(edge_index, *args, **kwargs)
        settings = name, repr((args, kwargs))
        known = _KNOWN.get(edge_index, None)  # type: ignore[no-untyped-call]
        state = state_of(edge_index)
        if known is None or known[0] != state:
            known = _KNOWN[edge_index] = (state, {})
        then = known[1].get(settings)
        if then is None or any(each is not None and state_of(each) != was for each, was in zip(*then, strict=True)):
            with torch.inference_mode(False), torch.no_grad():  # backward will need it, whoever asks first
                out = function(edge_index, *args, **kwargs)
            if _are_own(out, edge_index):
                known[1][settings] = out, [None if each is None else state_of(each) for each in out]
                for each in out:
                    if each is not None:
                        note_kept(each)
            return out
        return then[0]

    return ask


def _are_edges(edge_index: Any) -> bool:
    plain = type(edge_index) is Tensor and edge_index.dtype == torch.int64 and edge_index.layout == torch.strided
    return plain and not edge_index.is_inference()


def _are_own(out: Any, edge_index: Tensor) -> bool:
    """Whether all that came back are tensors that share nothing with the edges, which would keep those."""
    if type(out) is not tuple or not all(each is None or type(each) is Tensor for each in out):
        return False
    taken = edge_index.untyped_storage()._cdata
    return all(storage._cdata != taken for storage in storages_within(out))
