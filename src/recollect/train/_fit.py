"""Train a model of one's own by one call: the same loop, files and report as the command's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from recollect._util._sizes import as_size
from recollect.train._config import changed, parse
from recollect.train._errors import UsageError
from recollect.train._folder import RunFolder, extend, reopen
from recollect.train._given import as_dataset, in_type_of
from recollect.train._run import CHANGEABLE, to_the_end
from recollect.train._settings import DatasetSettings, TrainingSettings
from recollect.train._single import in_folder
from recollect.train._summary import read_summary
from recollect.train.families import own_family
from recollect.train.families._own import Call

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a run gave.

    Attributes:
        test_accuracy: of the best validation epoch, by ``metric``, from 0 to 1.
        val_accuracy: the best.
        metric: ``"accuracy"``, ``"rocauc"``, ``"average_precision"`` or ``"micro_f1"``.
        best_epoch: from 1; the model has its parameters now.
        epochs: that were trained.
        seconds: that they took.
        peak_bytes: measured peak of a training step above parameters, gradients, the optimizer's state, histories and
            the graph; ``None`` if it was not measured.
        peak_bytes_plain: the same with every activation kept (of a model with reversible modules), or on the whole
            graph (of one with histories); ``None`` where there is no such comparison.
        folder: with ``report.html``, ``metrics.csv``, ``summary.json`` and the checkpoint.
        summary: all that ``summary.json`` holds.

    Example:
        >>> import tempfile
        >>> from recollect.data import load
        >>> from recollect.models import RevGNN
        >>> from recollect.train import FitResult, fit
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = fit(RevGNN(34, 8, 4, num_layers=2), load("karate"), epochs=2, out=folder)
        ...     print(sorted(file.name for file in result.folder.glob("*.json")))
        ['summary.json']
        >>> isinstance(result, FitResult), result.metric, result.epochs, 0 <= result.test_accuracy <= 1
        (True, 'accuracy', 2, True)
    """

    test_accuracy: float
    val_accuracy: float
    metric: str
    best_epoch: int
    epochs: int
    seconds: float
    peak_bytes: int | None
    peak_bytes_plain: int | None
    folder: Path
    summary: Mapping[str, Any]


def fit(
    model: nn.Module,
    data: Any,
    *,
    epochs: int | None = None,
    lr: float | None = None,
    objective: str | Mapping[str, Any] | None = None,
    training: str | Mapping[str, Any] | None = None,
    histories: bool | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    memory_budget: int | float | str | None = None,
    call: Call | None = None,
    seed: int | None = None,
    overrides: tuple[str, ...] | list[str] = (),
    console: Console | None = None,
) -> FitResult:
    """Train a model on a graph, measure what a step costs, and write a report.

    The model is called with what its ``forward`` names of ``x``, ``edge_index``, ``adj_t``, ``edge_attr`` and
    ``edge_weight``; under other names the first argument is ``x`` and the second ``edge_index``. It returns logits
    [num_nodes, num_classes]. When the call is over it has the parameters of the best validation epoch.

    Args:
        model: any module. Reversible modules in it are measured beside the same with everything kept.
        data: a graph of `recollect.data`, or a ``Data`` of torch_geometric: ``x`` [N, F], ``edge_index`` [2, E] and
            ``y``, classes [N], of which -1 is unknown, or labels [N, K] of zeros and ones; ``train_mask``, ``val_mask``
            and ``test_mask`` [N], or else 60, 20 and 20 percent of each class are drawn with ``seed``. Masks [N, S] of
            several splits are refused: choose one. It is read as `recollect.data.from_data` does, but classes keep
            their numbers. Features and weights of edges get the type of the model's parameters.
        epochs: at most, in all; by default 200.
        lr: learning rate of AdamW; by default 0.005.
        objective: ``"mean"``, ``"iwrm"``, ``"multitask"``, or keys of the group, as in
            ``{"name": "iwrm", "weighting": "mgda"}``.
        training: ``"full"``, the whole graph in each step; ``"autoscale"``, parts of it, with histories for what is
            around them; ``"wholegraph"``, all of it, part by part; or keys of the group, as in
            ``{"name": "wholegraph", "num_parts": 8, "store": "tables"}``. With parts the model is a
            `recollect.autoscale.ScalableGNN`, such as a `recollect.models.RevGNN`. ``"adjacency"`` says which edges its
            ``adj_t`` has: ``"plain"``, those of the graph; ``"loops"``, with self-loops; ``"symmetric"``, with
            self-loops and weights by the roots of degrees.
        histories: ``True``, or keys as of ``training``: short for ``training="autoscale"``.
        out: folder of the run's files, empty or not there yet; by default one in ``runs``.
        resume: folder of a run of this model: go on with it, or extend it to ``epochs``.
        memory_budget: what a training step may allocate, gradients of parameters included: bytes, ``"1.5 GB"``, or a
            share ``"60%"`` of the memory. What is kept of each layer is planned on the first batch, see
            `recollect.plan`, and stays the same when the run is gone on with.
        call: from the model and the graph to the logits, ``lambda model, data: ...``, where the signature does not say
            how the model is called.
        seed: of dropout, of parts and of a split that is drawn; by default 0. The model has its parameters already.
        overrides: further settings as on the command line: ``["clip_norm=1.0", "optimizer=sgd"]``.
        console: where progress and table are shown; by default nowhere.

    Returns:
        Scores, measured memory, and the folder of the run.

    Raises:
        UsageError: a value is wrong, or the model cannot be called with this graph.
        NonFiniteLossError: the loss became NaN or infinite.
        TrainingError: something else that can be mended: the disk is full, memory is short, ...

    Example:
        >>> import tempfile
        >>> from recollect.data import load
        >>> from recollect.models import RevGNN
        >>> from recollect.train import fit
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = fit(RevGNN(34, 16, 4, num_layers=4), load("karate"), epochs=3, out=folder)
        >>> result.epochs, result.peak_bytes < result.peak_bytes_plain
        (3, True)
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model must be a torch.nn.Module (got {type(model).__name__})")
    console = console or Console(quiet=True)
    words = [f"{key}={value}" for key, value in (("epochs", epochs), ("seed", seed)) if value is not None]
    if resume is not None:
        own = (out, lr, objective, training, histories, memory_budget, seed)
        if any(value is not None for value in own):
            raise UsageError(
                "resume= goes on under the run's own settings: leave out out, lr, objective, training, histories, "
                "memory_budget, seed"
            )
        folder, before = reopen(str(resume), given=True)
        settings = changed(before, to_the_end([*words, *overrides]), CHANGEABLE, folder.path)
    else:
        if memory_budget is not None:
            words.append(f"memory_budget={_quoted(memory_budget)}")
        words = [*words, *_words(lr, objective, _steps(training, histories)), *overrides]
        settings = parse(["model=import", "patience=null", *([] if epochs else ["epochs=200"]), *words])
        folder = None
    graph = in_type_of(model, as_dataset(data, settings.seed, console))
    if folder is None:
        settings = replace(
            settings,
            dataset=DatasetSettings(graph.name, {}),
            model=replace(settings.model, name=type(model).__name__),
            run_dir=None if out is None else str(out),
        )
    else:
        with folder.locked():
            finished = extend(folder, settings, before)
        if finished:
            return _result(read_summary(folder.summary), folder)
    family = own_family(settings, model, call)
    return _result(*in_folder(settings, console, folder, family.prepare(graph), family=family))


def _quoted(budget: int | float | str) -> str:
    """A budget as a word of the command line."""
    try:
        as_size(budget, "memory_budget")
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return f"'{budget}'" if isinstance(budget, str) else f"{int(budget)}"


def _steps(
    training: str | Mapping[str, Any] | None, histories: bool | Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """What steps are taken on: keys of the group ``training``, with ``name``."""
    if not histories:
        if training is None:
            return None
        return {"name": training} if isinstance(training, str) else {"name": "full", **training}
    if training is not None:
        raise UsageError('histories= is short for training="autoscale" with these keys: give one of the two')
    return {"name": "autoscale", **({} if histories is True else histories)}


def _words(lr: float | None, objective: str | Mapping[str, Any] | None, steps: dict[str, Any] | None) -> list[str]:
    words = [] if lr is None else [f"optimizer.lr={lr}"]
    if objective is not None:
        keys: dict[str, Any] = {"name": objective} if isinstance(objective, str) else dict(objective)
        words += [f"objective={keys.pop('name', 'iwrm')}", *(f"objective.{key}={value}" for key, value in keys.items())]
    if steps is not None:
        keys = dict(steps)
        name = keys.pop("name")
        if name == "autoscale" and isinstance(parts := keys.get("num_parts"), int) and parts > 0:
            keys.setdefault("parts_per_batch", min(parts, TrainingSettings.parts_per_batch))  # all, if they are few
        words.append(f"training={name}")
        for key, value in keys.items():
            words.append(f"{'model' if key == 'adjacency' else 'training'}.{key}={'null' if value is None else value}")
    return words


def _result(summary: dict[str, Any], folder: RunFolder) -> FitResult:
    return FitResult(
        summary["test_accuracy"],
        summary["val_accuracy"],
        summary["metric"],
        summary["best_epoch"],
        summary["epochs"],
        summary["seconds"],
        summary["peak_bytes"],
        summary["peak_bytes_plain"],
        folder.path,
        summary,
    )
