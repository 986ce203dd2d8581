"""Every setting of a run: its key, type, meaning and range. What is checked of them stands in `_check`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

__all__ = [
    "FREE_KEYS",
    "GROUP_KEYS",
    "MODELS",
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
    "key",
]

FREE_KEYS = ("model.conv_kwargs", "model.kwargs")  # below these, keys are the network's, not ours
# What a group's option sets together with the keys that belong to it.
GROUP_KEYS = {
    "dataset.name": "dataset",
    "model.kind": "model",
    "optimizer.name": "optimizer",
    "training.name": "training",
    "objective.name": "objective",
}
SEEDS = 2**32  # so many there are, from 0 on

_PARTS = ("training", "autoscale")
_CUT = ("training", "autoscale", "wholegraph")


def key(
    text: str,
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    needs: tuple[str, ...] | None = None,
    path: bool = False,
    default: Any = MISSING,
) -> Any:
    """A field of settings, and what is known of it beside its type.

    Args:
        text: its meaning.
        low: its least value.
        above: its lower bound, excluded.
        below: its upper bound, excluded.
        choices: the values that it can have.
        needs: a group, and those of the group's options with which it counts; None: it always does.
        path: whether it is a path, which is taken as it stands, whatever characters it has.
        default: its value where no config file says one; none if it is not given.
    """
    known = {"low": low, "above": above, "below": below, "choices": choices, "needs": needs, "path": path}
    return field(default=default, metadata={"help": text, **known})


@dataclass(frozen=True)
class DatasetSettings:
    """Which graph."""

    name: str = key("graph, by its name in recollect.data")
    options: dict[str, Any] = key("options of recollect.data.load for this graph")
    path: str | None = key(
        "file or folder of your own graph: .pt, .npz, .mat, .graphml, CSV files",
        path=True,
        needs=("dataset", "file"),
        default=None,
    )
    features: str | None = key(
        "of the nodes, in the place of the file's: their degrees, or a learnt vector each; null: the file's",
        choices=("degree", "embedding"),
        needs=("dataset", "file"),
        default=None,
    )


@dataclass(frozen=True)
class ModelSettings:
    """Which network: what those of every kind have."""

    name: str = key("label of the model in the run's files")
    num_layers: int | None = key("layers", low=1)
    hidden_channels: int | None = key("channels of the layers", low=1)
    dropout: float | None = key("dropout probability", low=0, below=1)
    kind: str = key(
        "network of recollect.models, or one of your own",
        choices=("revgnn", "gcn", "gat", "gcn2", "appnp", "pna", "pna_jk", "gin", "import"),
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

    num_layers: int = key("layers", low=1)
    hidden_channels: int = key("channels of the layers", low=1)
    dropout: float = key("dropout probability", low=0, below=1)
    num_groups: int = key("groups of a reversible layer; hidden_channels is divisible by them", low=2)
    conv: str = key("convolution: gat, gcn, gen, gin, graphconv or sage")
    conv_kwargs: dict[str, Any] = key("options of the convolution, as in model.conv_kwargs.aggr=max")
    edge_features: bool = key("give the graph's edge features, if it has any, to a gat or gen convolution")
    shared_dropout: bool = key("one dropout mask for all layers, as in the paper")
    norm: str | None = key("normalisation in the layers", choices=("layer", "batch"))
    tied: bool = key("all layers share one set of parameters")
    anchor_every: int | None = key("keep every s-th activation, to bound drift; null: none", low=1)
    disable: bool = key("keep every activation: train without recollecting")
    exact: bool = key("activations come back bit for bit, at any depth")


@dataclass(frozen=True)
class ScalableSettings(ModelSettings):
    """A network whose layers can take their neighbours from histories; see `recollect.autoscale.ScalableGNN`."""

    family: ClassVar[str] = "histories"

    num_layers: int = key("layers", low=1)
    hidden_channels: int = key("channels of the layers", low=1)
    dropout: float = key("dropout probability", low=0, below=1)
    adjacency: str = key("edges; with self-loops; and by the roots of degrees", choices=("plain", "loops", "symmetric"))
    options: dict[str, Any] = key("further options of this network")

    @property
    def weighs_edges(self) -> bool:
        """Whether the network takes notice of the edges' weights."""
        return self.kind not in ("gat", "pna", "pna_jk")


@dataclass(frozen=True)
class ImportSettings(ModelSettings):
    """A network of one's own: what a function or a class in a module makes."""

    family: ClassVar[str] = "own"

    target: str | None = key("MODULE:NAME of a class or function that makes the network")
    folder: str | None = key("folder in which the module is looked for first; null: the working directory", path=True)
    num_layers: int | None = key("given to the target if it names it; null: not", low=1)
    hidden_channels: int | None = key("given to the target if it names it; null: not", low=1)
    dropout: float | None = key("given to the target if it names it; null: not", low=0, below=1)
    kwargs: dict[str, Any] = key("further arguments of the target")
    adjacency: str = key("edges of adj_t, as of the networks with histories", choices=("plain", "loops", "symmetric"))

    @property
    def is_known(self) -> bool:
        """Whether there is a target."""
        return self.target is not None


MODELS = {"revgnn": RevGNNSettings, "import": ImportSettings}  # by kind; ScalableSettings for all others


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer of torch.optim."""

    name: str = key("optimizer", choices=("adam", "adamw", "sgd"))
    lr: float = key("learning rate", low=0, below=1e6)
    weight_decay: float = key("weight decay", low=0)
    other_weight_decay: float | None = key(
        "weight decay of what is in the model's nonreg_modules; null: as weight_decay", low=0
    )
    options: dict[str, Any] = key("further options of the optimizer")


@dataclass(frozen=True)
class DataSettings:
    """Where raw files are."""

    root: str | None = key("folder of raw files; null: the environment's RECOLLECT_DATA, else ./data", path=True)
    seed: int = key("seed of generated graphs (sbm)", low=0, below=SEEDS)
    features: str | None = key(
        "rows: each sums to 1; columns: mean 0, deviation 1; null: as is", choices=("rows", "columns")
    )


@dataclass(frozen=True)
class TrainingSettings:
    """The whole graph in each step, at once or part by part, or a few parts and histories for what is around them."""

    name: str = key(
        "full: steps on the whole graph; autoscale: on parts of it; wholegraph: on all of it, part by part",
        choices=("full", "autoscale", "wholegraph"),
    )
    num_parts: int = key("parts that the graph is cut into", low=1, needs=_CUT)
    parts_per_batch: int = key("parts in each step, drawn anew in each epoch", low=1, needs=_PARTS)
    partition: str = key("how the graph is cut", choices=("metis", "kaminpar", "random", "contiguous"), needs=_CUT)
    partition_cache: str | None = key(
        "folder in which the parts of a graph are kept; null: none", needs=_CUT, path=True
    )
    history_device: str | None = key(
        "where histories are; null: on the model's device", choices=("cpu", "cuda"), needs=_PARTS
    )
    history_dtype: str = key("numbers in histories", choices=("float32", "float16", "bfloat16", "int8"), needs=_PARTS)
    history_path: str | None = key("folder for histories on disk; null: in memory", needs=_PARTS, path=True)
    pool_size: int | None = key(
        "transfers of history rows beside the computation, at a time; null: none", low=1, needs=_PARTS
    )
    buffer_size: int | None = key("rows of each of them at most; null: all nodes", low=1, needs=_PARTS)
    edge_dropout: float = key("share of the edges that each step leaves out", low=0, below=1)
    lipschitz: float = key("weight of lipschitz_loss (gin with model.options.noise)", low=0)
    layerwise: bool = key("evaluate layer by layer on parts; false: on the whole graph", needs=_PARTS)
    store: str | None = key("folder for tables and parts; null: in memory", needs=("training", "wholegraph"), path=True)
    compensate: str | None = key(
        "correct gradients by histories of gradients, with these edges to nodes outside; null: not",
        choices=("cut", "complete"),
        needs=_PARTS,
    )
    refresh_every: int | None = key(
        "epochs between exact refreshes of all histories, with compensate; null: none", low=1, needs=_PARTS
    )
    errors_every: int | None = key(
        "epochs between measurements of the histories' true errors; null: none", low=1, needs=_PARTS
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """One loss, or many whose gradients' Gramian gives their weights; see `recollect.autogram`."""

    name: str = key(
        "mean: the mean loss; iwrm: an objective for each node; multitask: one for each label",
        choices=("mean", "iwrm", "multitask"),
    )
    weighting: str = key(
        "weights from the Gramian, by recollect.aggregation",
        choices=(
            *("upgrad", "dualproj", "mgda", "pcgrad", "imtlg", "config", "cagrad", "alignedmtl", "nashmtl"),
            *("fairgrad", "mean"),
        ),
        needs=("objective", "iwrm", "multitask"),
    )
    samples: int = key(
        "training nodes of a step, drawn anew; each costs a backward pass", low=1, needs=("objective", "iwrm")
    )


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured after training."""

    enabled: bool = key("measure memory and time of training steps, reversible and with everything kept")
    depths: list[int] | None = key("depths of the curve memory against depth; null: up to num_layers by doubling")
    repeats: int = key("timed epochs of each mode; the median counts", low=1)
    seconds: float = key("stop measuring further depths after this time", low=0)


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    dataset: DatasetSettings
    model: ModelSettings
    optimizer: OptimizerSettings
    training: TrainingSettings
    objective: ObjectiveSettings
    data: DataSettings
    measure: MeasureSettings
    preset: str | None = key("published row that the other settings are of; null: none")
    seed: int = key("seed of parameters and dropout", low=0, below=SEEDS)
    runs: int = key("runs with seeds seed, seed + 1, ... (and splits, where a graph has several)", low=1)
    epochs: int = key("epochs, at most", low=1)
    patience: int | None = key("stop after this many epochs without a better validation score; null: never", low=1)
    warmup_epochs: int = key("epochs over which the learning rate rises linearly to its value", low=0)
    clip_norm: float | None = key("largest norm of the gradient; null: any", above=0)
    checkpoint_every: int | None = key("epochs between checkpoints; null: as often as takes a tenth of the time", low=1)
    device: str = key("auto is cuda where there is one, else cpu; cpu, cuda, or torch's accelerator")
    devices: int = key("processes on this machine that train on parts together, each with a share of them", low=1)
    memory_budget: str | None = key(
        "what a step may allocate, gradients included: 500MB, 1.5 GB, 60%, or bytes; null: anything"
    )
    precision: str = key("floating-point precision", choices=("32-true", "bf16-mixed", "16-mixed"))
    threads: int | None = key("CPU threads; null: one for a small graph, else torch's default", low=1)
    run_dir: str | None = key("folder of the run's files; null: runs/<date-time>_<dataset>_<model>", path=True)
    resume: str | None = key("go on with the run in this folder, or extend it by epochs=N", path=True)
    config: str | None = key("file of settings to begin with, such as a run's config.yaml", path=True)
