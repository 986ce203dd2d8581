"""A run from its settings to its report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console

from recollect.data import GraphDataset
from recollect.frames import DriftWarning
from recollect.memory import map_large_blocks
from recollect.train._build import build_dataset, build_model
from recollect.train._config import parse, write
from recollect.train._errors import UsageError
from recollect.train._files import AtomicCheckpointIO, write_text
from recollect.train._folder import RunFolder, create, reopen
from recollect.train._logs import Logs
from recollect.train._measure import Costs, measure
from recollect.train._metrics import score
from recollect.train._progress import show_summary, training_bar
from recollect.train._report import report
from recollect.train._settings import Settings
from recollect.train._step import Step, to_device
from recollect.train._summary import read_summary, summarize, write_summary
from recollect.train._trainer import Trainer

__all__ = ["train"]

_DEEP = 2**30  # bytes of activations in all layers
_SMALL = 2**16  # features of one group of a layer, over all nodes


def train(overrides: Sequence[str] = (), console: Console | None = None) -> dict[str, Any]:
    """Train, measure and report: what ``recollect train`` does.

    Args:
        overrides: of the settings, as on the command line: ``["dataset=cora", "model.num_layers=112"]``; or
            ``["resume=RUN_DIR"]`` to go on with a run that was interrupted.
        console: where progress and table are shown; by default nowhere.

    Returns:
        What ``summary.json`` in the run's folder holds.

    Raises:
        UsageError: a name, key or value is wrong.
        InvalidRunError: the folder to resume holds no run.
        NonFiniteLossError: the loss became NaN or infinite.
        TrainingError: something else that the user can mend: files or packages are missing, ...
    """
    console = console or Console(quiet=True)
    settings = parse(overrides)
    folder = None
    if settings.resume:
        if len(overrides) > 1:
            raise UsageError(f"resume={settings.resume} goes on under the run's own settings: leave out all others")
        folder, settings = reopen(settings.resume)
        if folder.summary.exists():
            summary = read_summary(folder.summary)
            console.print(f"the run {folder.path} is finished", highlight=False, markup=False, soft_wrap=True)
            show_summary(console, summary, folder.path)
            return summary
    fabric = _fabric(settings)
    graph = to_device(fabric, build_dataset(settings.dataset, settings.data))
    activations = settings.model.num_layers * settings.model.hidden_channels * graph.data.num_nodes * 4
    if fabric.device.type == "cpu" and activations > _DEEP:
        map_large_blocks()
    with _threads(settings, graph):
        return _execute(fabric, settings, graph, folder, console)


def _execute(
    fabric: Fabric, settings: Settings, graph: GraphDataset, folder: RunFolder | None, console: Console
) -> dict[str, Any]:
    fabric.seed_everything(settings.seed, verbose=False)
    step = Step(fabric, settings, graph, build_model(settings.model, graph))
    folder = folder or create(settings)  # only now: what cannot start leaves no folder behind
    trainer = Trainer(settings, step, folder.checkpoint)
    if folder.checkpoint.exists():
        trainer.load()
        console.print(f"going on after epoch {trainer.epoch}", highlight=False)
    console.print(f"run: {folder.path}", highlight=False, markup=False, soft_wrap=True)
    _fit(trainer, folder, console)
    trainer.restore_best()
    test = score(graph, step.evaluate(), "test")
    costs = _measure(fabric, settings, graph, console) if settings.measure.enabled else Costs()
    summary = summarize(trainer, test, costs)
    write_text(folder.report, report(summary, trainer.history, write(settings)))
    write_summary(folder.summary, summary)
    show_summary(console, summary, folder.path)
    return summary


def _fit(trainer: Trainer, folder: RunFolder, console: Console) -> None:
    logs = Logs(folder.path, trainer.history)
    try:
        with (
            training_bar(console, trainer.settings.epochs, trainer.epoch, trainer.step.graph.metric) as bar,
            _drift_told_once(console),
        ):

            def on_epoch(row: dict[str, float]) -> None:
                logs.add(row)
                bar.advance(row)

            trainer.fit(on_epoch)
            bar.stop(trainer.epoch)
    finally:
        logs.close()


def _measure(fabric: Fabric, settings: Settings, graph: GraphDataset, console: Console) -> Costs:
    with console.status("measuring") as status:
        return measure(fabric, settings, graph, lambda text: status.update(f"measuring memory and time: {text}"))


def _fabric(settings: Settings) -> Fabric:
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise UsageError("device=cuda: torch sees no CUDA device here; use device=cpu or device=auto")
    accelerator = "cuda" if cuda and settings.device != "cpu" else "cpu"
    if accelerator == "cpu" and settings.precision == "16-mixed":
        raise UsageError("precision=16-mixed needs a CUDA device; on the CPU use 32-true or bf16-mixed")
    # One device: a full batch is one piece.
    return Fabric(
        accelerator=accelerator,
        devices=1,
        precision=settings.precision,  # type: ignore[arg-type]  # its values were checked with the settings
        plugins=[AtomicCheckpointIO()],
    )


@contextmanager
def _threads(settings: Settings, graph: GraphDataset) -> Iterator[None]:
    before, number = torch.get_num_threads(), settings.threads
    if number is None:
        features = graph.data.num_nodes * settings.model.hidden_channels // settings.model.num_groups
        # Two threads save a sixth of the time on a graph of this size if they have two idle cores, and where another
        # process takes one of them, they wait for each other for many times what the work takes.
        number = 1 if features < _SMALL else before
    try:
        torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _drift_told_once(console: Console) -> Iterator[None]:
    """Show the first warning about drift as a line of text: metrics.csv has the drift of every epoch."""
    told = False

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        nonlocal told
        if not issubclass(category, DriftWarning):
            before(message, category, *args, **kwargs)
        elif not told:
            told = True
            console.print(f"warning: {message}", style="yellow", highlight=False, markup=False)

    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", DriftWarning)
        warnings.showwarning = show
        yield
