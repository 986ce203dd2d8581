"""A step over the whole graph, part by part."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autoscale import to_adj_t
from recollect.autoscale.histories import PlainRows, Worker
from recollect.autoscale.loader import checked_ptr
from recollect.frames import Lattice, bits_of, check_exact, digits_of
from recollect.messages.reach import DRAWING, Probe, Reach, kind_of
from recollect.models import RevGNN
from recollect.outofcore._checks import check_graph, check_network, check_rows
from recollect.outofcore._masks import Masks, width_of
from recollect.outofcore._parts import Parts
from recollect.outofcore._step import Criterion, Step
from recollect.outofcore._tables import Tables, load, save

__all__ = ["WholeGraph"]

_FEATURES = 64  # rows of features that are kept to see what is done with them


@dataclass(frozen=True)
class _Observed:
    name: str
    kind: tuple[Any, ...]
    reach: Reach


class WholeGraph:
    """Training steps of a reversible network over a whole graph, exact, in memory that does not grow with the depth.

    ``step`` leaves in ``.grad`` what one backward pass over the whole graph would. Memory holds the parameters and a
    few parts with their neighbours; two tables for each group lie in host memory or in files, 8 N C bytes in float32
    for N nodes and C channels, whatever the depth.

    Args:
        model: the network, in float32 or float64, on the CPU.
        data: the graph, its nodes in the order of the parts (see :func:`~recollect.autoscale.permute`), with ``x``,
            ``y``, ``train_mask`` and ``edge_index`` or ``adj_t``. It is read once: changes afterwards are not seen, and
            must not be made in ``x``. With ``store`` it is not needed afterwards.
        ptr: [P + 1] int64: part p has the nodes from ``ptr[p]`` to ``ptr[p + 1]``.
        store: a folder for tables and parts; ``None``: host memory. One process at a time has it open.
        exact: as in :class:`~recollect.reversible.GroupAddRev`; the network's own where it has one. ``False``: the
            activations come back up to rounding.
        inputs: names of what the convolutions get of each edge beside ``edge_index``, in their order, such as
            ``("edge_weight",)``.
        memory: bytes of parts that stay in memory beside their files in ``store``; others are mapped for each block,
            with what convolutions make of their edges.

    Raises:
        TypeError: another kind of network.
        ValueError: ``ptr`` does not cover the graph; a block looks further than to neighbours; something is missing, or
            requires a gradient; there are hooks on the network or its layers, which would not be called.
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
    """

    def __init__(
        self,
        model: RevGNN,
        data: Any,
        ptr: Tensor,
        store: str | Path | None = None,
        *,
        exact: bool | int = True,
        inputs: tuple[str, ...] = (),
        memory: int = 128 << 20,
    ) -> None:
        check_network(model)
        check_graph(data, tuple(inputs))
        self.model = model
        self._inputs = tuple(inputs)
        self._ptr = checked_ptr(ptr, int(data.num_nodes))
        own = model.layer(0).exact
        self.exact = check_exact(own if own is not False and exact is True else exact)
        self._dtype = model.project.weight.dtype
        self._busy = threading.Lock()
        digits = digits_of(self.exact, self._dtype)
        self._lattice = None if digits is None else Lattice(digits)
        self.num_groups, self.num_layers = model.num_groups, model.num_layers
        self.num_nodes = int(self._ptr[-1])
        self._hidden = model.project.out_features
        self._width = self._hidden // self.num_groups
        folder = None if store is None else Path(store)
        self._folder = folder
        given, data = data, to_adj_t(data)
        edges = {name: (data.adj_t.values() if name == "edge_weight" else data[name]).cpu() for name in self._inputs}
        self._probe = Probe(edges, self._width, self._dtype)
        self._kinds: dict[tuple[Any, ...], bool] = {}  # whether convolutions can be computed for a part's nodes alone
        self._kind_at: dict[tuple[int, int], tuple[Any, ...]] = {}
        self._in_order = _in_order(given, data.adj_t)
        self._further = self._looks_further()
        graph = [data.adj_t.crow_indices(), data.adj_t.col_indices(), data.x, data.y, data.train_mask, *edges.values()]
        self._graph = () if store is None else tuple((tuple(each.shape), bits_of(each)) for each in graph)
        self._features = data.x[:_FEATURES].cpu().clone()
        with _evaluating(model):
            check_rows(model, self._features)
        groups = range(self.num_groups)
        widths = {f"{kind}{i}": self._width for kind in ("x", "g") for i in groups}
        dtypes = dict.fromkeys(widths, self._dtype)
        for mask in ("mask", "last_mask") if model.dropout > 0 else ():
            widths[mask], dtypes[mask] = width_of(self._hidden), torch.uint8
        self._tables = Tables(self.num_nodes, widths, dtypes, folder)
        # Behind the tables, which no other process has open: its parts are not written over.
        self.parts = Parts(
            data, self._ptr, self._inputs, self._further, None if folder is None else folder / "parts", memory
        )
        self._masks: dict[str, Masks] = {
            name: Masks(self._tables[name], self._hidden) for name in widths if name.endswith("mask")
        }
        places = self.num_layers * self.num_groups * len(self.parts)
        self._marks = PlainRows(places, 8, torch.uint8, None if folder is None else folder / "marks.table")
        self._worker = Worker()
        self.last_drift: float | None = None

    # What users call.

    def step(self, criterion: Criterion) -> Tensor:
        """Do forward and backward over the whole graph; return the loss.

        Gradients are added to ``.grad`` when all is done; after an error they are as before.

        Args:
            criterion: called with the logits [T_p, out_channels] and labels [T_p, ...] of a part's training nodes; the
                results, scalars, are added up over parts. So it is a sum, such as
                ``F.cross_entropy(logits, y, reduction="sum") / number``.

        Raises:
            ValueError: batch normalisation in training mode, which goes over all nodes at once; the network was changed
                into one for which this was not made.
            RuntimeError: another step or evaluation is under way.
            RebuildError: a block did not compute the same bits again.
            LatticeError: an activation is out of the range in which the stream is exact.
        """
        with self._alone("step"):
            self._check_modules()
            self._tables.forget()
            with DRAWING:
                random = torch.get_rng_state()
            state = {"random": random, "model": self._digest(), "name": secrets.randbits(62)}
            if self._folder is not None:
                save(self._folder / "step.pt", state)
            return self._run(state, criterion, None)

    def resume(self, criterion: Criterion) -> Tensor:
        """Go on with a step whose process ended, and return its loss: the same numbers as without the break.

        The network must have the parameters that it had then; random numbers go on as they would have.

        Args:
            criterion: the same as in the step.

        Raises:
            RuntimeError: there is no unfinished step in the store, or the network is another one.
            HistoryFileError: what the step wrote was changed.
        """
        with self._alone("resume"):
            return self._resume(criterion)

    def _resume(self, criterion: Criterion) -> Tensor:
        path = None if self._folder is None else self._folder / "step.pt"
        if path is None or not path.is_file():
            raise RuntimeError("there is no unfinished step to go on with: call step(criterion)")
        state: dict[str, Any] = load(path)
        if state["model"] != self._digest():
            raise RuntimeError(
                f"the network or the graph is not the one with which the step in {self._folder} began: load the "
                "parameters of that time first"
            )
        self._check_modules()
        with DRAWING:
            torch.set_rng_state(state["random"])
        return self._run(state, criterion, self._tables.last())

    @property
    def unfinished(self) -> bool:
        """Whether the store has a step that ended in the middle, for :meth:`resume`."""
        return self._folder is not None and (self._folder / "step.pt").is_file()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Return the logits of all nodes [N, out_channels], in evaluation mode.

        Raises:
            RuntimeError: a step is under way, or unfinished in the store, and its tables would be overwritten.
        """
        with self._alone("evaluate"), _evaluating(self.model):
            if self.unfinished:
                raise RuntimeError(
                    f"there is an unfinished step in {self._folder}, whose tables an evaluation would overwrite: call "
                    f"resume(criterion) first, or give it up by removing {self._folder}/step.pt"
                )
            check_network(self.model)
            self._accept(self._observe(), self._further)
            check_rows(self.model, self._features)
            run = Step(self, None, None, 0)
            run.forward()
            found = []
            for number in range(len(self.parts)):
                part = self.parts[number]
                found.append(self.model.classify(run.groups_of(part)).cpu())
            return torch.cat(found)

    # How.

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
            self._worker.drain()  # after an error it may be writing
            self._busy.release()

    def _run(self, state: dict[str, Any], criterion: Criterion, journal: dict[str, Any] | None) -> Tensor:
        with DRAWING:
            if self.model.training and self.model.dropout > 0:
                for masks in self._masks.values():
                    masks.p = self.model.dropout
                # The same numbers in the same order as those that the network itself draws for the whole graph.
                if self.model.shared_dropout:
                    self._masks["mask"].draw(self.parts.bounds)
                self._masks["last_mask"].draw(self.parts.bounds)
            seed = int(torch.randint(2**62, (1,), generator=_beside()))
        run = Step(self, criterion, journal, seed, state["name"])
        run.forward()
        loss = run.turn()
        run.backward()
        for parameter, gradient in run.gradients.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if self._folder is not None:
            (self._folder / "step.pt").unlink(missing_ok=True)
        self._tables.forget()
        return loss

    def _check_modules(self) -> None:
        check_network(self.model)
        model = self.model
        if model.dropout > 0 and not self._masks:
            raise ValueError(
                f"dropout={model.dropout} was set after the WholeGraph was made, which has no room for masks: make "
                "another WholeGraph"
            )
        if model.project.weight.dtype != self._dtype:
            raise ValueError(
                f"the network is in {model.project.weight.dtype} now, and was in {self._dtype} when the WholeGraph was "
                "made: make another WholeGraph"
            )
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"{name} is a {type(module).__name__}, which in training normalises over all nodes at once: parts "
                    'have other means. Use norm="layer" (LayerNorm), or model.eval() to keep its statistics'
                )
        self._accept(self._observe(), self._further)
        check_rows(self.model, self._features)

    def _looks_further(self) -> bool:
        """Return whether parts need the edges into their neighbours too, as blocks that go by degrees do."""
        with _evaluating(self.model):
            observed = self._observe(every=True)
        self._refuse([each for each in observed if not (each.reach.near or each.reach.further)])
        # What is refused in training mode alone, such as batch normalisation, is refused in a step.
        observed += [each for each in self._observe(every=True) if each.reach.near or each.reach.further]
        further = not all(each.reach.near for each in observed)
        self._accept(observed, further)
        return further

    def _observe(self, every: bool = False) -> list[_Observed]:
        """Return what blocks need, in the modes in which they are: one of each new kind, or all."""
        found, seen, known = [], set(), set(self._kinds)
        for index in range(self.num_layers):
            layer = self.model.layer(index)
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            for group, block in enumerate(layer._blocks()):
                kind = self._kind_at[index, group] = kind_of(block)
                if kind not in known or every:
                    name = f"layer {index}, block {group} ({type(getattr(block, 'module', block)).__name__})"
                    found.append(_Observed(name, kind, self._probe.reach(block, name, brief=kind in known)))
                    known.add(kind)
        return found

    def _accept(self, observed: list[_Observed], further: bool) -> None:
        """Note kinds of blocks as such that can be computed part by part, or refuse them."""
        self._refuse([each for each in observed if not (each.reach.further if further else each.reach.near)])
        for each in observed:
            if each.reach.ordered and not self._in_order:
                raise ValueError(
                    f"{each.name}: what it returns depends on the order of the edges into a node, and in "
                    "data.edge_index their sources do not ascend, as they do in parts: sort them first, for example "
                    "by torch_geometric.utils.sort_edge_index(edge_index, sort_by_row=False)"
                )
        for each in observed:
            self._kinds[each.kind] = each.reach.alone(further) and self._kinds.get(each.kind, True)

    def computed_alone(self, layer: int, group: int) -> bool:
        """Return whether the convolutions of a block can be computed for the nodes of a part alone."""
        return self._kinds.get(self._kind_at[0 if self.model.tied else layer, group], False)

    def _refuse(self, observed: list[_Observed]) -> None:
        for each in observed:
            raise ValueError(
                f"{each.name}: what it returns for a node depends on more than the node and its neighbours, so that it "
                "cannot be computed part by part: it has several convolutions one after the other, goes against the "
                "edges, or normalises over nodes. Make each convolution a layer of its own, and use norms over "
                "channels (LayerNorm). If it was put into the network later, make another WholeGraph"
            )

    def _digest(self) -> str:
        """Return what tells this network, with its parameters, and this division from others."""
        model = self.model
        modes = [module.training for module in model.modules()]
        own = (self._ptr.tolist(), self.exact, self._inputs, repr(model), modes, model.dropout, model.shared_dropout)
        digest = hashlib.sha256(repr((*own, self._graph)).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {bits_of(tensor)}".encode())
        return digest.hexdigest()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _in_order(data: Any, adj_t: Tensor) -> bool:
    """Return whether the edges into each node are in the same order in a graph's edge index as in its adjacency."""
    edge_index = data.get("edge_index") if "adj_t" not in data else None
    if edge_index is None:
        return True
    by_target = torch.argsort(edge_index[1], stable=True)
    return torch.equal(edge_index[0][by_target].cpu(), adj_t.col_indices().long().cpu())


def _beside() -> torch.Generator:
    """Return a generator that starts from torch's state without moving it."""
    return torch.Generator().set_state(torch.get_rng_state())
