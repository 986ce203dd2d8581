"""A step over the whole graph, part by part."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect._arguments import as_count
from recollect._modules import in_evaluation
from recollect.autogram import Certificate
from recollect.autoscale import ScalableGNN, to_adj_t
from recollect.autoscale.histories import PlainRows, Worker
from recollect.autoscale.loader import checked_ptr
from recollect.distributed import Shares
from recollect.frames import RandomState, bits_of
from recollect.messages.reach import DRAWING, settings_of
from recollect.models import RevGNN
from recollect.outofcore._checks import (
    check_graph,
    check_unweighted,
    check_weighting,
    in_order,
    inputs_of,
)
from recollect.outofcore._crossing import Crossing, device_of
from recollect.outofcore._layered import Layered
from recollect.outofcore._leaves import accumulate
from recollect.outofcore._network import Graph, Network
from recollect.outofcore._objectives import Criterion, OneLoss, Weighed, Weighting, certify, weigh
from recollect.outofcore._parts import Parts
from recollect.outofcore._rank_tables import RankTables, Team, check_shares
from recollect.outofcore._reversible import Reversible
from recollect.outofcore._several import SeveralLosses
from recollect.outofcore._step import Run, Space, Step
from recollect.outofcore._tables import Tables, load, save
from recollect.outofcore._writes import Writes

__all__ = ["WholeGraph"]


class WholeGraph:
    """Training steps over a whole graph, exact, in memory that does not grow with the depth.

    ``step`` leaves in ``.grad`` what one backward pass over the whole graph would. Memory holds the parameters and a
    few parts with their neighbours; tables lie in host memory or in files. A RevGNN has two for each group: 8 N C bytes
    in float32 for N nodes and C channels, whatever the depth, and in files the rows of one part more. Other networks
    have one for each layer's input, two of gradients, and two for what layers leave in their state.

    Args:
        model: a RevGNN, or another ScalableGNN without a ``forward`` of its own, in float32 or float64, on any one
            device: parts are computed there. What layers of the latter draw (dropout), they draw for each part.
        data: the graph, its nodes in the order of the parts (see :func:`~recollect.autoscale.permute`), with ``x``,
            ``y``, ``train_mask`` and ``edge_index`` or ``adj_t``. It is read once: changes afterwards are not seen, and
            must not be made in ``x``. With ``store`` it is not needed afterwards.
        ptr: [P + 1] int64: part p has the nodes from ``ptr[p]`` to ``ptr[p + 1]``.
        store: a folder for tables and parts; ``None``: host memory. One process at a time has it open.
        exact: of a RevGNN: as in :class:`~recollect.reversible.GroupAddRev`; the network's own where it has one.
            ``False``: the activations come back up to rounding.
        inputs: of a RevGNN: names of what the convolutions get of each edge beside ``edge_index``, in their order, such
            as ``("edge_weight",)``. Another network says itself what its layers need.
        memory: bytes of parts that stay in memory beside their files in ``store``; others are mapped for each block,
            with what convolutions make of their edges. So many bytes of parts stay on the network's device too, if it
            is not the CPU.
        keep_every: s: the input of every s-th layer is kept, and those between are computed again in backward; not of a
            RevGNN.
        row_bytes: with several losses, bytes of a part's rows of gradients that an operation holds at once: so many
            losses go together, and at the least one. It computes a part once for all of them.
        shares: of several processes, made of the same ``ptr``: each has the rows of its own nodes, computes its own
            parts, on the CPU, and all call each method together. The loss and ``.grad`` are those of the whole graph on
            every rank, ``last_drift`` is of a rank's own nodes. All have as many parts, the same network and random
            state, and no ``store``; with several losses, nodes for training.

    Attributes:
        last_drift: how far the first layer's input came back from what it was, in the last step, relative.
        last_gramian: of the last step of several losses [m, m].
        last_weights: of these [m].
        certificate: how well Gramians fitted gradients, so far.

    Raises:
        TypeError: another kind of network.
        SharesError: ranks have other parts, or other numbers of them.
        ValueError: ``ptr`` does not cover the graph; a block looks further than to neighbours; something is missing, or
            requires a gradient; ``adj_t`` has weights that ``inputs`` does not name; there are hooks on the network or
            its layers, which would not be called.
        HistoryFileError: a file in ``store`` is something else, or in use.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from recollect.models import RevGNN
        >>> from recollect.outofcore import WholeGraph
        >>> ring = torch.arange(12)
        >>> data = Data(x=torch.randn(12, 5), edge_index=torch.stack([ring, ring.roll(1)]), y=ring % 3)
        >>> data.train_mask = ring < 9
        >>> model = RevGNN(in_channels=5, hidden_channels=8, out_channels=3, num_layers=4, dropout=0.1)
        >>> whole = WholeGraph(model, data, ptr=torch.tensor([0, 4, 8, 12]))
        >>> loss = whole.step(lambda logits, y: torch.nn.functional.cross_entropy(logits, y, reduction="sum") / 9)
        >>> model.head.weight.grad.shape
        torch.Size([3, 8])
        >>> whole.evaluate().shape
        torch.Size([12, 3])

        With a loss for each class, and weights that no loss is harmed by:

        >>> from recollect.aggregation import UPGradWeighting
        >>> def criterion(logits, y):
        ...     each = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        ...     return torch.stack([each[y == c].sum() / 3 for c in range(3)])
        >>> whole.step(criterion, UPGradWeighting()).shape, whole.last_gramian.shape
        (torch.Size([3]), torch.Size([3, 3]))
    """

    def __init__(
        self,
        model: ScalableGNN,
        data: Any,
        ptr: Tensor,
        store: str | Path | None = None,
        *,
        exact: bool | int = True,
        inputs: tuple[str, ...] = (),
        memory: int = 128 << 20,
        keep_every: int = 1,
        row_bytes: int = 2**26,
        shares: Shares | None = None,
    ) -> None:
        keep_every, self._row_bytes = as_count("keep_every", keep_every), as_count("row_bytes", row_bytes)
        inputs = inputs_of(model, inputs, keep_every)
        check_graph(data, inputs)
        self.model = model
        self._ptr = checked_ptr(ptr, int(data.num_nodes))
        if shares is not None:
            check_shares(shares, self._ptr, data, store)
        self._busy = threading.Lock()
        self.num_nodes = int(self._ptr[-1])
        self._folder = folder = None if store is None else Path(store)
        given, data = data, to_adj_t(data)
        edges = {name: (data.adj_t.values() if name == "edge_weight" else data[name]).cpu() for name in inputs}
        if "edge_weight" not in inputs and "adj_t" in given:
            check_unweighted(data.adj_t)
        for name, value in edges.items():
            if value.dim() == 0 or value.size(0) != data.adj_t.values().numel():
                raise ValueError(
                    f"data.{name} has shape {list(value.shape)}, but must have a row for each of the "
                    f"{data.adj_t.values().numel()} edges: parts are given what edges have, and nodes' x alone"
                )
        graph = Graph(data, edges, in_order(given, data.adj_t))
        self._network: Network = (
            Reversible(model, graph, exact) if isinstance(model, RevGNN) else Layered(model, graph, keep_every)
        )
        every = [data.adj_t.crow_indices(), data.adj_t.col_indices(), data.x, data.y, data.train_mask, *edges.values()]
        names = ["rows of edges", "edges", "x", "y", "train_mask", *edges]
        bits = (
            ()
            if store is None and shares is None
            else tuple((tuple(each.shape), str(each.dtype), bits_of(each)) for each in every)
        )
        self._graph = (self._ptr.tolist(), inputs, bits)
        self._graph_bits = dict(zip(names, bits, strict=False))
        shapes, spare = self._network.tables(), 0 if folder is None else int(self._ptr.diff().max())
        tables = (
            Tables(self.num_nodes, shapes, folder, self._network.moved, spare)
            if shares is None
            else RankTables(shapes, shares)
        )
        # Behind the tables, which no other process has open: its parts are not written over.
        nodes = None if shares is None else shares.nodes
        parts_folder = None if folder is None else folder / "parts"
        self.parts = Parts(data, self._ptr, inputs, self._network.further, parts_folder, memory, nodes)
        marks = None if folder is None else folder / "marks.table"
        places = self._network.places(len(self.parts)) + len(self.parts.bounds)
        rows = PlainRows(places, self._network.mark, torch.uint8, marks)
        self._space = Space(tables, self.parts, Worker(), folder, rows, Crossing(memory), shares)
        self._network.settle(self._space, graph)
        self._team = None if shares is None else Team(shares, list(model.parameters()))
        self.last_drift: float | None = None
        self.last_gramian: Tensor | None = None
        self.last_weights: Tensor | None = None
        self.certificate = Certificate()

    # What users call.

    def __reduce__(self) -> Any:
        raise TypeError(
            "a WholeGraph cannot be copied or pickled, as its tables and files are its own: copy the network, and make "
            "another WholeGraph with the copy"
        )

    @property
    def tables(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """Rows, entries in a row and their type, of each table that there is; steps of several losses make more."""
        return self._space.tables.sizes

    def check(self) -> None:
        """Check that a step can be taken in the modes in which the network is; nothing of it is computed.

        Raises:
            TypeError: the network was changed into one of another kind.
            ValueError: batch normalisation in training mode, a layer that looks further than to neighbours, ...
        """
        self._check()

    def step(self, criterion: Criterion, weighting: Weighting | None = None) -> Tensor:
        """Do forward and backward over the whole graph; return the loss, or the losses.

        Gradients are added to ``.grad`` when all is done, of all parameters that were reached, the criterion's own too;
        hooks on parameters are called then. Buffers that layers write (a power iteration of ``spectral_norm``) are
        written once, as by the network itself. After an error gradients and buffers are as before.

        With a weighting there are m losses, and the gradient is Jᵀ w, of weights w that it makes of the Gramian of the
        losses' gradients (arXiv 2406.16232). The Gramian takes a forward pass, and a backward pass with m rows for each
        node: m N C entries for each table of gradients. As many losses as ``row_bytes`` allows are held at a time, and
        one part is computed once for all. A layer's rows of parameters are squared when the layer is
        done. Then the weighted gradient takes a step of its own, with the same random numbers. Both are compared,
        wᵀ G w = ‖Jᵀ w‖².

        Args:
            criterion: called with the logits [T_p, out_channels] and labels [T_p, ...] of a part's training nodes; the
                results, scalars, are added up over parts. So it is a sum, such as
                ``F.cross_entropy(logits, y, reduction="sum") / number``. With a weighting it returns vectors [m], of
                the same m for each part.
            weighting: from the Gramian [m, m] to weights [m], as for :meth:`recollect.autogram.Engine.backward`.

        Returns:
            The loss, a scalar; with a weighting the losses [m].

        Raises:
            TypeError: ``weighting`` cannot be called, or returns no tensor.
            ValueError: batch normalisation in training mode, which goes over all nodes at once; a layer writes into a
                buffer what depends on its rows; the network was changed into one for which this was not made; the
                criterion, or the weighting, returns another shape.
            RuntimeError: another step or evaluation is under way.
            RebuildError: a block did not compute the same bits again.
            GramianError: the gradient is not of the size that the Gramian says.
            LatticeError: an activation is out of the range in which the stream is exact.
        """
        check_weighting(weighting)
        with self._alone("step"):
            state = self._begun("a step", several=weighting is not None)
            if self._folder is not None:
                self._space.tables.forget()
            self._save(state)
            return self._run(state, criterion, weighting, None)

    def compute_gramian(self, criterion: Criterion) -> Tensor:
        """Return the Gramian of the gradients of several losses, and leave ``.grad`` alone.

        Args:
            criterion: returns m losses [m] of a part's training nodes; see :meth:`step`.

        Returns:
            [m, m], in the losses' type.

        Raises:
            RuntimeError: a step is under way, or unfinished in the store, and its tables would be overwritten; others
                as for :meth:`step`.
        """
        with self._alone("compute_gramian"):
            self._check_finished("the Gramian")
            self._begun("a Gramian", several=True)
            with self._writing() as writes:
                return self._several(criterion, writes)[1]

    def resume(self, criterion: Criterion, weighting: Weighting | None = None) -> Tensor:
        """Go on with a step whose process ended, and return its loss: the same numbers as without the break.

        The network must have the parameters that it had then; random numbers go on as they would have. A step of
        several losses goes on with its weighted gradient; a Gramian that was not complete begins anew.

        Args:
            criterion: the same as in the step.
            weighting: the same as in the step.

        Raises:
            TypeError: the step has several losses, and there is no weighting; or the other way round.
            RuntimeError: there is no unfinished step in the store, or the network is another one; or the step reached
                parameters that are not the network's.
            HistoryFileError: what the step wrote was changed.
        """
        check_weighting(weighting)
        with self._alone("resume"):
            return self._resume(criterion, weighting)

    @property
    def unfinished(self) -> bool:
        """Whether there is a step in the store that :meth:`resume` can go on with."""
        return self._folder is not None and (self._folder / "step.pt").is_file()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Return the logits of all nodes [N, out_channels], in evaluation mode, on the CPU; with shares, of its own.

        Raises:
            RuntimeError: a step is under way, or unfinished in the store, and its tables would be overwritten.
        """
        with self._alone("evaluate"), in_evaluation(self.model):
            self._check_finished("an evaluation")
            self._check()
            if self._team is not None:
                state = {"graph": self._graph_bits, "model": self._digest()}
                self._team.agree("an evaluation", state, len(self.parts.trained))
            with self._writing() as writes, self._telling():
                run = self._network.step(self._space, Run(None, writes=writes))
                run.forward()
                logits = torch.cat([run.logits(self.parts[number]).cpu() for number in range(len(self.parts))])
                self._space.crossing.settle()
            if self._team is not None:
                self._team.ranks.wire.meet("the end of an evaluation")
            return logits

    # How.

    def _check(self) -> None:
        """Check the network, and take notice of where it is."""
        device = device_of(self.model)
        if self._team is not None and device.type != "cpu":
            raise ValueError(
                f"the network is on {device}, but over ranks the parts of a WholeGraph are computed on the CPU: call "
                "model.cpu() before, or leave shares out"
            )
        self._space.crossing.aim(device)
        with self._undrawn():
            self._network.check()

    def _undrawn(self) -> contextlib.AbstractContextManager[None]:
        """Let the network run on small graphs, and draw as if it had not."""
        crossing = self._space.crossing
        return RandomState([crossing.device]).replayed() if crossing.moves else contextlib.nullcontext()

    def _save(self, state: dict[str, Any]) -> None:
        if self._folder is not None:
            save(self._folder / "step.pt", self._space.crossing.on_host(state))

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Have the tables for oneself."""
        if torch.is_inference_mode_enabled() and what != "evaluate":
            raise RuntimeError(f"{what}() computes gradients: call it outside of torch.inference_mode()")
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                f"{what}() was called while a step or an evaluation of the same WholeGraph is under way, in the "
                "criterion or in another thread: its tables hold one at a time. Wait for its end, or make another one"
            )
        try:
            yield
        finally:
            self._space.worker.drain()  # after an error it may be writing
            self._busy.release()

    def _check_finished(self, what: str) -> None:
        if self.unfinished:
            raise RuntimeError(
                f"there is an unfinished step in {self._folder}, whose tables {what} would overwrite: call "
                f"resume(criterion) first, or give it up by removing {self._folder}/step.pt"
            )

    def _telling(self) -> contextlib.AbstractContextManager[None]:
        """Let the other ranks know of an error within, where they would wait for this one."""
        return contextlib.nullcontext() if self._team is None else self._team.telling(self._space.worker)

    def _begun(self, what: str, several: bool) -> dict[str, Any]:
        """Return what a step begins with."""
        self._check()
        with DRAWING:
            random = torch.get_rng_state()
        kept = self._folder is not None or self._team is not None
        state = {"random": random, "model": self._digest() if kept else "", "several": several, "weighed": None}
        if self._team is not None:
            self._team.agree(what, state | {"graph": self._graph_bits}, len(self.parts.trained))
        return state | {"name": secrets.randbits(62)}

    def _resume(self, criterion: Criterion, weighting: Weighting | None) -> Tensor:
        path = None if self._folder is None else self._folder / "step.pt"
        if path is None or not path.is_file():
            raise RuntimeError("there is no unfinished step to go on with: call step(criterion)")
        state: dict[str, Any] = load(path)
        if state["several"] != (weighting is not None):
            kind = "several losses: give its weighting too" if state["several"] else "one loss: give no weighting"
            raise TypeError(f"the unfinished step in {self._folder} is of {kind}")
        if state["model"] != self._digest():
            raise RuntimeError(
                f"the network or the graph is not the one with which the step in {self._folder} began: load the "
                "settings and parameters of that time first"
            )
        self._check()
        with DRAWING:
            torch.set_rng_state(state["random"])
        journal = self._space.tables.last() if state["weighed"] is not None or not state["several"] else None
        return self._run(state, criterion, weighting, journal)

    def _run(
        self, state: dict[str, Any], criterion: Criterion, weighting: Weighting | None, journal: dict[str, Any] | None
    ) -> Tensor:
        """Do a step, or what is left of it."""
        with self._writing() as writes:
            return self._run_on(state, criterion, weighting, Run(None, journal=journal, writes=writes))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Writes]:
        """Let the network write its buffers once; after an error they are as before."""
        writes = Writes()
        try:
            with self._undrawn():
                self._network.watch(writes)
            yield writes
        except BaseException:
            writes.undo()
            raise
        writes.settle()

    def _run_on(self, state: dict[str, Any], criterion: Criterion, weighting: Weighting | None, run: Run) -> Tensor:
        if weighting is not None and state["weighed"] is None:
            losses, gramian = self._several(criterion, run.writes)
            with self._telling():
                weights = weigh(weighting, losses, gramian)
            if self._team is not None:
                weights = self._team.weights(weights)
            with DRAWING:
                state = state | {"weighed": asdict(Weighed(losses, gramian, weights, torch.get_rng_state()))}
                torch.set_rng_state(state["random"])
            self._save(state)
        found, there = state["weighed"], self._space.crossing.rows
        weighed = None if found is None else Weighed(**{k: v if k == "random" else there(v) for k, v in found.items()})
        objectives = OneLoss(criterion, None if weighed is None else weighed.weights)
        name = None if self._folder is None else state["name"]
        step, loss = self._swept(replace(run, objectives=objectives, name=name))
        gradients = step.gradients
        if self._team is not None:
            loss, gradients = self._team.summed(loss, gradients)
        if weighed is not None:
            self.last_gramian, self.last_weights, loss = weighed.gramian, weighed.weights, weighed.losses
            with DRAWING:
                torch.set_rng_state(weighed.random)
            certify(self.certificate, weighed, gradients.values())
            self._space.crossing.settle()
        accumulate(gradients)
        if self._folder is not None:
            (self._folder / "step.pt").unlink(missing_ok=True)
        self._space.tables.forget()
        return loss

    def _several(self, criterion: Criterion, writes: Writes) -> tuple[Tensor, Tensor]:
        """Return several losses [m] and their Gramian [m, m]."""
        uses = self._network.uses()
        largest = int(self._ptr.diff().max()) * self._network.row_bytes
        fit = max(1, self._row_bytes // largest)
        objectives = (
            SeveralLosses(criterion, uses, fit) if self._team is None else self._team.losses(criterion, uses, fit)
        )
        step, losses = self._swept(Run(objectives, writes=writes))
        if self._team is not None:
            losses = self._team.sum_of(losses)
        if step.gradients:
            names = ", ".join(name for name, p in self.model.named_parameters() if p in step.gradients)
            raise RuntimeError(f"{names}: used by a layer that did not use it on a small graph")
        assert objectives.gramian is not None
        self.last_gramian = objectives.gramian.to(losses.dtype)
        return losses, self.last_gramian

    def _swept(self, run: Run) -> tuple[Step, Tensor]:
        """Go forward and backward."""
        with DRAWING:
            self._network.draw()
            seed = int(torch.randint(2**62, (1,), generator=_beside()))
        with self._telling():
            step = self._network.step(self._space, replace(run, seed=seed))
            loss = step.run()
        self._space.crossing.settle()
        self.last_drift = step.drift
        return step, loss

    def _digest(self) -> str:
        """Return what tells this network, with its parameters, and this division from others."""
        model = self.model
        modes = [module.training for module in model.modules()]
        said = (self._graph, self._network.settings(), repr(model), settings_of(model), modes)
        digest = hashlib.sha256(repr(said).encode())
        tensors = model.state_dict()
        bits = self._space.crossing.on_host([bits_of(tensor) for tensor in tensors.values()])
        for (name, tensor), own in zip(tensors.items(), bits, strict=True):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {None if own is None else int(own)}".encode())
        return digest.hexdigest()


def _beside() -> torch.Generator:
    """Return a generator that starts from torch's state without moving it."""
    return torch.Generator().set_state(torch.get_rng_state())
