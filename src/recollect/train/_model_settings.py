"""The settings of each kind of network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recollect.train._about import about

__all__ = ["ModelSettings", "RevGNNSettings", "ScalableSettings"]


@dataclass(frozen=True)
class ModelSettings:
    """Which network: what those of every kind have."""

    name: str = field(metadata=about("label of the model in the run's files"))
    num_layers: int = field(metadata=about("layers", low=1))
    hidden_channels: int = field(metadata=about("channels of the layers", low=1))
    dropout: float = field(metadata=about("dropout probability", low=0, below=1))
    kind: str = field(
        metadata=about(
            "network of recollect.models",
            choices=("revgnn", "gcn", "gat", "gcn2", "appnp", "pna", "pna_jk", "gin"),
        )
    )


@dataclass(frozen=True)
class RevGNNSettings(ModelSettings):
    """A deep reversible network; see `recollect.models.RevGNN`."""

    num_groups: int = field(metadata=about("groups of a reversible layer; hidden_channels is divisible by them", low=2))
    conv: str = field(metadata=about("convolution: gat, gcn, gen, gin, graphconv or sage"))
    conv_kwargs: dict[str, Any] = field(metadata=about("options of the convolution, as in model.conv_kwargs.aggr=max"))
    edge_features: bool = field(
        metadata=about("give the graph's edge features, if it has any, to a gat or gen convolution")
    )
    shared_dropout: bool = field(metadata=about("one dropout mask for all layers, as in the paper"))
    norm: str | None = field(metadata=about("normalisation in the layers", choices=("layer", "batch")))
    tied: bool = field(metadata=about("all layers share one set of parameters"))
    anchor_every: int | None = field(metadata=about("keep every s-th activation, to bound drift; null: none", low=1))
    disable: bool = field(metadata=about("keep every activation: train without recollecting"))


@dataclass(frozen=True)
class ScalableSettings(ModelSettings):
    """A network whose layers can take their neighbours from histories; see `recollect.autoscale.ScalableGNN`."""

    adjacency: str = field(
        metadata=about(
            "edges; with self-loops; and by the roots of degrees",
            choices=("plain", "loops", "symmetric"),
        )
    )
    options: dict[str, Any] = field(metadata=about("further options of this network"))
