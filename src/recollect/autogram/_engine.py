"""The engine: from losses to the Gramian of their Jacobian."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autogram._capture import Hook, Recorder, can_record
from recollect.autogram._choice import BatchDim, Choice, choose
from recollect.autogram._independence import check_independence, explain
from recollect.autogram._losses import check_weighting, check_weights, checked_dim
from recollect.autogram._modules import check_modules, counted_parameters
from recollect.autogram._passes import Job, Known, gramian_of
from recollect.autogram._plan import changed_layers
from recollect.autogram._registry import Entry, Registry, Rule, Sharing
from recollect.autogram._structure import find_structure
from recollect.autogram._walk import Graph, walk
from recollect.autogram.rules import RULES

__all__ = ["Engine", "register_rule"]

_REGISTRY = Registry(RULES)

# How many forms of graphs an engine remembers; one that has more looks again where the batch is.
_FORMS = 64


def register_rule(
    layer_type: type[nn.Module] | str, rule: Rule, sharing: Sharing | None = None, constant: Iterable[str] = ()
) -> None:
    """Teach all engines a type of layer, in place of the exact but slower fallback.

    Args:
        layer_type: the type, or its full name ("package.module.Class").
        rule: ``rule(layer, inputs, grads) -> {parameter's name: factor}``.
        sharing: along which axes the layer's elements are independent; None: it is not known, and where losses are
            apart in the layer's output, the rule gets its gradient masked for each of them.
        constant: names of parameters whose Jacobian does not depend on the inputs' values, as that of a bias. Where no
            others are trained, the inputs are not kept.

    Raises:
        ValueError: the type has a rule already.
    """
    _REGISTRY.register(layer_type, Entry(rule, sharing, frozenset(constant)))


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

    def __init__(self, *modules: nn.Module, batch_dim: BatchDim = "auto", row_bytes: int = 2**28) -> None:
        check_modules(modules)
        self._modules = modules
        self._batch_dim = batch_dim
        self._row_bytes = row_bytes
        self._recorder = Recorder(_REGISTRY)
        self._known: dict[Any, Known] = {}
        hook = Hook(self._recorder)
        for layer in dict.fromkeys(layer for module in modules for layer in module.modules() if can_record(layer)):
            weakref.finalize(self, layer.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)

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

    def explain(self, output: Tensor) -> str:
        """Return which backward passes the Gramian of these losses takes, and which parameters go by rows, and why.

        Args:
            output: losses of any shape; their graph stays.

        Raises:
            TypeError: the output is no tensor of floating point, or a parameter is complex.
            ValueError: it has no graph, or no batch dimension, or the elements of its batch are not independent.
        """
        job, _ = self._job(output, True)
        return explain(job.graph, self._choose(job), self._modules)

    def _gramian(self, output: Tensor, retain: bool) -> Tensor:
        checked_dim(output, self._batch_dim)
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            if output.numel() == 0:
                return output.new_zeros(*output.shape, *reversed(output.shape))
            while True:
                job, output = self._job(output, retain)
                result = gramian_of(job, self._choose(job))
                if isinstance(result, Tensor):
                    job.known.settled = True
                    return _generalise(result, output).to(output.dtype)
                job.known.declined |= result

    def _job(self, output: Tensor, retain: bool) -> tuple[Job, Tensor]:
        checked_dim(output, self._batch_dim)
        with torch.enable_grad():
            output = output.view_as(output) if output.is_leaf else output  # a parameter itself has no node before it
        parameters = counted_parameters(self._modules)
        graph = walk(output, self._recorder, parameters)
        if parameters and not graph.leaves:
            self._warn_that_it_is_zero()
        known = self._recall(graph)
        declined = known.declined | changed_layers(graph)
        return Job(output, graph, parameters, self._recorder, known, declined, self._row_bytes, retain), output

    def _choose(self, job: Job) -> Choice:
        """Return the passes, as they were chosen for a graph of this form."""
        batch_dim = checked_dim(job.output, self._batch_dim)
        hooked = frozenset(key for key in job.graph.uses if job.parameters[key]._backward_hooks)
        key = (frozenset(job.declined), hooked)
        choice = job.known.choices.get(key)
        if choice is None:
            structure = find_structure(job.graph, job.output.shape)
            bound = self._row_bytes // job.dtype.itemsize
            choice = choose(job.graph, job.parameters, job.declined, structure, batch_dim, bound)
            if isinstance(batch_dim, int):
                check_independence(job.graph, choice, self._modules, batch_dim)
            job.known.choices[key] = choice
        return choice

    def _warn_that_it_is_zero(self) -> None:
        names = ", ".join(type(module).__name__ for module in self._modules)
        warnings.warn(
            f"the Gramian is zero: the losses depend on no trainable parameter of the engine's modules ({names}). "
            "Compute the losses with these modules, or make the engine of those that computed them",
            UserWarning,
            stacklevel=5,  # where the engine was called
        )

    def _recall(self, graph: Graph) -> Known:
        training = tuple(child.training for module in self._modules for child in module.modules())
        form = (graph.form, training)
        known = self._known.get(form)
        if known is None:
            if len(self._known) >= _FORMS:
                self._known.clear()
            known = self._known[form] = Known()
        return known


def _generalise(square: Tensor, output: Tensor) -> Tensor:
    """Lay [m, m] out as [m1..mk, mk..m1]."""
    k = output.dim()
    laid = square.view([*output.shape, *output.shape])
    return laid.permute([*range(k), *reversed(range(k, 2 * k))]).contiguous()
