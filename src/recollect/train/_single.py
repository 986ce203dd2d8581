"""One run: a network is trained, measured and reported."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console

from recollect.frames import DriftWarning
from recollect.memory import map_large_blocks
from recollect.train._build import build_dataset
from recollect.train._config import write
from recollect.train._errors import UsageError
from recollect.train._files import AtomicCheckpointIO, write_text
from recollect.train._folder import RunFolder, create
from recollect.train._graph import TrainingGraph, prepare
from recollect.train._histories import check_room, expect_histories
from recollect.train._logs import Logs
from recollect.train._measure import Costs, measure
from recollect.train._metrics import score
from recollect.train._network import build_model
from recollect.train._progress import show_summary, training_bar
from recollect.train._report import report
from recollect.train._settings import RevGNNSettings, ScalableSettings, Settings
from recollect.train._step import Step
from recollect.train._summary import Summary, summarize, write_summary
from recollect.train._text import histories_text
from recollect.train._trainer import Trainer

__all__ = ["load_graph", "single"]

_DEEP = 2**30  # bytes of activations in all layers
_SMALL = 2**16  # features of one group of a layer, over all nodes


def load_graph(settings: Settings, console: Console) -> TrainingGraph:
    """Load and prepare the graph of a run."""
    with _told(console):
        return prepare(settings, build_dataset(settings.dataset, settings.data))


def single(
    settings: Settings,
    console: Console,
    folder: RunFolder | None = None,
    graph: TrainingGraph | None = None,
    brief: bool = False,
) -> Summary:
    """Start a run, or go on with it.

    Args:
        settings: of the run.
        console: where progress and table are shown.
        folder: of the run, if it was there before.
        graph: by these settings, if it was loaded before.
        brief: show only a bar.
    """
    fabric = _fabric(settings)
    graph = graph or load_graph(settings, console)
    activations = settings.model.num_layers * settings.model.hidden_channels * graph.data.num_nodes * 4
    if fabric.device.type == "cpu" and activations > _DEEP:
        map_large_blocks()
    with _threads(settings, graph):
        return _execute(fabric, settings, graph, folder, console, brief)


def _execute(
    fabric: Fabric, settings: Settings, graph: TrainingGraph, folder: RunFolder | None, console: Console, brief: bool
) -> Summary:
    fabric.seed_everything(settings.seed, verbose=False)
    if isinstance(settings.model, ScalableSettings) and graph.ptr is not None:
        histories = expect_histories(settings.model, graph, settings.training, fabric.device)
        if not brief:
            console.print(f"histories: {histories_text(histories)}", highlight=False, soft_wrap=True)
        check_room(histories, fabric.device)
    step = Step(fabric, settings, graph, build_model(settings.model, graph, settings.training, fabric.device))
    folder = folder or create(settings)  # only now: what cannot start leaves no folder behind
    trainer = Trainer(settings, step, folder.checkpoint)
    if folder.checkpoint.exists():
        trainer.load()
        console.print(f"going on after epoch {trainer.epoch}", highlight=False)
    if not brief:
        console.print(f"run: {folder.path}", highlight=False, markup=False, soft_wrap=True)
    _fit(trainer, folder, console, brief)
    trainer.restore_best()
    test = score(step.graph, step.evaluate(), "test")
    costs = _measure(settings, step, console) if settings.measure.enabled else Costs()
    summary = summarize(trainer, test, costs)
    write_text(folder.report, report(summary, trainer.history, write(settings)))
    write_summary(folder.summary, summary)
    if not brief:
        show_summary(console, summary, folder.path)
    return summary


def _fit(trainer: Trainer, folder: RunFolder, console: Console, brief: bool) -> None:
    logs = Logs(folder.path, trainer.history)
    try:
        with (
            training_bar(console, trainer.settings.epochs, trainer.epoch, trainer.step.graph.metric, brief) as bar,
            _drift_told_once(console),
        ):

            def on_epoch(row: dict[str, float]) -> None:
                logs.add(row)
                bar.advance(row)

            trainer.fit(on_epoch)
            bar.stop(trainer.epoch)
    finally:
        logs.close()


def _measure(settings: Settings, step: Step, console: Console) -> Costs:
    with console.status("measuring") as status:
        return measure(settings, step, lambda text: status.update(f"measuring memory and time: {text}"))


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
def _threads(settings: Settings, graph: TrainingGraph) -> Iterator[None]:
    before, number = torch.get_num_threads(), settings.threads
    if number is None:
        groups = settings.model.num_groups if isinstance(settings.model, RevGNNSettings) else 1
        features = graph.data.num_nodes * settings.model.hidden_channels // groups
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


@contextmanager
def _told(console: Console) -> Iterator[None]:
    """Show what the library logs of how it cuts the graph."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(self.format(record), highlight=False, markup=False, soft_wrap=True)

    logger, handler = logging.getLogger("recollect.autoscale"), Told()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
