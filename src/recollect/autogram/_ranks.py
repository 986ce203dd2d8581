"""An engine over ranks: the Gramian of the losses of all of them, and the gradient that weights of these make.

Each rank has a graph of its own, of as many losses as it has, and the same parameters. What ranks are asked and what
they found is compared before anything is exchanged, and an error on one is an error on all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recollect._devices import widened
from recollect.autogram._certificate import Certificate, circumstances, judge_gramian, random_weights
from recollect.autogram._checks import (
    check_overflow,
    check_weighting,
    check_weights,
    checked_dim,
    counted_parameters,
    joined,
)
from recollect.autogram._choice import Choice
from recollect.autogram._exchange import Exchange, RankSum, raise_first
from recollect.autogram._passes import Declines, Job, Passes, rank_passes
from recollect.autogram._sharded import Sharded
from recollect.autogram._square import wide
from recollect.distributed import Ranks, SharesError

__all__ = ["Found", "Together"]


@dataclass(frozen=True, slots=True)
class _Report:
    """What a rank says of its losses, before anything is computed.

    Attributes:
        error: why it cannot go on.
        what: is asked.
        table: a digest of the parameters' names, shapes and types.
        kind: the losses' dtype, and the type of their device.
        losses: how many it has.
        uses: the numbers of the parameters that they depend on.
        is_new: whether it has seen no such graph.
        circumstances: by how much a Gramian may differ from a gradient, the unit of rounding, the layers with rules.
    """

    error: str | None
    what: str = ""
    table: str = ""
    kind: tuple[torch.dtype, str] = (torch.float32, "cpu")
    losses: int = 0
    uses: tuple[int, ...] = ()
    is_new: bool = False
    circumstances: tuple[float, float, str] = (0.0, 0.0, "")


@dataclass(frozen=True, slots=True)
class Found:
    """The Gramian of all ranks' losses, and what led to it.

    Attributes:
        square: [M, M], the losses of one rank behind those of another; the same on every rank.
        values: the losses [M].
        own: which are this rank's.
        vector: these, with their graph; None if there are none, or they have no graph.
        job: of their graph; None if there are none.
        parameters: by id.
        used: the numbers of those that any loss depends on.
        reports: of the ranks.
    """

    square: Tensor
    values: Tensor
    own: slice
    vector: Tensor | None
    job: Job | None
    parameters: Mapping[int, Tensor]
    used: Sequence[int]
    reports: Sequence[_Report]


@dataclass(frozen=True, slots=True)
class Together:
    """What an engine does with the other ranks.

    Args:
        ranks: who they are.
        modules: whose parameters count.
        job: from losses to what is to be computed of them.
        choose: from that to the passes.
        certificate: the engine's.
        every: how often Gramians are compared with gradients; 0: never.
        call: the number of this call, the same on every rank.
    """

    ranks: Ranks
    modules: Sequence[nn.Module]
    job: Callable[[Tensor, bool], Job]
    choose: Callable[[Job], Choice]
    certificate: Certificate
    every: int
    call: int

    def gramian(self, output: Any, what: str, *, certify: bool) -> Found:
        """Return the Gramian of the losses of all ranks.

        Args:
            output: this rank's losses, as they were given.
            what: is asked, which must be the same on all ranks.
            certify: whether it is compared with a gradient if it is time for that.

        Raises:
            SharesError: what ranks have does not fit together, or another one raised an error.
            GramianError: it does not fit the gradient.
        """
        with torch.no_grad():
            report, vector, job, parameters, error = self._look(output, what)
            reports = self.ranks.gather(report, "losses of an engine")
            if error is not None:
                raise error
            self._compare(reports, parameters)
            counts = [report.losses for report in reports]
            own = slice(sum(counts[: self.ranks.rank]), sum(counts[: self.ranks.rank + 1]))
            assert vector is not None
            values = (
                torch.cat(self.ranks.gather_rows(vector.detach().flatten(), counts, "values of losses"))
                if max(counts)
                else vector
            )
            used = sorted(set().union(*(report.uses for report in reports)))
            square = self._square(vector, job, parameters, reports)
            found = Found(square.to(vector.dtype), values.detach(), own, vector, job, parameters, used, reports)
            if self._is_time(reports) and max(counts):
                self._check_values(found)
            if certify and self._is_time(reports) and max(counts):
                weights = random_weights(values, self.call)
                totals = self._totals(found, self._gradients(found, weights))
                self._judge(found, weights, _squared(totals))
            return found

    def weigh(self, found: Found, weighting: Callable[..., Tensor], on_overflow: str) -> Tensor:
        """Return weights [M] of all losses: rank 0's, which are the others' too unless a weighting draws at random.

        Raises:
            SharesError: the weighting of another rank raised an error.
        """
        with self.ranks.wire.telling():
            check_weighting(weighting)
            check_overflow(on_overflow)
            if on_overflow == "pass" and not bool(found.square.isfinite().all()):
                weights = torch.full_like(found.values, torch.nan)
            else:
                residuals = (found.values,) if getattr(weighting, "takes_residuals", False) else ()
                weights = weighting(found.square, *residuals)
                check_weights(weights, found.values)
            given = weights.detach().to(found.values).contiguous().clone()
        return self.ranks.spread(given, "weights of losses")

    def accumulate(self, found: Found, weights: Tensor) -> None:
        """Accumulate the gradient of all losses, weighted.

        Raises:
            GramianError: it is not of the size that the Gramian says.
        """
        sharded = Sharded(self.modules)
        if sharded:
            squared = sharded.accumulate(found.vector, weights[found.own], found.used, self.ranks)
        else:
            grads = self._gradients(found, weights, retain=False)
            totals = dict(self._totals(found, grads))
            squared = _squared(totals.items())
            leaves = [list(found.parameters.values())[number] for number in totals]
            others, rest = grads.others, grads.rest
            if leaves or others:
                torch.autograd.backward([*leaves, *others], [*totals.values(), *rest])
        self._judge(found, weights, squared)

    def _look(
        self, output: Any, what: str
    ) -> tuple[_Report, Tensor | None, Job | None, Mapping[int, Tensor], Exception | None]:
        """Return what this rank has to say, or why it has nothing."""
        try:
            vector = joined(output)
            parameters = counted_parameters(self.modules)
            job, is_new, around = None, False, (0.0, 0.0, "")
            uses: tuple[int, ...] = ()
            if not isinstance(vector, Tensor) or vector.numel() > 0:
                checked_dim(vector, None)
                job = self.job(vector, True)
                if job.hooked:
                    raise ValueError(f"{self._name(min(job.hooked), parameters)} has a hook {_HOOKED}")
                numbers = {key: number for number, key in enumerate(parameters)}
                uses = tuple(sorted(numbers[key] for key in job.graph.uses))
                is_new = not job.known.settled
                around = circumstances(job, self.choose(job))
                _refuse_sinks(job)
            elif Sharded(self.modules):
                uses = self._uses_of_nothing(vector, parameters)
            kind = (vector.dtype, vector.device.type)
            table = self._table(parameters)
            digest = hashlib.sha256(repr(table).encode()).hexdigest()
            report = _Report(None, what, digest, kind, vector.numel(), uses, is_new, around)
            return report, vector, job, parameters, None
        except Exception as error:
            return _Report(_text(error)), None, None, {}, error

    def _uses_of_nothing(self, vector: Tensor, parameters: Mapping[int, Tensor]) -> tuple[int, ...]:
        """Return the parameters that no losses depend on in their graph, as that of an empty batch."""
        if not vector.requires_grad:
            raise ValueError(
                "there are no losses, and they have no graph, through which fully_shard reduces gradients; give the "
                "losses of an empty batch"
            )
        numbers = {key: number for number, key in enumerate(parameters)}
        return tuple(sorted(numbers[key] for key in self.job(vector, True).graph.uses))

    def _compare(self, reports: Sequence[_Report], parameters: Mapping[int, Tensor]) -> None:
        raise_first([report.error for report in reports])
        self.ranks.compare("what is asked", [report.what for report in reports])
        if len({report.table for report in reports}) > 1:
            tables = self.ranks.gather(self._table(parameters), "parameters of an engine")
            for rank, table in enumerate(tables):
                pairs = zip(tables[0], table, strict=False)
                first = next((pair for pair in pairs if pair[0] != pair[1]), None)
                if first is not None:
                    raise SharesError(
                        f"a parameter of rank 0 is {_told(first[0])}, and of rank {rank} {_told(first[1])}"
                    )
                self.ranks.compare("the number of parameters", [len(table) for table in tables])
        self.ranks.compare("the losses' dtype and device", [report.kind for report in reports])
        if Sharded(self.modules):
            self.ranks.compare(
                "which parameters the losses depend on (those of fully_shard must be the same)",
                [report.uses for report in reports],
            )

    def _table(self, parameters: Mapping[int, Tensor]) -> list[tuple[str, tuple[int, ...], str]]:
        names = {id(p): name for module in self.modules for name, p in module.named_parameters()}
        return [(names[key], tuple(p.shape), str(p.dtype)) for key, p in parameters.items()]

    def _name(self, key: int, parameters: Mapping[int, Tensor]) -> str:
        return next(repr(n) for module in self.modules for n, p in module.named_parameters() if p is parameters[key])

    def _square(
        self, vector: Tensor, job: Job | None, parameters: Mapping[int, Tensor], reports: Sequence[_Report]
    ) -> Tensor:
        """Return the Gramian, after as many goes as rules of any rank decline."""
        dtype = wide(vector.dtype, *(p.dtype for p in parameters.values() if p.is_floating_point()))
        counts, shapes = [report.losses for report in reports], [p.shape for p in parameters.values()]
        while True:
            exchange = Exchange(
                self.ranks, counts, [frozenset(report.uses) for report in reports], shapes, dtype, vector.device
            )
            try:
                if job is None:
                    Sharded(self.modules).go_through(vector)
                own, declined = self._own(job, exchange)
                again = exchange.finish(bool(declined))
            except BaseException as error:
                exchange.fail(_text(error))
                raise
            if not again:
                break
            if job is not None:
                job.known.declined |= declined
                job = self.job(vector, True)
        square = torch.zeros(sum(counts), sum(counts), dtype=dtype, device=vector.device)
        columns = exchange.columns(self.ranks.rank)
        square[columns] = exchange.block
        square[columns, columns] = own / 2  # its other half comes with the transpose
        self.ranks.add_up(square, "a Gramian")
        if job is not None:
            job.known.settled = True
        return square + square.mT

    def _own(self, job: Job | None, exchange: Exchange) -> tuple[Tensor, Declines]:
        """Return the Gramian of this rank's own losses; or what rules declined."""
        rows = exchange.counts[self.ranks.rank]
        square = torch.zeros(rows, rows, dtype=exchange.dtype, device=exchange.device)
        if job is None:
            return square, frozenset()
        with torch.autocast(job.output.device.type, enabled=False):
            passes: Passes
            for passes in rank_passes(job, self.choose(job)):
                total = RankSum(job.parameters, passes.count, passes.rows, exchange, passes.places)
                declined = passes.run(total, range(passes.count))
                if declined is not None:
                    return square, declined
                square += total.total()
        return square, frozenset()

    def _is_time(self, reports: Sequence[_Report]) -> bool:
        return bool(self.every) and (any(report.is_new for report in reports) or self.call % self.every == 0)

    def _check_values(self, found: Found) -> None:
        """Compare the parameters' values over the ranks, by sums of their bits."""
        sums = []
        for parameter in found.parameters.values():
            words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
            sums.append(parameter.detach().contiguous().view(-1).view(words).sum(dtype=torch.int64))
        own = torch.stack(sums).tolist() if sums else []
        for rank, other in enumerate(self.ranks.gather(own, "bits of parameters")):
            for key, mine, theirs in zip(found.parameters, own, other, strict=True):
                if mine != theirs:
                    raise SharesError(
                        f"{self._name(key, found.parameters)} has other values on rank {rank} than on rank "
                        f"{self.ranks.rank}: begin with the same parameters on every rank, as by "
                        "torch.distributed.broadcast of each from rank 0"
                    )

    def _gradients(self, found: Found, weights: Tensor, retain: bool = True) -> _Gradients:
        """Return this rank's part of the gradient of weighted losses."""
        if found.job is None or found.vector is None:
            return _Gradients({}, [], [])
        keys, graph = list(found.job.graph.uses), found.job.graph
        others: list[Tensor] = []
        if not retain:
            leaves = [graph.nodes[k].variable for k, kind in enumerate(graph.kinds) if kind == "AccumulateGrad"]
            others = [
                leaf for leaf in leaves if id(leaf) not in found.parameters and leaf is not found.job.recorder.leaf
            ]
        inputs = [*(found.parameters[key] for key in keys), *others]
        if not inputs:
            return _Gradients({}, [], [])
        own = weights[found.own].to(found.vector).view(found.vector.shape)
        with self.ranks.wire.telling():
            grads = torch.autograd.grad(found.vector, inputs, own, retain_graph=retain, allow_unused=True)
        numbers = {key: number for number, key in enumerate(found.parameters)}
        pairs = [(leaf, grad) for leaf, grad in zip(others, grads[len(keys) :], strict=True) if grad is not None]
        by_number = {numbers[key]: grad for key, grad in zip(keys, grads, strict=False) if grad is not None}
        return _Gradients(by_number, [leaf for leaf, _ in pairs], [grad for _, grad in pairs])

    def _totals(self, found: Found, grads: _Gradients) -> Iterator[tuple[int, Tensor]]:
        """Yield the gradient of each parameter that is used, summed up over the ranks."""
        kinds = list(found.parameters.values())
        return self.ranks.add_up_all(grads.by_number, found.used, kinds, "gradients of losses")

    def _judge(self, found: Found, weights: Tensor, squared: Tensor) -> None:
        said = [report.circumstances for report in found.reports if report.losses]
        if not said:
            return
        tolerance, eps = max(one[0] for one in said), max(one[1] for one in said)
        rules = ", ".join(dict.fromkeys(one[2] for one in said if one[2]))
        judge_gramian(self.certificate, found.square, weights, found.values, squared, (tolerance, eps, rules))


@dataclass(frozen=True, slots=True)
class _Gradients:
    """A rank's gradients: of the engine's parameters by their numbers, and of other leaves of the graph."""

    by_number: Mapping[int, Tensor]
    others: Sequence[Tensor]
    rest: Sequence[Tensor]


_HOOKED = (
    "(register_hook), which would see the gradient of one rank's losses: change gradients behind engine.backward, or "
    "register a hook by register_post_accumulate_grad_hook"
)


def _refuse_sinks(job: Job) -> None:
    """Refuse the forms of DistributedDataParallel that follow a graph."""
    if any(getattr(kind, "__name__", "") == "_DDPSink" for kind in job.graph.kinds):
        raise ValueError(
            "the losses come out of a DistributedDataParallel with find_unused_parameters or static_graph, which "
            "follows backward passes itself: an engine over ranks sums gradients up by itself, so call the module "
            "within it, or leave both options out"
        )


def _squared(totals: Any) -> Tensor:
    """Return the squared norm of gradients by their numbers."""
    squares = [
        widened(torch.linalg.vector_norm(total.float() if total.itemsize < 4 else total)).square()
        for _, total in totals
    ]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def _told(entry: tuple[str, tuple[int, ...], str]) -> str:
    name, shape, dtype = entry
    return f"{name!r} of shape {list(shape)} and {dtype}"


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
