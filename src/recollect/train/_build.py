"""The graph and the optimizer that the settings ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from recollect import data
from recollect.train._errors import TrainingError, UsageError, choose_from
from recollect.train._keys import show
from recollect.train._settings import DatasetSettings, DataSettings, OptimizerSettings

__all__ = ["build_dataset", "build_optimizer", "warmup"]

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD}


def build_dataset(dataset: DatasetSettings, files: DataSettings) -> data.GraphDataset:
    """Load the graph.

    Raises:
        UsageError: its name or an option is wrong.
        TrainingError: its raw files or a package are missing, or its split has an empty part.
    """
    options = {key: getattr(dataset, key) for key in ("path", "features") if getattr(dataset, key) is not None}
    try:
        if files.root and Path(files.root).expanduser().exists() and not Path(files.root).expanduser().is_dir():
            raise UsageError(f"data.root={files.root} is no folder; give the folder of the raw files")
        graph = data.load(dataset.name, files.root or None, seed=files.seed, **dataset.options, **options)
    except data.MissingRawFilesError as error:
        here = "On this command line: data.root=FOLDER, dataset.options.download=true."
        raise TrainingError(f"{error}\n{here}") from error
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    except (data.InvalidFileError, data.InvalidRawFilesError, OSError, ImportError, MemoryError) as error:
        raise TrainingError(str(error) or type(error).__name__) from error
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    for part in ("train", "val", "test"):
        if not bool(graph.data[f"{part}_mask"].any()):
            raise TrainingError(f"the split of {dataset.label!r} has no {part} nodes, so it cannot be used here")
    return graph


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> Optimizer:
    """Make the optimizer of the model's parameters.

    Raises:
        UsageError: a value or option is wrong.
    """
    if settings.name not in _OPTIMIZERS:
        raise UsageError(choose_from("optimizer", settings.name, _OPTIMIZERS))
    options: dict[str, Any] = dict(settings.options)
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
        if len(options["betas"]) != 2 or not all(isinstance(beta, (int, float)) for beta in options["betas"]):
            raise UsageError(f"optimizer.options.betas={show(settings.options['betas'])}: must be two numbers")
    try:
        return _OPTIMIZERS[settings.name](
            _groups(settings, model), lr=settings.lr, weight_decay=settings.weight_decay, **options
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"the optimizer cannot be built: {error}") from error


def _groups(settings: OptimizerSettings, model: nn.Module) -> list[dict[str, Any]]:
    """All parameters, or those in ``reg_modules`` and ``nonreg_modules`` with a weight decay for each."""
    other = settings.other_weight_decay
    if other is None:
        return [{"params": list(model.parameters())}]
    modules = [getattr(model, name, None) for name in ("reg_modules", "nonreg_modules")]
    if not all(isinstance(module, nn.Module) for module in modules):
        raise UsageError(
            f"optimizer.other_weight_decay={other}: {type(model).__name__} does not say which of its modules are "
            f"regularised; leave it at null"
        )
    regularised, rest = (list(cast(nn.Module, module).parameters()) for module in modules)
    known = {id(parameter) for parameter in (*regularised, *rest)}
    rest += [parameter for parameter in model.parameters() if id(parameter) not in known]  # learnt features
    return [{"params": regularised}, {"params": rest, "weight_decay": other}]


def warmup(optimizer: Optimizer, epochs: int) -> torch.optim.lr_scheduler.LinearLR:
    """Let the learning rate rise linearly to its value, which it reaches after ``epochs`` epochs."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / (epochs + 1), total_iters=epochs)
