"""A whole graph's tables over ranks: each has the rows of its own nodes, and all take every operation together.

A part's halo is read from the ranks that own it, and what is added to the halo's gradients goes back to them. The k-th
part of one rank is computed beside the k-th of every other, so that ranks have as many parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autoscale.histories import PlainRows, Where, Worker
from recollect.distributed import Shares, SharesError
from recollect.frames import bits_of
from recollect.outofcore._objectives import Criterion
from recollect.outofcore._several import SeveralLosses
from recollect.outofcore._tables import Changes, Shape, Table, Tables

__all__ = ["RankTables", "Team", "check_shares"]

_HALO = "halo rows of a part"  # for the error where ranks differ


class RankTables(Tables):
    """Tables with the rows of this rank's nodes, which are named by their numbers in the whole graph.

    Those of bits, which every rank draws alike, have a row for each node of the graph.

    Args:
        shapes: of the tables, by name.
        shares: who owns which nodes.
    """

    def __init__(self, shapes: Mapping[str, Shape], shares: Shares) -> None:
        first, stop = shares.nodes
        bits = {name: shape for name, shape in shapes.items() if not shape[1].is_floating_point}
        super().__init__(stop - first, {name: shape for name, shape in shapes.items() if name not in bits}, None)
        self._shares = shares
        self._bits = {name: PlainRows(shares.num_nodes, *shape) for name, shape in bits.items()}

    def __getitem__(self, name: str) -> PlainRows:
        return self._bits[name] if name in self._bits else _OwnRows(self._tables[name], self._shares.nodes[0])

    @property
    def sizes(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """See :class:`Tables`; of this rank."""
        return super().sizes | {name: table.size for name, table in self._bits.items()}

    def at(self, table: Table) -> PlainRows:
        """See :class:`Tables`; over ranks all is changed in place."""
        return self[table[0]]

    def read(self, at: Table, where: tuple[int, int], halo: Tensor) -> Tensor:
        """Return own rows in a row, and behind them others by number; a step of all ranks."""
        table, shares, own = self._tables[at[0]], self._shares, where[1] - where[0]
        came = shares.route(halo, _HALO).begin(table.read, f"{_HALO}, table {at[0]}")
        rows = table.empty(own + halo.numel())
        table.read(_local(where, shares.nodes[0]), rows[:own])
        rows[own:] = came()
        return rows

    def apply(self, changes: Changes, journaled: bool) -> None:
        """Do what an operation does; a step of all ranks where it adds to halos."""
        shares = self._shares
        self._write(changes.rows)
        for each in changes.added:
            if not isinstance(each.where, Tensor):
                self._tables[each.table[0]].add(_local(each.where, shares.nodes[0]), each.values)
                continue
            what = f"gradients of a part's halo, table {each.table[0]}"
            for rows, values in shares.route(each.where, _HALO).give_back(each.values, what):
                self._tables[each.table[0]].add(rows, values)
        self._clear(changes.cleared)


class _OwnRows(PlainRows):
    """Rows of a rank, by the numbers that its nodes have in the whole graph."""

    def __init__(self, rows: PlainRows, first: int) -> None:
        self._plain, self._first = rows, first

    def empty(self, rows: int) -> Tensor:
        """See :class:`PlainRows`."""
        return self._plain.empty(rows)

    def read(self, where: Where, out: Tensor | None = None) -> Tensor:
        """See :class:`PlainRows`."""
        return self._plain.read(_local(where, self._first), out)

    def write(self, where: Where, values: Tensor) -> None:
        """See :class:`PlainRows`."""
        self._plain.write(_local(where, self._first), values)

    def add(self, where: Where, values: Tensor) -> None:
        """See :class:`PlainRows`."""
        self._plain.add(_local(where, self._first), values)

    def zero_(self) -> None:
        """See :class:`PlainRows`."""
        self._plain.zero_()


def _local(where: Where, first: int) -> Where:
    return where - first if isinstance(where, Tensor) else (where[0] - first, where[1] - first)


def check_shares(shares: Shares, ptr: Tensor, data: Any, store: object) -> None:
    """Check that parts are those of the shares, and that ranks have as many of them, and some nodes in each.

    Raises:
        SharesError: they are not; on every rank.
        ValueError: there is a store, or no node for training.
    """
    if store is not None:
        raise ValueError("over ranks tables lie in host memory: leave store out")
    if not bool(data.train_mask.any()):
        raise ValueError("no node is for training: data.train_mask has none")
    if not torch.equal(shares.ptr, ptr):
        raise SharesError("ptr is another than that of the shares: give both the same")
    counts = shares.bounds.diff().tolist()
    if len(set(counts)) > 1:
        raise SharesError(
            f"ranks own {counts} parts, and a step over the whole graph takes as many on each: take a number of parts "
            f"that {shares.world_size} divides, and Shares(ptr, weights=torch.ones(len(ptr) - 1))"
        )
    if not bool(ptr.diff().all()):
        raise SharesError("a part has no nodes: leave it out of ptr")


class Team:
    """What ranks do together around the operations of a step.

    Args:
        shares: who owns which nodes.
        parameters: of the network.
    """

    def __init__(self, shares: Shares, parameters: list[nn.Parameter]) -> None:
        self.ranks = shares.ranks
        self._parameters = parameters
        self._own = set(parameters)

    def agree(self, what: str, state: Mapping[str, Any], trained: int) -> None:
        """Compare what a step, a Gramian or an evaluation begins with.

        Args:
            what: it is.
            state: fingerprints: ``graph``, by the names of its tensors, and ``model``; ``random`` and ``several`` of
                what has losses.
            trained: parts with nodes for training.

        Raises:
            SharesError: on every rank, where something differs, or one calls something else; or a rank has no node for
                training, for several losses.
        """
        random = None if "random" not in state else bits_of(state["random"])
        several = state.get("several", False)
        found = self.ranks.gather((state["graph"], state["model"], random, several, trained), f"{what} of a WholeGraph")
        graphs, models, randoms, kinds, numbers = zip(*found, strict=True)
        for name in graphs[0]:
            self.ranks.compare(f"the graph's {name}", [graph.get(name) for graph in graphs])
        self.ranks.compare("the graph", graphs)
        self.ranks.compare("the network or its modes", models)
        self.ranks.compare("torch's random state", randoms)
        self.ranks.compare("the number of losses, one or several,", kinds)
        if several and not all(numbers):
            raise SharesError(
                "a rank has no node for training, and so does not know how many losses there are: with several losses, "
                "permute the parts so that each rank has some"
            )

    @contextmanager
    def telling(self, worker: Worker) -> Iterator[None]:
        """Tell the other ranks of an error within, which is followed by an exchange of all.

        Args:
            worker: makes exchanges beside.
        """
        with self.ranks.wire.telling(worker.drain):
            yield

    def weights(self, weights: Tensor) -> Tensor:
        """Return those of rank 0, which are the others' too unless they are drawn at random."""
        return self.ranks.spread(weights.detach().contiguous().clone(), "weights of losses")

    def sum_of(self, losses: Tensor) -> Tensor:
        """Return the sum over ranks of their losses [m]."""
        return self.ranks.add_up(losses.detach().clone(), "losses of a whole graph")

    def any_of(self, parameters: Collection[nn.Parameter], losses: int | None) -> list[nn.Parameter]:
        """Return those of the network's parameters that are among these on any rank.

        Args:
            parameters: of this rank.
            losses: how many there are, where that is known.

        Raises:
            SharesError: on every rank, where another has another number of losses.
        """
        own = [number for number, p in enumerate(self._parameters) if p in parameters]
        said = self.ranks.gather((own, losses), "parameters that several layers reach")
        found, counts = zip(*said, strict=True)
        if len(set(counts)) > 1:
            raise SharesError(
                f"the criterion returned {', '.join(map(str, counts))} losses, by rank: it must return as many on each"
            )
        return [self._parameters[number] for number in sorted(set().union(*found))]

    def losses(self, criterion: Criterion, uses: Counter[nn.Parameter], fit: int) -> RankLosses:
        """Return what makes the Gramian of several losses, of which so many go together."""
        return RankLosses(criterion, uses, fit, self)

    def summed(
        self, loss: Tensor, gradients: Mapping[nn.Parameter, Tensor]
    ) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Return the loss and the gradients of all ranks."""
        total = self.sum_of(loss.double())
        return total.to(self._parameters[0].dtype), self.added_up(gradients)

    def added_up(self, gradients: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Return sums over ranks, of what any has.

        Raises:
            SharesError: on every rank, where one has a gradient of a parameter that is not the network's, and another
                has none.
        """
        known = [*self._parameters, *(p for p in gradients if p not in self._own)]
        own = {number: gradients[p] for number, p in enumerate(known) if p in gradients}
        shapes = self.ranks.gather({n: tuple(tensor.shape) for n, tensor in own.items()}, "gradients of parameters")
        numbers = sorted(set().union(*shapes))
        foreign = [{n: s for n, s in each.items() if n >= len(self._parameters)} for each in shapes]
        if any(each != foreign[0] for each in foreign):
            raise SharesError(
                "the criterion, or a layer, has parameters that are not the network's, and ranks reached different "
                f"ones of these ({[list(each.values()) for each in foreign]} by rank): make them parameters of the "
                "network, or give each rank nodes for training"
            )
        kinds: list[Tensor] = list(known)
        for number in numbers:
            shape = next(known[number] for known in shapes if number in known)
            kinds[number] = torch.empty((), dtype=kinds[number].dtype).expand(shape)
        totals: Iterator[tuple[int, Tensor]] = self.ranks.add_up_all(own, numbers, kinds, "gradients")
        return {known[number]: total for number, total in totals}


class RankLosses(SeveralLosses):
    """The Gramian of several losses, each of which is a sum over all ranks' nodes.

    Args:
        criterion: the losses [m] of a part.
        uses: how many passes bring gradients of each parameter.
        fit: how many losses go together, at the most.
        team: of the ranks.
    """

    def __init__(self, criterion: Criterion, uses: Counter[nn.Parameter], fit: int, team: Team) -> None:
        super().__init__(criterion, uses, fit)
        self._team = team

    def finish(self, parameters: Iterable[nn.Parameter], gradients: dict[nn.Parameter, Tensor]) -> None:
        """Sum rows up over the ranks before they are squared; a step of all ranks."""
        parameters = list(parameters)
        self.hold(self._team.any_of(self._held, self._number))
        over = {p: gradients[p] for p in parameters if self._left[p] <= 1 and p in gradients and p not in self._held}
        gradients.update(self._team.added_up(over))
        super().finish(parameters, gradients)

    def close(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Sum up over the ranks what is left, before it is squared; a step of all ranks."""
        gradients.update(self._team.added_up({p: g for p, g in gradients.items() if p not in self._squared}))
        super().close(gradients)
