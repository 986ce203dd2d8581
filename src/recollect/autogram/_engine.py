"""The engine: from losses to the Gramian of their Jacobian."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recollect.autogram._capture import Recorder, watch
from recollect.autogram._independence import Independence
from recollect.autogram._losses import as_square, check_overflow, check_weighting, check_weights, checked_dim, joined
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

    It puts nothing on the modules, which are copied, saved, traced, scripted, exported and compiled as if there were no
    engine. Copies and pickles of an engine are engines of the copies of its modules, also where a module holds its
    engine.

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

    Example:
        >>> import copy, torch
        >>> from recollect.autogram import Engine
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> engine = Engine(model, batch_dim=0)
        >>> losses = model(torch.randn(5, 4)).square().sum(1)  # [5]
        >>> engine.compute_gramian(losses).shape
        torch.Size([5, 5])
        >>> twin, its_engine = copy.deepcopy((model, engine))
        >>> its_engine.compute_gramian(twin(torch.randn(5, 4)).square().sum(1)).shape
        torch.Size([5, 5])
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

    def compute_gramian(
        self, output: Tensor | Sequence[Tensor], *, flat: bool = False, retain_graph: bool = True
    ) -> Tensor:
        """Return the Gramian of the losses' gradients.

        Args:
            output: losses of any shape [m1, ..., mk], floating point; or a list or tuple of losses, whatever the shape
                of each, of one dtype and on one device: they count as one vector [m], each flattened, one behind the
                other.
            flat: whether a Gramian [m, m] of the losses ``output.flatten()`` is wanted in place of the generalised one.
                That of a list, or of a vector, is [m, m] anyway.
            retain_graph: whether the graph must stay for a backward pass that follows; otherwise what it saved may be
                freed on the way, as an ordinary backward pass does.

        Returns:
            [m1, ..., mk, mk, ..., m1] in the output's dtype: entry [i1..ik, jk..j1] is the scalar product of the
            gradients of output[i1..ik] and output[j1..jk]. For a scalar it is the squared norm of its gradient. If
            flat, and for a list: [m, m].

        Raises:
            TypeError: the output is no tensor of floating point, or a list of several dtypes, or a parameter is
                complex.
            ValueError: it has no graph, or no batch dimension, or the elements of its batch are not independent; or a
                list is empty, or on several devices.

        Warns:
            UserWarning: none of the parameters is in the output's graph; their Gramian is zero.

        Example:
            >>> import torch
            >>> from recollect.autogram import Engine
            >>> model = torch.nn.Linear(4, 3)
            >>> engine = Engine(model)
            >>> outputs = model(torch.randn(5, 4))
            >>> engine.compute_gramian(outputs).shape
            torch.Size([5, 3, 3, 5])
            >>> engine.compute_gramian(outputs, flat=True).shape
            torch.Size([15, 15])
            >>> engine.compute_gramian([outputs.square().mean(), outputs[:, 0]]).shape  # a loss, and five
            torch.Size([6, 6])
        """
        losses = joined(output)
        gramian = self._gramian(losses, retain_graph)
        return as_square(gramian, losses.dim()) if flat else gramian

    def backward(
        self,
        losses: Tensor | Sequence[Tensor],
        weighting: Callable[[Tensor], Tensor],
        *,
        on_overflow: Literal["raise", "pass"] = "raise",
    ) -> Tensor:
        """Accumulate the gradient of the losses' sum, weighted by what their Gramian says.

        Args:
            losses: of any shape, or a list or tuple of losses, as in :meth:`compute_gramian`.
            weighting: from the Gramian to weights of the losses' shape; for a list, from [m, m] to [m].
            on_overflow: what becomes of a Gramian that is not finite, as happens where losses are scaled for float16.
                ``"raise"``: the weighting is called with it, and those of :mod:`recollect.aggregation` raise a
                ValueError. ``"pass"``: the weighting is not called, the weights are NaN, and so the gradients are not
                finite: ``torch.amp.GradScaler`` sees that, skips the step and lowers its scale. Give it only where
                something looks at the gradients before they are used.

        Returns:
            The weights.

        Raises:
            TypeError: ``weighting`` is a class, or cannot be called, or returns no tensor.
            ValueError: the weights have another shape than the losses, or ``on_overflow`` is none of the two.

        Example:
            >>> import torch
            >>> from recollect.aggregation import UPGradWeighting
            >>> from recollect.autogram import Engine
            >>> model = torch.nn.Linear(4, 3)
            >>> engine = Engine(model)
            >>> outputs = model(torch.randn(5, 4))
            >>> weights = engine.backward([outputs.square().mean(), outputs.sin().mean()], UPGradWeighting())
            >>> weights.shape, model.weight.grad.shape
            (torch.Size([2]), torch.Size([3, 4]))

            Under a GradScaler, which is allowed to find overflow:

            >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
            >>> scaler = torch.amp.GradScaler("cpu")
            >>> losses = model(torch.randn(5, 4)).square().mean(1)
            >>> weights = engine.backward(scaler.scale(losses), UPGradWeighting(), on_overflow="pass")
            >>> scaler.step(optimizer)
            >>> scaler.update()
        """
        check_weighting(weighting)
        check_overflow(on_overflow)
        vector = joined(losses)
        gramian = self._gramian(vector, True)
        if on_overflow == "pass" and not bool(gramian.isfinite().all()):
            weights = torch.full_like(vector, torch.nan, requires_grad=False)
        else:
            weights = weighting(gramian)
            check_weights(weights, vector)
        torch.autograd.backward(vector, weights.to(vector))
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
