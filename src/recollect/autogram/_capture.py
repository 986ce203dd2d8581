"""What the forward pass leaves behind for the Gramian: a node in the graph behind each layer that has a rule.

The node keeps the layer's inputs the way autograd keeps them, so what hooks on saved tensors do to the graph, a frame
above all, they do to these too. It leads to a leaf of the engine's own: differentiating with respect to that leaf makes
autograd visit all these nodes, and compute gradients of inputs on the way, and none of weights.

Nothing is put on a module: one hook for the process looks up who watches it. So models are copied, saved, traced and
scripted as if there were no engine.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from recollect._torch import is_in_transform, is_recorded, outputs_come_first_hand, unwatch_outputs, watch_outputs
from recollect.autogram._factors import NotCovered
from recollect.autogram._operations import declare, handed_on
from recollect.autogram._registry import Entry, Registry

__all__ = ["Call", "Capture", "Recorder", "positional", "tensors_among", "watch"]

Visit = Callable[[Any, tuple[Tensor | None, ...]], None]

_TENSOR = object()  # stands where a tensor was

_RECORDERS: dict[int, Recorder] = {}  # those of all engines that live, by their ids
_lock = threading.RLock()  # an engine's end may come at any moment, also inside


class Call:
    """One call of a layer, without its tensors.

    Attributes:
        layer: the layer.
        entry: its rule.
        sources: the graph's nodes that the inputs come from; the layer's own part of the graph ends there.
        elements: of inputs and outputs together.
        shapes: of the tensors among the inputs.
        stand_ins: tensors of the inputs' forms with one element each, where no values of theirs are kept.
        has_output: whether the first output is kept too.
    """

    __slots__ = (
        "_condition",
        "_constants",
        "_spec",
        "elements",
        "entry",
        "has_output",
        "layer",
        "shapes",
        "sources",
        "stand_ins",
    )

    def __init__(self, layer: nn.Module, entry: Entry, inputs: tuple[Any, ...], tensors: list[Tensor]) -> None:
        self.layer = layer
        self.entry = entry
        self.sources = tuple(t.grad_fn for t in tensors if t.grad_fn is not None)
        self.elements = sum(t.numel() for t in tensors)
        self.shapes = tuple(t.shape for t in tensors)
        self._condition = _condition(layer)
        self._constants: list[Any] | None = None
        self._spec: TreeSpec | None = None
        self.stand_ins: tuple[Tensor, ...] | None = None
        self.has_output = False
        if not (len(inputs) == 1 and isinstance(inputs[0], Tensor)):
            leaves, self._spec = tree_flatten(inputs)
            self._constants = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def has_changed(self) -> bool:
        """Whether the layer was set to training or evaluation since, or a tensor of its was replaced or written to."""
        return _condition(self.layer) != self._condition

    def kept(self, node: Any) -> tuple[tuple[Any, ...], Tensor | None]:
        """Return the layer's arguments, with the tensors that the capture's node has kept, and the output if it is.

        Raises:
            NotCovered: a tensor was changed in place behind the layer, as it may be where autograd has no need of it.
        """
        try:
            tensors: tuple[Tensor, ...] = self.stand_ins or node.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise NotCovered(f"an input of {type(self.layer).__name__} was changed in place") from error
        if not self.has_output:
            return self.arguments(tensors), None
        return self.arguments(tensors[:-1]), tensors[-1]

    def arguments(self, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Return the layer's arguments with these tensors."""
        if self._constants is None or self._spec is None:
            return tensors
        waiting = iter(tensors)
        leaves = [next(waiting) if constant is _TENSOR else constant for constant in self._constants]
        arguments: tuple[Any, ...] = tree_unflatten(leaves, self._spec)
        return arguments


class Capture(torch.autograd.Function):
    """Hands a layer's outputs on, and in a Gramian's backward pass shows their gradients to the engine."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, recorder: Recorder, call: Call, inputs: list[Tensor], *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Keep the inputs and return the outputs."""
        ctx.recorder = recorder
        ctx.call = call
        ctx.set_materialize_grads(False)
        handed = tuple(output.detach() for output in outputs)
        ctx.save_for_backward(*[tensor.detach() for tensor in inputs], *handed[: int(call.has_output)])
        return handed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Show the gradients to whoever looks for them, and hand them on."""
        visit = ctx.recorder.visit
        if visit is not None:
            visit(ctx, grads)
        return None, None, None, None, *grads


declare(Capture, handed_on)


class Recorder:
    """Puts a :class:`Capture` behind the outputs of each layer that is called.

    Args:
        registry: the rules.
        modules: those whose layers it watches, submodules included; not kept alive.

    Attributes:
        leaf: what all captures lead to.
        visit: called with each capture's node and its outputs' gradients while a Gramian is computed.
    """

    def __init__(self, registry: Registry, modules: Sequence[nn.Module]) -> None:
        self.leaf = torch.zeros((), requires_grad=True, device="cpu")
        self.visit: Visit | None = None
        self._registry = registry
        self._modules = [weakref.ref(module) for module in modules]
        self._layers = self._find_layers()

    def watches(self, layer: nn.Module) -> bool:
        """Whether a layer is among those of the modules when this was made, or, in a file's copy, once it was whole."""
        if self._layers is None:
            self._layers = self._find_layers()
        found = None if self._layers is None else self._layers.get(id(layer))
        return found is not None and found() is layer  # else: another one in its place

    def _find_layers(self) -> dict[int, weakref.ref[nn.Module]] | None:
        """Return all layers that may have a rule, by their ids; None while a module is still being unpickled."""
        waiting = [module for reference in self._modules if (module := reference()) is not None]
        seen: dict[int, nn.Module] = {}
        while waiting:
            module = waiting.pop()
            if id(module) in seen or isinstance(module, torch.jit.ScriptModule):  # compiled: calls no layers here
                continue
            if "_modules" not in vars(module):
                return None
            seen[id(module)] = module
            waiting.extend(child for child in module._modules.values() if child is not None)
        return {key: weakref.ref(module) for key, module in seen.items() if module._parameters}

    def record(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output as it is to go on, or None where it may stay as it is: where no rule takes the call."""
        entry = self._registry.find(type(layer))
        if entry is None or "forward" in layer.__dict__:
            return None
        parameters = {k: p for k, p in layer._parameters.items() if p is not None and p.requires_grad}
        inputs = positional(layer, args, kwargs) if kwargs else args
        tensors = tensors_among(inputs)
        if not parameters or tensors is None or any(t is p for t in tensors for p in parameters.values()):
            return None  # a use as input: the graph cannot tell it from the layer's own
        call = Call(layer, entry, inputs, tensors)
        kept = [] if entry.constant.issuperset(parameters) else tensors
        if not kept:
            call.stand_ins = tuple(tensor.new_zeros(()).expand(tensor.shape) for tensor in tensors)
        if type(output) is Tensor:
            if not output.requires_grad or output.is_nested:
                return None
            call.elements += output.numel()
            return Capture.apply(self.leaf, self, call, kept, output)[0]  # type: ignore[no-untyped-call]
        return self._record_several(call, kept, output)

    def _record_several(self, call: Call, tensors: list[Tensor], output: Any) -> Any:
        leaves, spec = tree_flatten(output)
        places = [k for k, leaf in enumerate(leaves) if leaf is not None]
        outputs = [leaves[k] for k in places]
        if not outputs or not all(type(leaf) is Tensor and leaf.requires_grad for leaf in outputs):
            return None
        call.elements += sum(leaf.numel() for leaf in outputs)
        call.has_output = call.entry.has_output is not None and call.entry.has_output(outputs[0])
        captured = Capture.apply(self.leaf, self, call, tensors, *outputs)  # type: ignore[no-untyped-call]
        for k, tensor in zip(places, captured, strict=True):
            leaves[k] = tensor
        return tree_unflatten(leaves, spec)


def watch(recorder: Recorder) -> Callable[[], None]:
    """Let a recorder see what its layers return; what this returns ends it."""
    with _lock:
        _RECORDERS[id(recorder)] = recorder
        watch_outputs(_capture)

    def end() -> None:
        with _lock:
            _RECORDERS.pop(id(recorder), None)
            if not _RECORDERS:
                unwatch_outputs()

    return end


def _capture(layer: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
    """Return a layer's output with the captures of all who watch it; None where it may stay as it is."""
    if torch.compiler.is_compiling() or len(rest) < 2:  # the latter: without kwargs, as the last engine has just gone
        return None
    kwargs, output = rest
    changed = None
    for recorder in list(_RECORDERS.values()):
        if recorder.watches(layer) and _is_plain():
            captured = recorder.record(layer, args, kwargs, output if changed is None else changed)
            changed = changed if captured is None else captured
    return changed


def _is_plain() -> bool:
    """Whether a graph is recorded here by autograd and nobody else, and outputs are what the layers returned."""
    return torch.is_grad_enabled() and not is_recorded() and not is_in_transform() and outputs_come_first_hand()


def _condition(layer: nn.Module) -> tuple[Any, ...]:
    """Return what changes when a layer is set to training or another ``eps``, or a tensor of its is another.

    torch.func.functional_call, for one, replaces parameters for a call. A parameter that counts lives as long as the
    graph, so that no other has its id.
    """
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    versions = [None if tensor is None else (id(tensor), tensor._version) for tensor in tensors]
    return ([value for value in layer.__dict__.values() if type(value) in _PLAIN], versions)


_PLAIN = frozenset((bool, int, float, str, tuple))


def positional(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return all arguments of a call in the order of the layer's forward, with its defaults."""
    bound = inspect.signature(layer.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def tensors_among(inputs: tuple[Any, ...]) -> list[Tensor] | None:
    """Return the tensors among the arguments, or None if one is of a kind that no rule knows."""
    leaves = inputs if len(inputs) == 1 else tree_flatten(inputs)[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(type(leaf) not in (Tensor, nn.Parameter) or leaf.is_nested for leaf in tensors):
        return None
    return None if len(inputs) == 1 and not tensors else tensors
