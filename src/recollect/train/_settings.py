"""Every setting of a run: its key, type, meaning and range. What is checked of them stands in `_check`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recollect.train._about import about
from recollect.train._model_settings import ModelSettings, RevGNNSettings, ScalableSettings

__all__ = [
    "FREE_KEYS",
    "GROUP_KEYS",
    "PATH_KEYS",
    "SEEDS",
    "DataSettings",
    "DatasetSettings",
    "MeasureSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "RevGNNSettings",
    "ScalableSettings",
    "Settings",
    "TrainingSettings",
]

FREE_KEYS = ("model.conv_kwargs",)  # below these, keys are the convolution's, not ours
# What a group's option sets together with the keys that belong to it.
GROUP_KEYS = {
    "dataset.name": "dataset",
    "model.kind": "model",
    "optimizer.name": "optimizer",
    "training.name": "training",
    "objective.name": "objective",
}
# Values that are taken as they stand, whatever characters they have.
PATH_KEYS = ("data.root", "dataset.path", "training.history_path", "training.partition_cache", "run_dir", "resume")
SEEDS = 2**32  # so many there are, from 0 on


_PARTS = ("training", "autoscale")


@dataclass(frozen=True)
class DatasetSettings:
    """Which graph."""

    name: str = field(metadata=about("graph, by its name in recollect.data"))
    options: dict[str, Any] = field(metadata=about("options of recollect.data.load for this graph"))
    path: str | None = field(
        default=None,
        metadata=about(
            "file or folder of your own graph: .pt, .npz, .mat, .graphml, CSV files", needs=("dataset", "file")
        ),
    )
    features: str | None = field(
        default=None,
        metadata=about(
            "of the nodes, in the place of the file's: their degrees, or a learnt vector each; null: the file's",
            choices=("degree", "embedding"),
            needs=("dataset", "file"),
        ),
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer of torch.optim."""

    name: str = field(metadata=about("optimizer", choices=("adam", "adamw", "sgd")))
    lr: float = field(metadata=about("learning rate", low=0, below=1e6))
    weight_decay: float = field(metadata=about("weight decay", low=0))
    other_weight_decay: float | None = field(
        metadata=about("weight decay of what is in the model's nonreg_modules; null: as weight_decay", low=0)
    )
    options: dict[str, Any] = field(metadata=about("further options of the optimizer"))


@dataclass(frozen=True)
class DataSettings:
    """Where raw files are."""

    root: str | None = field(metadata=about("folder of raw files; null: the environment's RECOLLECT_DATA, else ./data"))
    seed: int = field(metadata=about("seed of generated graphs (sbm)", low=0, below=SEEDS))
    features: str | None = field(
        metadata=about(
            "rows: each sums to 1; columns: mean 0, deviation 1; null: as is",
            choices=("rows", "columns"),
        )
    )


@dataclass(frozen=True)
class TrainingSettings:
    """The whole graph in each step, or a few of its parts and histories for what is around them."""

    name: str = field(
        metadata=about("full: steps on the whole graph; autoscale: on parts of it", choices=("full", "autoscale"))
    )
    num_parts: int = field(metadata=about("parts that the graph is cut into", low=1, needs=_PARTS))
    parts_per_batch: int = field(metadata=about("parts in each step, drawn anew in each epoch", low=1, needs=_PARTS))
    partition: str = field(
        metadata=about("how the graph is cut", choices=("metis", "kaminpar", "random", "contiguous"), needs=_PARTS)
    )
    partition_cache: str | None = field(
        metadata=about("folder in which the parts of a graph are kept; null: none", needs=_PARTS)
    )
    history_device: str | None = field(
        metadata=about("where histories are; null: on the model's device", choices=("cpu", "cuda"), needs=_PARTS)
    )
    history_dtype: str = field(
        metadata=about("numbers in histories", choices=("float32", "float16", "bfloat16", "int8"), needs=_PARTS)
    )
    history_path: str | None = field(metadata=about("folder for histories on disk; null: in memory", needs=_PARTS))
    pool_size: int | None = field(
        metadata=about("transfers of history rows beside the computation, at a time; null: none", low=1, needs=_PARTS)
    )
    buffer_size: int | None = field(
        metadata=about("rows of each of them at most; null: all nodes", low=1, needs=_PARTS)
    )
    edge_dropout: float = field(metadata=about("share of the edges that each step leaves out", low=0, below=1))
    lipschitz: float = field(metadata=about("weight of lipschitz_loss (gin with model.options.noise)", low=0))
    layerwise: bool = field(metadata=about("evaluate layer by layer on parts; false: on the whole graph", needs=_PARTS))
    errors_every: int | None = field(
        metadata=about("epochs between measurements of the histories' true errors; null: none", low=1, needs=_PARTS)
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """One loss, or many whose gradients' Gramian gives their weights; see `recollect.autogram`."""

    name: str = field(
        metadata=about(
            "mean: the mean loss; iwrm: an objective for each node; multitask: one for each label",
            choices=("mean", "iwrm", "multitask"),
        )
    )
    weighting: str = field(
        metadata=about(
            "weights from the Gramian, by recollect.aggregation",
            choices=(
                *("upgrad", "dualproj", "mgda", "pcgrad", "imtlg", "config", "cagrad", "alignedmtl", "nashmtl"),
                *("fairgrad", "mean"),
            ),
            needs=("objective", "iwrm", "multitask"),
        )
    )
    samples: int = field(
        metadata=about(
            "training nodes of a step, drawn anew; each costs a backward pass", low=1, needs=("objective", "iwrm")
        )
    )


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured after training."""

    enabled: bool = field(
        metadata=about("measure memory and time of training steps, reversible and with everything kept")
    )
    depths: list[int] | None = field(
        metadata=about("depths of the curve memory against depth; null: up to num_layers by doubling")
    )
    repeats: int = field(metadata=about("timed epochs of each mode; the median counts", low=1))
    seconds: float = field(metadata=about("stop measuring further depths after this time", low=0))


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
    preset: str | None = field(metadata=about("published row that the other settings are of; null: none"))
    seed: int = field(metadata=about("seed of parameters and dropout", low=0, below=SEEDS))
    runs: int = field(
        metadata=about("runs with seeds seed, seed + 1, ... (and splits, where a graph has several)", low=1)
    )
    epochs: int = field(metadata=about("epochs, at most", low=1))
    patience: int | None = field(
        metadata=about("stop after this many epochs without a better validation score; null: never", low=1)
    )
    warmup_epochs: int = field(metadata=about("epochs over which the learning rate rises linearly to its value", low=0))
    clip_norm: float | None = field(metadata=about("largest norm of the gradient; null: any", above=0))
    checkpoint_every: int | None = field(
        metadata=about("epochs between checkpoints; null: as often as takes a tenth of the time", low=1)
    )
    device: str = field(metadata=about("auto is cuda where there is one, else cpu", choices=("auto", "cpu", "cuda")))
    precision: str = field(metadata=about("floating-point precision", choices=("32-true", "bf16-mixed", "16-mixed")))
    threads: int | None = field(metadata=about("CPU threads; null: one for a small graph, else torch's default", low=1))
    run_dir: str | None = field(metadata=about("folder of the run's files; null: runs/<date-time>_<dataset>_<model>"))
    resume: str | None = field(metadata=about("go on with the run in this folder, under its own settings"))
