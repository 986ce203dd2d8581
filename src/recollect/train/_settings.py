"""Every setting of a run: its key, type, meaning, range and usual value. The options of groups stand in `_options`."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

from recollect.train._keys import About, key

__all__ = [
    "SEEDS",
    "DataSettings",
    "DatasetSettings",
    "ImportSettings",
    "MeasureSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "RevGNNSettings",
    "ScalableSettings",
    "Settings",
    "TrainingSettings",
    "about",
    "keys",
    "model_class",
    "values",
]

SEEDS = 2**32  # so many there are, from 0 on
_THREADS = 1025  # more are a slip of the keys, and some end the process with a signal
_MANY = 2**20  # a slip of the keys, rather than layers or channels
_RUNS = 10_001  # more are one too


_PARTS = ("training", "autoscale")
_CUT = ("training", "autoscale", "wholegraph")
_FILE = ("dataset", "file")
_GRAMIAN = ("objective", "iwrm", "multitask")


@dataclass(frozen=True)
class DatasetSettings:
    """Which graph."""

    name: str = key("graph, by its name in recollect.data", group="dataset")
    options: dict[str, Any] = key("options of recollect.data.load for this graph", dict)
    path: str | None = key(
        "file or folder of your own graph: .pt, .npz, .mat, .graphml, CSV files", None, path=True, needs=_FILE
    )
    features: str | None = key(
        "of the nodes, in the place of the file's: their degrees, or a learnt vector each; null: the file's",
        None,
        choices=("degree", "embedding"),
        needs=_FILE,
    )

    @property
    def label(self) -> str:
        """What the graph is called in a run's files: its name, or that of one's own file or folder."""
        return self.name if self.path is None else Path(self.path).expanduser().resolve().stem or self.name


@dataclass(frozen=True)
class ModelSettings:
    """Which network: what those of every kind have."""

    name: str = key("label of the model in the run's files")
    num_layers: int | None = key("layers", low=1, below=_MANY)
    hidden_channels: int | None = key("channels of the layers", low=1, below=_MANY)
    dropout: float | None = key("dropout probability", low=0, below=1)
    kind: str = key(
        "network of recollect.models, or one of your own",
        choices=("revgnn", "gcn", "gat", "gcn2", "appnp", "pna", "pna_jk", "gin", "import"),
        group="model",
    )

    family: ClassVar[str]
    """Which of `recollect.train.families` it belongs to."""

    @property
    def weighs_edges(self) -> bool:
        """Whether the network takes notice of the edges' weights."""
        return False

    @property
    def is_known(self) -> bool:
        """Whether the settings say which network it is; those of one that was given to `fit` do not."""
        return True


@dataclass(frozen=True)
class RevGNNSettings(ModelSettings):
    """A deep reversible network; see `recollect.models.RevGNN`."""

    family: ClassVar[str] = "reversible"

    num_layers: int = key("layers", low=1, below=_MANY)
    hidden_channels: int = key("channels of the layers", low=1, below=_MANY)
    dropout: float = key("dropout probability", low=0, below=1)
    num_groups: int = key("groups of a reversible layer; hidden_channels is divisible by them", 2, low=2)
    conv: str = key("convolution: gat, gcn, gen, gin, graphconv or sage", "sage")
    conv_kwargs: dict[str, Any] = key("options of the convolution, as in model.conv_kwargs.aggr=max", dict, free=True)
    edge_features: bool = key("give the graph's edge features, if it has any, to a gat or gen convolution", False)
    shared_dropout: bool = key("one dropout mask for all layers, as in the paper", True)
    norm: str | None = key("normalisation in the layers", "layer", choices=("layer", "batch"))
    tied: bool = key("all layers share one set of parameters", False)
    anchor_every: int | None = key("keep every s-th activation, to bound drift; null: none", None, low=1)
    disable: bool = key("keep every activation: train without recollecting", False)
    exact: bool = key("activations come back bit for bit, at any depth", False)


@dataclass(frozen=True)
class ScalableSettings(ModelSettings):
    """A network whose layers can take their neighbours from histories; see `recollect.autoscale.ScalableGNN`."""

    family: ClassVar[str] = "histories"

    num_layers: int = key("layers", low=1, below=_MANY)
    hidden_channels: int = key("channels of the layers", low=1, below=_MANY)
    dropout: float = key("dropout probability", low=0, below=1)
    adjacency: str = key("edges; with self-loops; and by the roots of degrees", choices=("plain", "loops", "symmetric"))
    options: dict[str, Any] = key("further options of this network", dict)

    @property
    def weighs_edges(self) -> bool:
        """Whether the network takes notice of the edges' weights."""
        return self.kind not in ("gat", "pna", "pna_jk")


@dataclass(frozen=True)
class ImportSettings(ModelSettings):
    """A network of one's own: what a function or a class in a module makes."""

    family: ClassVar[str] = "own"

    target: str | None = key("MODULE:NAME of a class or function that makes the network", None, code=True)
    folder: str | None = key(
        "folder in which the module is looked for first; null: the working directory", None, path=True, code=True
    )
    num_layers: int | None = key("given to the target if it names it; null: not", low=1, below=_MANY)
    hidden_channels: int | None = key("given to the target if it names it; null: not", low=1, below=_MANY)
    dropout: float | None = key("given to the target if it names it; null: not", low=0, below=1)
    kwargs: dict[str, Any] = key("further arguments of the target", dict, free=True)
    adjacency: str = key(
        "edges of adj_t, as of the networks with histories", "plain", choices=("plain", "loops", "symmetric")
    )

    @property
    def is_known(self) -> bool:
        """Whether there is a target."""
        return self.target is not None


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer of torch.optim."""

    name: str = key("optimizer", choices=("adam", "adamw", "sgd"), group="optimizer")
    lr: float = key("learning rate", low=0, below=1e6)
    weight_decay: float = key("weight decay", 0.0, low=0)
    other_weight_decay: float | None = key(
        "weight decay of what is in the model's nonreg_modules; null: as weight_decay", None, low=0
    )
    options: dict[str, Any] = key("further options of the optimizer", dict)


@dataclass(frozen=True)
class DataSettings:
    """Where raw files are."""

    root: str | None = key("folder of raw files; null: the environment's RECOLLECT_DATA, else ./data", None, path=True)
    seed: int = key("seed of generated graphs (sbm)", 0, low=0, below=SEEDS)
    features: str | None = key(
        "rows: each sums to 1; columns: mean 0, deviation 1; null: as is", None, choices=("rows", "columns")
    )


@dataclass(frozen=True)
class TrainingSettings:
    """The whole graph in each step, at once or part by part, or a few parts and histories for what is around them."""

    name: str = key(
        "full: steps on the whole graph; autoscale: on parts of it; wholegraph: on all of it, part by part",
        choices=("full", "autoscale", "wholegraph"),
        group="training",
    )
    num_parts: int = key("parts that the graph is cut into", 32, low=1, needs=_CUT)
    parts_per_batch: int = key("parts in each step, drawn anew in each epoch", 8, low=1, needs=_PARTS)
    partition: str = key(
        "how the graph is cut", "metis", choices=("metis", "kaminpar", "random", "contiguous"), needs=_CUT
    )
    partition_cache: str | None = key(
        "folder in which the parts of a graph are kept; null: none", None, needs=_CUT, path=True
    )
    history_device: str | None = key(
        "where histories are; null: on the model's device", None, choices=("cpu", "cuda"), needs=_PARTS
    )
    history_dtype: str = key(
        "numbers in histories", "float32", choices=("float32", "float16", "bfloat16", "int8"), needs=_PARTS
    )
    history_path: str | None = key("folder for histories on disk; null: in memory", None, needs=_PARTS, path=True)
    pool_size: int | None = key(
        "transfers of history rows beside the computation, at a time; null: none", None, low=1, needs=_PARTS
    )
    buffer_size: int | None = key("rows of each of them at most; null: all nodes", None, low=1, needs=_PARTS)
    edge_dropout: float = key("share of the edges that each step leaves out", 0.0, low=0, below=1)
    lipschitz: float = key("weight of lipschitz_loss (gin with model.options.noise)", 0.0, low=0)
    layerwise: bool = key("evaluate layer by layer on parts; false: on the whole graph", False, needs=_PARTS)
    store: str | None = key(
        "folder for tables and parts; null: in memory", None, needs=("training", "wholegraph"), path=True
    )
    compensate: str | None = key(
        "correct gradients by histories of gradients, with these edges to nodes outside; null: not",
        None,
        choices=("cut", "complete"),
        needs=_PARTS,
    )
    combine: float | None = key(
        "share, in [0, 1], of fresh rows in rows of nodes around a mini-batch, with compensate; null: not",
        None,
        low=0,
        needs=_PARTS,
    )
    combine_score: str = key(
        "what combine is multiplied by, of the share x of a node's edges that the mini-batch has",
        "x^2",
        choices=("1", "x", "x^2", "2x-x^2", "sin(x)"),
        needs=_PARTS,
    )
    refresh_every: int | None = key(
        "epochs between exact refreshes of all histories, with compensate; null: none", None, low=1, needs=_PARTS
    )
    errors_every: int | None = key(
        "epochs between measurements of the histories' true errors; null: none", None, low=1, needs=_PARTS
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """One loss, or many whose gradients' Gramian gives their weights; see `recollect.autogram`."""

    name: str = key(
        "mean: the mean loss; iwrm: an objective for each node; multitask: one for each label",
        choices=("mean", "iwrm", "multitask"),
        group="objective",
    )
    weighting: str = key(
        "weights from the Gramian, by recollect.aggregation",
        "upgrad",
        choices=(
            *("upgrad", "dualproj", "mgda", "pcgrad", "imtlg", "config", "cagrad", "alignedmtl", "nashmtl"),
            *("fairgrad", "mean"),
        ),
        needs=_GRAMIAN,
    )
    samples: int = key(
        "training nodes of a step, drawn anew; each costs a backward pass", 16, low=1, needs=("objective", "iwrm")
    )


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured after training."""

    enabled: bool = key("measure memory and time of training steps, reversible and with everything kept", True)
    depths: list[int] | None = key("depths of the curve memory against depth; null: up to num_layers by doubling", None)
    repeats: int = key("timed epochs of each mode; the median counts", 3, low=1)
    seconds: float = key("stop measuring further depths after this time", 60.0, low=0)


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    dataset: DatasetSettings
    model: ModelSettings
    optimizer: OptimizerSettings
    training: TrainingSettings
    objective: ObjectiveSettings
    data: DataSettings = field(default_factory=DataSettings)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    preset: str | None = key("published row that the other settings are of; null: none", None)
    seed: int = key("seed of parameters and dropout", 0, low=0, below=SEEDS)
    runs: int = key(
        "runs with seeds seed, seed + 1, ... (and splits, where a graph has several)", 1, low=1, below=_RUNS
    )
    epochs: int = key("epochs, at most", 45, low=1)
    patience: int | None = key("stop after this many epochs without a better validation score; null: never", 20, low=1)
    warmup_epochs: int = key("epochs over which the learning rate rises linearly to its value", 3, low=0)
    clip_norm: float | None = key("largest norm of the gradient; null: any", None, above=0)
    checkpoint_every: int | None = key(
        "epochs between checkpoints; null: as often as takes a tenth of the time", None, low=1
    )
    device: str = key("auto is cuda where there is one, else cpu; cpu, cuda, or torch's accelerator", "auto")
    devices: int = key(
        "processes on this machine that train on parts together, each with a share of them", 1, low=1, below=_THREADS
    )
    memory_budget: str | None = key(
        "what a step may allocate, gradients included: 500MB, 1.5 GB, 60%, or bytes; null: anything", None
    )
    precision: str = key("floating-point precision", "32-true", choices=("32-true", "bf16-mixed", "16-mixed"))
    threads: int | None = key(
        "CPU threads; null: one for a small graph, else torch's default", None, low=1, below=_THREADS
    )
    run_dir: str | None = key("folder of the run's files; null: runs/<date-time>_<dataset>_<model>", None, path=True)
    resume: str | None = key("go on with the run in this folder, or extend it by epochs=N", None, path=True)
    config: str | None = key("file of settings to begin with, such as a run's config.yaml", None, path=True)


def model_class(kind: str) -> type[ModelSettings]:
    """The settings that a kind of network has."""
    return {"revgnn": RevGNNSettings, "import": ImportSettings}.get(kind, ScalableSettings)


@functools.cache
def keys(kind: str | None = None) -> Mapping[str, About]:
    """Key -> what is known of it, in the order of the classes.

    Args:
        kind: of the network whose keys are among them; None: those of all, and what several have as of the first.
    """
    models = [RevGNNSettings, ScalableSettings, ImportSettings] if kind is None else [model_class(kind)]
    known: dict[str, About] = {}

    def walk(cls: Any, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            name, hint = prefix + item.name, hints[item.name]
            if dataclasses.is_dataclass(hint):
                for group in models if hint is ModelSettings else [hint]:
                    walk(group, f"{name}.")
            else:
                known.setdefault(name, dataclasses.replace(item.metadata["about"], type=hint))

    walk(Settings, "")
    return types.MappingProxyType(known)


def about(name: str) -> About:
    """What is known of a key; nothing where there is none, as of a single option of a group."""
    return keys().get(name) or About("")


def values(settings: Settings) -> dict[str, Any]:
    """Key -> value, options of a group one by one: ``"optimizer.options.eps"``."""
    found: dict[str, Any] = {}
    for name, own in keys(settings.model.kind).items():
        value = attrgetter(name)(settings)
        if isinstance(value, dict) and not own.free:
            found |= {f"{name}.{option}": each for option, each in value.items()}
        else:
            found[name] = value
    return found
