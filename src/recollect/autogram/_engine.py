"""The engine: from losses to the Gramian of their Jacobian."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recollect.autogram._capture import Recorder, watch
from recollect.autogram._certificate import (
    Certificate,
    CrossProbe,
    GramianProbe,
    NormProbe,
    probe_cross,
    probe_gramian,
    probe_norms,
    squared_norm,
)
from recollect.autogram._checks import (
    check_modules,
    check_overflow,
    check_settings,
    check_weighting,
    check_weights,
    checked_dim,
    checked_features,
    counted_parameters,
    head_parameters,
    joined,
    on_one_device,
)
from recollect.autogram._choice import BatchDim, Choice, choose
from recollect.autogram._cross import cross_of
from recollect.autogram._hidden import check_checkpoints, check_functions, watched
from recollect.autogram._independence import check_independence, explain
from recollect.autogram._passes import Declines, Job, Known, gramian_of, norms_of, rows_of_features
from recollect.autogram._plan import changed_layers
from recollect.autogram._ranks import Found, Together
from recollect.autogram._registry import Entry, Registry, Rule, Sharing
from recollect.autogram._sharded import Sharded
from recollect.autogram._structure import find_structure
from recollect.autogram._walk import Graph, walk
from recollect.autogram.rules import RULES
from recollect.distributed import Ranks

__all__ = ["Engine", "register_rule"]

_REGISTRY = Registry(RULES)

# Gradients that are masked for every loss may take this part of the bytes that rows may take.
_MASKED = 16
# How many forms of graphs an engine remembers; one that has more looks again where the batch is.
_FORMS = 64


def register_rule(
    layer_type: type[nn.Module] | str, rule: Rule, sharing: Sharing | None = None, constant: Iterable[str] = ()
) -> None:
    """Teach all engines a type of layer, in place of the exact but slower fallback.

    Args:
        layer_type: the type, or its full name ("package.module.Class").
        rule: ``rule(layer, inputs, grads) -> {parameter's name: factor}``; see :class:`Rule`.
        sharing: along which axes the layer's elements are independent, see :class:`Sharing`; None: it is not known, and
            where losses are apart in the layer's output, the rule gets its gradient masked for each of them.
        constant: names of parameters whose Jacobian does not depend on the inputs' values, as that of a bias. Where no
            others are trained, the inputs are not kept.

    Raises:
        ValueError: the type has a rule already.

    Example:
        >>> import torch
        >>> from recollect.autogram import Engine, Rows, register_rule
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> def rule(layer, inputs, grads):
        ...     return {"weight": Rows((inputs[0] * grads[0]).sum(1))}
        >>> register_rule(Scale, rule, sharing=lambda layer, inputs, axes: axes if axes == (0,) else None)
        >>> layer, x = Scale(), torch.randn(4, 3)
        >>> torch.allclose(Engine(layer).compute_gramian(layer(x).sum(1)), x @ x.T)
        True
    """
    _REGISTRY.register(layer_type, Entry(rule, sharing, frozenset(constant)))


# What an engine makes for itself, and copies do not take along.
_MADE = ("_recorder", "_known", "_lock", "certificate")


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
        features: a tensor of the graph, or several: gradients are those with respect to them, in place of parameters,
            as in MGDA-UB (arXiv 1810.04650, section 3.3) and IMTL. They are of one forward pass, and so is the engine;
            each loss costs a backward pass down to them. Then modules are left out, and nothing is certified.
        batch_dim: for which losses one backward pass may stand. ``"auto"``: for those that the operations of the graph
            keep apart, as they do with the elements of a batch; where they do not, as in front of a BatchNorm in
            training, parameters go by rows, with a backward pass for each loss. A number: for those along this
            dimension of the losses, and what mixes them is refused. None: for one loss. All three are exact;
            :meth:`explain` tells which parameters go by rows, and why.
        row_bytes: how many bytes of the losses' gradients may be held at once, where there are several backward passes.
            If they are more, passes are repeated.
        certify_every: the Gramian of :meth:`compute_gramian` is compared with a gradient, by one more backward pass, at
            the first call of each form of graph, and at every so many calls; 0: never. Products with other
            losses are compared too, by two passes, and :meth:`compute_norms`, by one loss. (:meth:`backward` always
            compares, at no further pass.)
        process_group: of torch.distributed, or ``torch.distributed.group.WORLD``: the losses are those of all its
            ranks. Each rank computes its own, as many as it has, with the same parameters; Gramians [M, M] and weights
            [M] are of all of them, those of rank 1 behind those of rank 0, and the gradient is summed up over the
            ranks. All ranks call :meth:`compute_gramian` and :meth:`backward` together. :meth:`compute_norms` is of a
            rank's own losses. Parameters may be sharded by ``fully_shard``: they are gathered for a Gramian. None: each
            process is for itself.

    Attributes:
        certificate: how well Gramians and gradients fitted, so far.

    An engine may be used by several threads; one at a time goes through a graph.

    Raises:
        TypeError: something is no module.
        ValueError: there is no module, or one contains another; or ``batch_dim`` or ``certify_every`` is none of those.

    Example:
        >>> import copy, torch
        >>> from recollect.autogram import Engine
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> engine = Engine(model)
        >>> losses = model(torch.randn(5, 4)).square().sum(1)  # [5]
        >>> engine.compute_gramian(losses).shape
        torch.Size([5, 5])
        >>> twin, its_engine = copy.deepcopy((model, engine))
        >>> its_engine.compute_gramian(twin(torch.randn(5, 4)).square().sum(1)).shape
        torch.Size([5, 5])
    """

    def __init__(
        self,
        *modules: nn.Module,
        batch_dim: BatchDim = "auto",
        row_bytes: int = 2**28,
        certify_every: int = 100,
        features: Tensor | Sequence[Tensor] | None = None,
        process_group: Any | None = None,
    ) -> None:
        check_settings(batch_dim, certify_every, row_bytes)
        self._features = checked_features(features, modules)
        if not self._features:
            check_modules(modules)
        self._modules = modules
        self._batch_dim = batch_dim
        self._row_bytes = row_bytes
        self._certify_every = certify_every
        if self._features and process_group is not None:
            raise ValueError("gradients over ranks are with respect to parameters, and not to features; give modules")
        self._ranks = None if process_group is None else Ranks(process_group, "this engine")
        self._calls = 0
        self._begin()

    def _begin(self) -> None:
        """Make what is no setting: what captures lead to, and what was found out about graphs."""
        self._recorder = Recorder(_REGISTRY, self._modules)
        self._known: dict[Any, Known] = {}
        self._lock = threading.RLock()  # of several threads, one goes through a graph at a time
        self.certificate = Certificate()
        weakref.finalize(self, watch(self._recorder))

    def __getstate__(self) -> dict[str, Any]:
        """Return the modules and the settings, for copies and pickles."""
        return {name: value for name, value in vars(self).items() if name not in _MADE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be an engine of these modules, some of which may be whole only later, where they hold the engine."""
        vars(self).update(state)
        self._begin()

    def compute_gramian(
        self,
        output: Tensor | Sequence[Tensor],
        columns: Tensor | Sequence[Tensor] | None = None,
        *,
        flat: bool = False,
        retain_graph: bool = True,
    ) -> Tensor:
        """Return the Gramian of the losses' gradients, or the products of theirs with those of other losses.

        Args:
            output: losses of any shape [m1, ..., mk], floating point; or a list or tuple of losses, whatever the shape
                of each, of one dtype and on one device: they count as one vector [m], each flattened, one behind the
                other.
            columns: other losses, n of them, of the same graph or another one: then the result is J Kᵀ, of the
                Jacobians of both, as for influence functions, tangent kernels between two batches, and methods that
                take the products of two samples (MoDo, arXiv 2305.20057). Of parameters that only one of the two
                depends on there is nothing. None: they are the output.
            flat: whether a Gramian [m, m] of the losses ``output.flatten()`` is wanted in place of the generalised one.
                That of a list, or of a vector, is [m, m] anyway.
            retain_graph: whether the graph must stay for a backward pass that follows; otherwise what it saved may be
                freed on the way, as an ordinary backward pass does. (With columns it stays.)

        Returns:
            [m1, ..., mk, mk, ..., m1] in the output's dtype: entry [i1..ik, jk..j1] is the scalar product of the
            gradients of output[i1..ik] and output[j1..jk]. For a scalar it is the squared norm of its gradient. If
            flat, and for a list: [m, m]. With columns of the shape [n1, ..., nl]: [m1, ..., mk, nl, ..., n1]; if flat,
            [m, n].

        Raises:
            TypeError: the output is no tensor of floating point, or a list of several dtypes, or a parameter is
                complex.
            ValueError: it has no graph, or no such dimension as ``batch_dim``, or the elements in it are not
                independent; or a list is empty, or on several devices, as the columns may be.
            GramianError: it does not fit the gradient: a rule is wrong.

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
            >>> others = model(torch.randn(2, 4)).square().mean(1)
            >>> engine.compute_gramian(outputs[:, 0], others).shape  # a product for each pair
            torch.Size([5, 2])
        """
        if self._ranks is not None:
            if columns is not None:
                raise ValueError("products of two lists of losses are not there over ranks; leave process_group out")
            with self._lock:
                return self._over_ranks(self._ranks, output, "compute_gramian", certify=True)[1].square
        losses = joined(output)
        if columns is not None:
            return self._cross(losses, joined(columns), flat)
        square, _ = self._gramian(losses, retain_graph, self._every())
        return square if flat else _generalise(square, losses)

    def backward(
        self,
        losses: Tensor | Sequence[Tensor],
        weighting: Callable[..., Tensor],
        *,
        on_overflow: Literal["raise", "pass"] = "raise",
    ) -> Tensor:
        """Accumulate the gradient of the losses' sum, weighted by what their Gramian says.

        Args:
            losses: of any shape, or a list or tuple of losses, as in :meth:`compute_gramian`.
            weighting: from the Gramian to weights of the losses' shape; for a list, from [m, m] to [m]. One that has a
                true attribute ``takes_residuals`` is called with the Gramian and the losses' values.
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
            GramianError: the gradient that was accumulated is not of the size that the Gramian says: a rule is wrong.

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
        if self._ranks is not None:
            with self._lock:
                together, found = self._over_ranks(self._ranks, losses, "backward", certify=False)
                weights = together.weigh(found, weighting, on_overflow)
                together.accumulate(found, weights)
            return weights
        check_weighting(weighting)
        check_overflow(on_overflow)
        weights, add = self._weigh(joined(losses), weighting, on_overflow)
        add(None)
        return weights

    def mtl_backward(
        self,
        losses: Tensor | Sequence[Tensor],
        heads: Sequence[nn.Module | Sequence[nn.Module]],
        weighting: Callable[..., Tensor],
        *,
        on_overflow: Literal["raise", "pass"] = "raise",
    ) -> Tensor:
        """Accumulate gradients of multi-task learning: of what is shared by the weights, of each head by its own loss.

        The engine's modules are what tasks share. Heads are not weighted: a task whose weight is small does not learn
        its head more slowly for that ("Multi-Task Learning as Multi-Objective Optimization", arXiv 1810.04650,
        algorithm 2).

        Args:
            losses: one for each task, [m], or a list of scalars.
            heads: for each task, the module of which its loss alone trains the parameters; or several modules.
            weighting: as in :meth:`backward`.
            on_overflow: as in :meth:`backward`; the heads' gradients are what they are.

        Returns:
            The weights [m].

        Raises:
            TypeError: what :meth:`backward` refuses; a head is no module.
            ValueError: what :meth:`backward` refuses; there is not one head for each loss; a head has parameters of the
                engine's modules.

        Example:
            >>> import torch
            >>> from recollect.aggregation import UPGrad
            >>> from recollect.autogram import Engine
            >>> encoder = torch.nn.Linear(4, 8)
            >>> heads = [torch.nn.Linear(8, 1), torch.nn.Linear(8, 1)]
            >>> engine = Engine(encoder)
            >>> z = encoder(torch.randn(5, 4)).relu()
            >>> weights = engine.mtl_backward([head(z).square().mean() for head in heads], heads, UPGrad())
            >>> weights.shape
            torch.Size([2])
        """
        check_weighting(weighting)
        check_overflow(on_overflow)
        if self._features:
            raise ValueError("mtl_backward is for an engine of the modules that tasks share, and not of features")
        if self._ranks is not None:
            raise ValueError("mtl_backward is not there over ranks, whose losses are apart; leave process_group out")
        vector = joined(losses)
        checked_dim(vector, None)
        own = head_parameters(heads, vector, counted_parameters(self._modules))
        weights, add = self._weigh(vector, weighting, on_overflow)
        for loss, parameters in zip(vector.unbind(), own, strict=True):
            if parameters:
                torch.autograd.backward(loss, retain_graph=True, inputs=parameters)
        add([p for module in self._modules for p in module.parameters() if p.requires_grad])
        return weights

    def _over_ranks(self, ranks: Ranks, losses: Any, what: str, certify: bool) -> tuple[Together, Found]:
        """Return the Gramian of the losses of all ranks, and what is done with these in this call."""
        self._calls += 1
        every = self._certify_every
        together = Together(ranks, self._modules, self._job, self._choose, self.certificate, every, self._calls)
        kind = next((p.device.type for module in self._modules for p in module.parameters()), "cpu")
        with self._plain(kind):
            return together, together.gramian(losses, what, certify=certify)

    @contextmanager
    def _plain(self, kind: str) -> Iterator[None]:
        """Without autocast, and with all parameters whole."""
        with torch.autocast(kind, enabled=False), Sharded(self._modules if self._ranks is not None else ()).gathered():
            yield

    def _weigh(
        self, vector: Tensor, weighting: Callable[..., Tensor], on_overflow: str
    ) -> tuple[Tensor, Callable[[Sequence[Tensor] | None], None]]:
        """Return the weights, and what accumulates the gradient that they make: of these parameters, or of all."""
        square, job = self._gramian(vector, True)
        gramian = _generalise(square, vector)
        if on_overflow == "pass" and not bool(gramian.isfinite().all()):
            weights = torch.full_like(vector, torch.nan, requires_grad=False)
        else:
            residuals = (vector.detach(),) if getattr(weighting, "takes_residuals", False) else ()
            weights = weighting(gramian, *residuals)
            check_weights(weights, vector)
        used = weights.to(vector)

        def add(parameters: Sequence[Tensor] | None) -> None:
            if parameters is not None and not parameters:
                return  # nothing that is shared is trained
            if job is None:
                torch.autograd.backward(vector, used, inputs=parameters)
                return
            shown = set(job.graph.leaves.values())
            hidden = {key: parameter for key, parameter in job.parameters.items() if key not in shown}
            with (
                self._lock,
                watched(job.graph, hidden, self._modules),
                squared_norm(job.graph, job.graph.leaves) as norm,
            ):
                torch.autograd.backward(vector, used, inputs=parameters)
            self._certify(job, square, used, None if job.hooked else norm.total())

        return weights, add

    def compute_norms(
        self, losses: Tensor | Sequence[Tensor], *, squared: bool = False, retain_graph: bool = True
    ) -> Tensor:
        """Return the norm ‖g_i‖ of each loss' gradient: the roots of the Gramian's diagonal, of which no more is made.

        For a layer that is called once for each loss it is ‖g‖ ‖a‖, of its output's gradient and its input (Goodfellow,
        arXiv 1510.01799). With several positions, pairs of them are multiplied, or rows are formed, whichever takes
        fewer operations. Several uses of a parameter count with their cross terms.

        Args:
            losses: of any shape, or a list or tuple of losses, as in :meth:`compute_gramian`.
            squared: whether ‖g_i‖² is wanted, what the diagonal is.
            retain_graph: as in :meth:`compute_gramian`.

        Returns:
            Of the losses' shape and dtype; for a list, [m].

        Raises:
            TypeError: as in :meth:`compute_gramian`.
            ValueError: as in :meth:`compute_gramian`.
            GramianError: a norm is not that of the gradient: a rule is wrong. One loss' norm is compared, by one more
                backward pass, at the first call of each form of graph, and at every ``certify_every`` calls.

        Example:
            >>> import torch
            >>> from recollect.autogram import Engine, clip_weights
            >>> model = torch.nn.Linear(4, 3)
            >>> engine = Engine(model)
            >>> losses = model(torch.randn(5, 4)).square().sum(1)
            >>> norms = engine.compute_norms(losses)
            >>> norms.shape
            torch.Size([5])
            >>> losses.backward(clip_weights(norms, max_norm=1.0))  # the sum of clipped gradients
        """
        vector = joined(losses)
        squares = self._squares(vector, retain_graph)
        norms = squares if squared else squares.sqrt()
        return norms.to(vector.dtype).view(vector.shape)

    def explain(self, output: Tensor | Sequence[Tensor]) -> str:
        """Return which backward passes the Gramian of these losses takes, and which parameters go by rows, and why.

        Args:
            output: losses, as in :meth:`compute_gramian`; their graph stays.

        Raises:
            TypeError: the output is no tensor of floating point, or a parameter is complex.
            ValueError: it has no graph, or no batch dimension, or the elements of its batch are not independent.
        """
        vector = joined(output)
        if self._features or vector.numel() == 0:
            checked_dim(vector, self._batch_dim)
            end = " down to the features" if self._features else ""
            return f"one backward pass for each of {vector.numel()} losses{end}"
        with self._lock, torch.no_grad(), self._plain(vector.device.type):
            job = self._job(vector, True)
            return explain(job.graph, self._choose(job), self._modules)

    def _gramian(self, output: Tensor, retain: bool, certify_every: int = 0) -> tuple[Tensor, Job | None]:
        """Return the Gramian [m, m] in the output's dtype, and what it was computed from; None if m is 0."""
        checked_dim(output, self._batch_dim)
        with self._lock, torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            if output.numel() == 0:
                return output.new_zeros(0, 0), None
            if self._features:
                rows = rows_of_features(output, self._features)
                return (rows @ rows.T).to(output.dtype), None
            square, job = self._computed(output, retain, gramian_of, partial(probe_gramian, every=certify_every))
            return square.to(output.dtype), job

    def _computed(
        self,
        output: Tensor,
        retain: bool,
        compute: Callable[[Job, Choice], Tensor | Declines],
        probe_for: Callable[[Job], GramianProbe | NormProbe | None],
    ) -> tuple[Tensor, Job]:
        """Compute once more as long as rules cover less than was planned for, and judge by a probe what came out."""
        probe: GramianProbe | NormProbe | None = None
        while True:
            job = self._job(output, retain)
            self._check_functions(job)
            with watched(job.graph, job.parameters, self._modules):
                probe = probe or probe_for(job)
                result = compute(job, self._choose(job))
            if isinstance(result, Tensor):
                job.known.settled = True
                if probe is not None:
                    probe.judge(self.certificate, result, job, self._choose(job))
                return result, job
            job.known.declined |= result

    def _check_functions(self, job: Job) -> None:
        """Raise if a function of the graph hides parameters: at the first call of each form."""
        if job.graph.functions and job.known.count("functions") == 1:
            try:
                check_functions(job, self._modules)
            except ValueError:
                job.known.calls["functions"] = 0  # the next call finds it too
                raise

    def _every(self) -> int:
        """Return at how many calls results are compared: at each one, where one did not fit."""
        return min(self._certify_every, 1) if self.certificate.failed else self._certify_every

    def _certify(self, job: Job, square: Tensor, weights: Tensor, squared: Tensor | float | None) -> None:
        probe = GramianProbe(weights, squared)
        probe.judge(self.certificate, square, job, self._choose(job))

    def _squares(self, output: Tensor, retain: bool) -> Tensor:
        """Return the squared norms [m], in what they are summed in."""
        checked_dim(output, self._batch_dim)
        with self._lock, torch.no_grad(), self._plain(output.device.type):
            if output.numel() == 0:
                Sharded(self._modules).go_through(output)
                return output.new_zeros(0)
            if self._features:
                return rows_of_features(output, self._features).square().sum(1)
            squares, _ = self._computed(output, retain, norms_of, partial(probe_norms, every=self._every()))
            return squares.clamp(min=0)  # pairs of positions may leave rounding below zero

    def _cross(self, rows: Tensor, columns: Tensor, flat: bool) -> Tensor:
        """Return the products of the gradients of two tensors of losses."""
        for output in (rows, columns):
            checked_dim(output, self._batch_dim)
        on_one_device(rows, columns)
        probe: CrossProbe | None = None
        dtype = torch.promote_types(rows.dtype, columns.dtype)
        with self._lock, torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            found = torch.zeros(rows.numel(), columns.numel(), dtype=dtype, device=rows.device)
            if self._features and found.numel() > 0:
                both = [rows_of_features(losses, self._features) for losses in (rows, columns)]
                found = (both[0] @ both[1].to(both[0].dtype).T).to(dtype)
            while found.numel() > 0 and not self._features:
                jobs = self._job(rows, True), self._job(columns, True)
                for job in jobs:
                    self._check_functions(job)
                choices = self._choose(jobs[0]), self._choose(jobs[1])
                with (
                    watched(jobs[0].graph, jobs[0].parameters, self._modules),
                    watched(jobs[1].graph, jobs[1].parameters, self._modules),
                ):
                    probe = probe or probe_cross(*jobs, self._every())
                    result = cross_of(*jobs, choices)
                if isinstance(result, Tensor):
                    if probe is not None:
                        probe.judge(self.certificate, result, jobs, choices)
                    found = result.to(dtype)
                    break
                for job, declined in zip(jobs, result, strict=True):
                    job.known.declined |= declined
        if flat:
            return found
        k, dims = rows.dim(), rows.dim() + columns.dim()
        laid = found.view([*rows.shape, *columns.shape])
        return laid.permute([*range(k), *reversed(range(k, dims))]).contiguous()

    def _job(self, output: Tensor, retain: bool) -> Job:
        checked_dim(output, self._batch_dim)
        with torch.enable_grad():
            output = output.view_as(output) if output.is_leaf else output  # a parameter itself has no node before it
        parameters = counted_parameters(self._modules)
        graph = walk(output, self._recorder, parameters)
        if parameters and not graph.leaves:
            self._warn_that_it_is_zero()
        known = self._recall(graph)
        check_checkpoints(graph, parameters, self._modules)
        declined = known.declined | changed_layers(graph)
        hooked = frozenset(key for key in graph.uses if parameters[key]._backward_hooks)
        return Job(output, graph, parameters, self._recorder, known, declined, hooked, self._row_bytes, retain)

    def _choose(self, job: Job) -> Choice:
        """Return the passes, as they were chosen for a graph of this form."""
        key = (job.declined, job.hooked)
        choice = job.known.choices.get(key)
        if choice is None:
            batch_dim = checked_dim(job.output, self._batch_dim)
            structure = find_structure(job.graph, job.output.shape)
            bound = self._row_bytes // job.dtype.itemsize // _MASKED
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
            stacklevel=_levels_to_the_caller(),
        )

    def _recall(self, graph: Graph) -> Known:
        form = graph.form
        known = self._known.get(form)
        if known is None:
            if len(self._known) >= _FORMS:
                self._known.clear()
            known = self._known[form] = Known()
        if known.anatomy is None:
            known.anatomy = graph.find_anatomy()
        graph.anatomy = known.anatomy
        return known


def _levels_to_the_caller() -> int:
    """Return how far above a function here the code is that called the engine."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent == Path(__file__).parent:
        level, frame = level + 1, frame.f_back
    return level


def _generalise(square: Tensor, output: Tensor) -> Tensor:
    """Lay [m, m] out as [m1..mk, mk..m1]."""
    k = output.dim()
    laid = square.view([*output.shape, *output.shape])
    return laid.permute([*range(k), *reversed(range(k, 2 * k))]).contiguous()
