"""Networks whose mini-batches get the gradients that go through nodes outside of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from recollect.autoscale._batch import Batch
from recollect.autoscale._combination import CombinedPass
from recollect.autoscale._compensation import Compensation, Steady
from recollect.autoscale._history_network import HistoryGNN
from recollect.autoscale._refresh import GradientSweep, Loss
from recollect.autoscale._separable import Way
from recollect.autoscale.histories._gradients import GradientHistories
from recollect.autoscale.loader._outward import Outward
from recollect.autoscale.loader._sub_data import SubData
from recollect.messages import values_of

__all__ = ["CorrectedGNN"]


class CorrectedGNN(HistoryGNN):
    """A network with histories, which may have histories of gradients too.

    Attributes:
        compensate: whether there are histories of gradients.
        gradients: they, or ``None``.
    """

    gradients: GradientHistories | None
    _written_in: ClassVar[str] = "forward_layer"
    _steady: Steady  # layers that do the same in training, as far as they are known
    _ways: dict[int, Way]  # of sending gradients back through each layer, as far as they are known

    @abstractmethod
    def mini_inference(self, loader: Iterable[SubData]) -> Tensor:
        """Fill the histories of embeddings, layer by layer."""

    def _make_histories(self) -> None:
        if self.combine is not None and not self.compensate:
            raise ValueError("combine= is part of the correction of histories: give compensate=True too")
        super()._make_histories()
        if self.compensate and not self.keep_histories:
            raise ValueError(
                f"{type(self).__name__} has keep_histories=False, but compensate=True needs histories and layers that "
                f"are written in {self._written_in} alone"
            )
        self.keep_gradients()

    def keep_gradients(self) -> None:
        """Make the histories of gradients, empty, if there shall be any; they take the place of earlier ones."""
        options = self.history_options
        self._ways, self._steady = {}, {}
        before, self.gradients = self._modules.get("gradients"), None
        if self.compensate:
            shares = self.tables[0].shares if self.tables else None
            widths = self._gradient_widths()
            self.gradients = GradientHistories(
                self.num_nodes, widths, options.device, options.dtype, options.path, shares
            )
            if isinstance(before, GradientHistories):  # those of a network that this is a copy of
                self.gradients.to(before.place)

    def _gradient_widths(self) -> list[int]:
        """Return the widths of the histories of gradients, apart from the last one's, which its first rows decide."""
        return [history.embedding_dim for history in self.tables[1:]]

    def correction(
        self, batch: Batch, outward: Outward | None, inputs: dict[str, Any], x: Tensor, adj_t: Tensor
    ) -> Compensation | None:
        """Return what completes the gradients of a mini-batch between its layers, if they shall be.

        Raises:
            ValueError: see :meth:`checked_outward`; or the outward edges are others than needed.
        """
        outward = self.checked_outward(outward, adj_t, bool(self._ways))
        if outward is None or self.gradients is None:
            return None
        arguments = self, self.gradients, self.tables, batch, outward, inputs, self._ways, adj_t, self._steady
        if self.combine is not None:
            return CombinedPass(self.combine, x, self._exchange, *arguments)
        return Compensation(*arguments)

    def checked_outward(self, outward: Outward | None, adj_t: Tensor, known: bool) -> Outward | None:
        """Return the outward edges of a mini-batch if its gradients shall be completed.

        Args:
            outward: those that it has.
            adj_t: its own edges [B, B + halo].
            known: whether weights of edges were compared in an earlier step.

        Raises:
            ValueError: they shall be, and the mini-batch has no outward edges, or its own edges have other weights than
                the loader's graph.
        """
        if self.gradients is None or not (torch.is_grad_enabled() or (self.combine and outward is not None)):
            return None
        if outward is None:
            if not self.training:
                return None
            raise ValueError(
                "compensate=True needs the mini-batch's edges to other nodes: SubgraphLoader(..., outward=True) brings "
                "them; call model(batch.data.x, batch.data.adj_t, *batch[1:], outward=batch.data.outward)"
            )
        # Numbers are compared once, before the first step, since that waits for the device.
        if values_of(adj_t).requires_grad or not (known or _has_weights(adj_t, outward)):
            raise ValueError(
                "the weights of adj_t are others than those of the loader's graph (dropped, scaled or learnt), and the "
                "edges to nodes outside have the loader's: with compensate=True change them in forward_layer, where "
                "attributes of edges come from inputs=, or in the graph before the loader is made"
            )
        if outward.form == "induced" and self.combine is None:
            raise ValueError(
                'outward="induced" of the loader is for combine=Combination(...): without it give outward=True'
            )
        return outward

    def refresh(self, loader: Iterable[SubData], loss: Loss | None = None) -> Tensor:
        """Make the histories those of the present parameters: embeddings, and with ``compensate=True`` gradients too.

        Both are computed layer by layer in mini-batches, embeddings from the first layer to the last and gradients from
        the last to the second, in evaluation mode. The next mini-batch's gradient is then exact. It costs about two
        forward passes and a backward pass over the graph.

        Args:
            loader: yields every node once, in the same mini-batches each time: an EvalSubgraphLoader. Over ranks, the
                nodes of this one, in as many mini-batches as every other has.
            loss: from a mini-batch's output [B, out_channels] and the mini-batch to its loss, a scalar: as in training,
                with the same factor for each node. Needed with ``compensate=True``.

        Returns:
            The output [num_nodes, out_channels], as of :meth:`mini_inference`; over ranks, of this rank's nodes.

        Raises:
            ValueError: ``loss`` is missing; see :meth:`mini_inference` too.
        """
        if self.gradients is not None and loss is None:
            raise ValueError("compensate=True: refresh(loader, loss) needs the loss of a mini-batch, loss(out, batch)")
        out = self.mini_inference(loader)
        if self.gradients is not None and loss is not None:
            self._sweep_gradients(out.size(0), loader, self.gradients, loss)
        return out

    def _sweep_gradients(
        self, num_nodes: int, loader: Iterable[SubData], gradients: GradientHistories, loss: Loss
    ) -> None:
        """Make the histories of gradients exact, when those of embeddings are."""
        GradientSweep(self, num_nodes, loader, self.tables, gradients, loss).run()


def _has_weights(adj_t: Tensor, outward: Outward) -> bool:
    """Return whether the sum of the weights, and that of their squares, are those of the loader's graph."""
    values = values_of(adj_t).detach()
    rounding = max(1e-3, 2 * torch.finfo(values.dtype).eps)
    values = values.double()
    return torch.allclose(torch.stack([values.sum(), values.square().sum()]), outward.weights.to(values), rtol=rounding)
