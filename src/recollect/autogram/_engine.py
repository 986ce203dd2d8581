"""The engine: from losses to the Gramian of their Jacobian."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autogram._capture import Recorder, watch
from recollect.autogram._independence import Independence
from recollect.autogram._losses import check_weighting, check_weights, checked_dim
from recollect.autogram._modules import check_modules, counted_parameters
from recollect.autogram._passes import Job, gramian_of_batch, gramian_of_rows
from recollect.autogram._plan import EntangledError, changed_layers
from recollect.autogram._recall import Known
from recollect.autogram._registry import Entry, Registry, Rule, Sharing
from recollect.autogram._walk import Graph, walk
from recollect.autogram.rules import RULES

__all__ = ["Engine", "register_rule"]

_REGISTRY = Registry(RULES)

# How many forms of graphs an engine remembers; one that has more looks again where the batch is.
_FORMS = 64


def register_rule(layer_type: type[nn.Module] | str, rule: Rule, sharing: Sharing | None = None) -> None:
    """Teach all engines a type of layer, in place of the exact but slower fallback.

    Args:
        layer_type: the type, or its full name ("package.module.Class").
        rule: ``rule(layer, inputs, grads) -> {parameter's name: factor}``.
        sharing: which inputs have a batch; None: all those of the first output's size in its batch dimension.

    Raises:
        ValueError: the type has a rule already.
    """
    _REGISTRY.register(layer_type, Entry(rule, sharing))


class Engine:
    """The Gramian G = J Jᵀ of the Jacobian of losses with respect to the parameters of modules, and never J itself.

    After Algorithm 3 of "Jacobian Descent for Multi-Objective Optimization" (arXiv 2406.16232), for any graph. Make the
    engine before the forward pass, once.

    Args:
        *modules: the modules whose parameters count, those that require a gradient when the Gramian is computed. None
            may contain another.
        batch_dim: the dimension of the losses in which they belong to the elements of a batch that the modules treat
            independently. One backward pass then gives all rows. This is checked in the first call, and again when the
            graph takes another form, or indices in it move the batch another way. Parameters behind which the elements
            lie in no regular order cost a backward pass for every loss, as all do with None, which asks for nothing.
        row_bytes: how many bytes of the losses' gradients may be held at once, where there are several backward passes.
            If they are more, passes are repeated.

    Raises:
        TypeError: something is no module.
        ValueError: there is no module, or one contains another.
    """

    def __init__(self, *modules: nn.Module, batch_dim: int | None = None, row_bytes: int = 2**28) -> None:
        check_modules(modules)
        self._modules = modules
        self._batch_dim = batch_dim
        self._row_bytes = row_bytes
        self._begin()

    def _begin(self) -> None:
        """Make what is no setting: what captures lead to, and what was found out about graphs."""
        self._recorder = Recorder(_REGISTRY, self._modules)
        self._known: dict[Any, Known] = {}
        weakref.finalize(self, watch(self._recorder))

    def __getstate__(self) -> dict[str, Any]:
        """Return the modules and the settings, for copies and pickles."""
        return {name: value for name, value in vars(self).items() if name not in ("_recorder", "_known")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be an engine of these modules, some of which may be whole only later, where they hold the engine."""
        vars(self).update(state)
        self._begin()

    def compute_gramian(self, output: Tensor, *, retain_graph: bool = True) -> Tensor:
        """Return the Gramian of the losses' gradients.

        Args:
            output: losses of any shape [m1, ..., mk], floating point.
            retain_graph: whether the graph must stay for a backward pass that follows; otherwise what it saved may be
                freed on the way, as an ordinary backward pass does.

        Returns:
            [m1, ..., mk, mk, ..., m1] in the output's dtype: entry [i1..ik, jk..j1] is the scalar product of the
            gradients of output[i1..ik] and output[j1..jk]. For a scalar it is the squared norm of its gradient.

        Raises:
            TypeError: the output is no tensor of floating point, or a parameter is complex.
            ValueError: it has no graph, or no batch dimension, or the elements of its batch are not independent.

        Warns:
            UserWarning: none of the parameters is in the output's graph; their Gramian is zero.
        """
        return self._gramian(output, retain_graph)

    def backward(self, losses: Tensor, weighting: Callable[[Tensor], Tensor]) -> Tensor:
        """Accumulate the gradient of the losses' sum, weighted by what their Gramian says.

        Args:
            losses: of any shape.
            weighting: from the Gramian to weights of the losses' shape.

        Returns:
            The weights.

        Raises:
            TypeError: ``weighting`` is a class, or cannot be called, or returns no tensor.
            ValueError: the weights have another shape than the losses.
        """
        check_weighting(weighting)
        weights = weighting(self._gramian(losses, True))
        check_weights(weights, losses)
        torch.autograd.backward(losses, weights.to(losses))
        return weights

    def _gramian(self, output: Tensor, retain: bool) -> Tensor:
        batch_dim = checked_dim(output, self._batch_dim)
        with torch.enable_grad():
            output = output.view_as(output) if output.is_leaf else output  # a parameter itself has no node before it
        parameters = counted_parameters(self._modules)
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            if output.numel() == 0:
                return output.new_zeros(*output.shape, *reversed(output.shape))
            if batch_dim is None or output.shape[batch_dim] == 1:
                return self._of_rows(output, parameters, retain).to(output.dtype)
            return self._of_batch(output, parameters, batch_dim, retain).to(output.dtype)

    def _of_rows(self, output: Tensor, parameters: Mapping[int, Tensor], retain: bool) -> Tensor:
        job = self._job(output, parameters, None, retain)
        return _generalise(gramian_of_rows(job), output, None)

    def _of_batch(self, output: Tensor, parameters: Mapping[int, Tensor], batch_dim: int, retain: bool) -> Tensor:
        # A hook on a parameter is made for one loss' gradient, not for those of a whole batch.
        by_rows = {key: p for key, p in parameters.items() if p._backward_hooks}
        independence = Independence(self._modules, batch_dim)
        while True:
            free = {key: p for key, p in parameters.items() if key not in by_rows}
            try:
                job = self._job(output, free, batch_dim, retain or bool(by_rows))
                gramian = _generalise(gramian_of_batch(job, batch_dim, independence), output, batch_dim)
                return gramian + self._of_rows(output, by_rows, retain) if by_rows else gramian
            except EntangledError as entangled:
                by_rows.update((key, parameters[key]) for key in entangled.parameters)

    def _job(self, output: Tensor, parameters: Mapping[int, Tensor], batch_dim: int | None, retain: bool) -> Job:
        graph = walk(output, self._recorder, parameters)
        if parameters and not graph.leaves:
            self._warn_if_apart(output)
        known, changed = self._recall(graph, batch_dim), changed_layers(graph)
        return Job(output, graph, parameters, self._recorder, known, changed, self._row_bytes, retain)

    def _warn_if_apart(self, output: Tensor) -> None:
        """Say so if the output depends on no parameter at all, and not only on none of those that a pass is for."""
        if not walk(output, self._recorder, counted_parameters(self._modules)).leaves:
            names = ", ".join(type(module).__name__ for module in self._modules)
            warnings.warn(
                f"the Gramian is zero: the losses depend on no trainable parameter of the engine's modules ({names}). "
                "Compute the losses with these modules, or make the engine of those that computed them",
                UserWarning,
                stacklevel=6,  # where the engine was called
            )

    def _recall(self, graph: Graph, batch_dim: int | None) -> Known:
        training = tuple(child.training for module in self._modules for child in module.modules())
        form = (graph.form, tuple(graph.leaves), training, batch_dim)
        known = self._known.get(form)
        if known is None:
            if len(self._known) >= _FORMS:
                self._known.clear()
            known = self._known[form] = Known()
        return known


def _generalise(square: Tensor, output: Tensor, batch_dim: int | None) -> Tensor:
    """Lay [m, m] out as [m1..mk, mk..m1]; with a batch, the rows come with its dimension last."""
    k = output.dim()
    order = list(range(k))
    if batch_dim is not None:
        order = [*(d for d in order if d != batch_dim), batch_dim]
    shape = [output.shape[d] for d in order]
    back = [order.index(d) for d in range(k)]
    laid = square.view([*shape, *shape]).permute([*back, *reversed([k + d for d in back])])
    return laid.contiguous()
