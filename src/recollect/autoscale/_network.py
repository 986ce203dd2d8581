"""Networks that are written layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from recollect._arguments import as_count
from recollect.frames import Source, checkpoint, in_backward
from recollect.messages import naming_pairs

__all__ = ["Between", "Follow", "LayeredGNN", "Run", "SourceOf", "Stage", "State"]

Between = Callable[[int, Tensor], Tensor]
SourceOf = Callable[[int, Tensor], Source]
State = dict[str, Any]
Follow = Callable[[int, Tensor, State, State], tuple[Tensor, State]]
Stage = Callable[[Tensor], tuple[Tensor, State]]
Run = Callable[[int, Stage, Tensor, State], tuple[Tensor, State]]


class LayeredGNN(nn.Module):
    """A network that is one function of the layer's number, so that its layers can be run in more than one order.

    A layer's ``state`` is a dict that lives as long as one pass over the layers. A layer may leave tensors in it for
    the layers after it: it assigns new ones, and does not change what is there in place.

    Args:
        num_layers: L, at least 1.
        recompute: run every layer in a frame, which keeps its input alone and runs it again in backward.

    Attributes:
        inputs: names of what the layers need beside ``x`` and ``adj_t``; they find it in their state.

    Raises:
        ValueError: a number is out of its range.
    """

    inputs: tuple[str, ...] = ()

    def __init__(self, num_layers: int, recompute: bool = False) -> None:
        super().__init__()
        self.num_layers = as_count("num_layers", num_layers)
        self.recompute = recompute

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the layer's output for the targets of the adjacency. To be written by each network.

        Args:
            layer: its number, from 0 to ``num_layers - 1``.
            x: its input for all sources [num_sources, in_channels]; the targets come first among them.
            adj_t: sparse CSR adjacency [num_targets, num_sources]; of the whole graph, both are all its nodes.
            state: see the class.

        Returns:
            [num_targets, out_channels].
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no forward_layer(layer, x, adj_t, state): training on mini-batches and "
            "layer-wise inference both derive from it"
        )

    def readout(self, x: Tensor, state: State) -> Tensor:
        """Return the network's output, row by row, of the last layer's; that itself, unless a network writes this.

        Args:
            x: [num_targets, channels].
            state: what the layers left.
        """
        return x

    def send_back(self, layer: int, x: Tensor, given: Tensor) -> Tensor | None:
        """Return what a layer's sources get from what their targets were given, if that is written out.

        Of a layer z_i = Σ a_ij g(x_j) + s(x_i), in evaluation mode and with gradients off. Without it the layer is run
        again where it is needed, for the same numbers in more time. It is compared with that once.

        Args:
            layer: its number.
            x: rows of its input [R, in_channels].
            given: v_j = Σ a_ij v_i of each row, with v_i the gradient of z_i [R, out_channels].

        Returns:
            (∂g(x_j) / ∂x_j)ᵀ v_j [R, in_channels]; ``None``: not written for this layer as it is now.
        """
        return None

    def run_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        """Return a layer's output, for the adjacency's targets alone; see :meth:`forward_layer`."""
        with naming_pairs(adj_t):
            out = self.forward_layer(layer, x, adj_t, state)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{type(self).__name__}.forward_layer({layer}, ...) returned a {type(out).__name__}, but must return a "
                "tensor [targets, channels] (is there a return?); what later layers need beside it belongs in state"
            )
        if out.size(0) < adj_t.size(0):
            raise ValueError(
                f"{type(self).__name__}.forward_layer({layer}, ...) returned {out.size(0)} rows, but its adjacency "
                f"has {adj_t.size(0)} targets: one for each is expected"
            )
        return out if out.size(0) == adj_t.size(0) else out[: adj_t.size(0)]

    def look_at_layers(self, x: Tensor, adj_t: Tensor, inputs: dict[str, Any]) -> None:
        """Refuse layers that need more than a mini-batch has, before the first one.

        Args:
            x: features of a mini-batch and its halo.
            adj_t: its edges [targets, sources].
            inputs: what the state begins with.

        Raises:
            ValueError: there is such a layer.
        """

    def conclude(self, state: dict[str, Any]) -> None:
        """Take notice of what the layers left in their state, at the end of a pass over the whole graph or a batch.

        Args:
            state: see the class.
        """

    def run_layers(
        self,
        x: Tensor,
        adj_t: Tensor,
        inputs: dict[str, Any],
        between: Between,
        source_of: SourceOf | None = None,
        follow: Follow | None = None,
        run: Run | None = None,
    ) -> Tensor:
        """Evaluate all layers.

        Args:
            x: features of all sources [num_sources, in_channels].
            adj_t: sparse CSR adjacency [num_targets, num_sources].
            inputs: what the state begins with.
            between: from the number of a layer but the last and its output, to the next layer's input.
            source_of: from the same, to what brings this input back in the next layer's frame, if layers have frames;
                called first. ``None``: inputs are kept.
            follow: from the number of a layer, its output, and the state before and after it, to output and state.
            run: runs a layer that has no frame: from its number, the layer as a function of its input, this, and the
                state before it, to output and state.

        Returns:
            The network's output [num_targets, out_channels].
        """
        state = dict(inputs)
        for layer in range(self.num_layers):
            source = None
            if layer:
                if self.recompute and source_of is not None:
                    source = source_of(layer - 1, x)
                x = between(layer - 1, x)
            stage = self._stage(layer, adj_t, state, follow is None)
            if self.recompute:
                x, after = checkpoint(stage, x, source=source)
            else:
                x, after = stage(x) if run is None else run(layer, stage, x, state)
            x, state = (x, after) if follow is None else follow(layer, x, state, after)
        if follow is not None:
            x = checkpoint(self.readout, x, state) if self.recompute else self.readout(x, state)
        if not in_backward():
            self.conclude(state)
        return x

    def _stage(self, layer: int, adj_t: Tensor, state: State, with_readout: bool) -> Stage:
        """Return a layer, the last one with the readout or without, as a function of its input that keeps ``state``."""

        def stage(x: Tensor) -> tuple[Tensor, State]:
            after = dict(state)
            out = self.run_layer(layer, x, adj_t, after)
            last = layer == self.num_layers - 1
            return self.readout(out, after) if last and with_readout else out, after

        return stage
