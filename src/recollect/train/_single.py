"""One run: a network is trained, measured and reported."""

from __future__ import annotations

from lightning_fabric import Fabric
from rich.console import Console

from recollect.data import describe
from recollect.memory import map_large_blocks
from recollect.train._build import build_dataset
from recollect.train._config import write
from recollect.train._errors import UsageError
from recollect.train._files import write_text
from recollect.train._folder import RunFolder, create
from recollect.train._graph import TrainingGraph, prepare
from recollect.train._histories import check_room, expect_histories
from recollect.train._logs import Logs
from recollect.train._measure import Costs, measure
from recollect.train._metrics import other_scores, score
from recollect.train._network import build_model
from recollect.train._progress import show_graph, show_summary, training_bar
from recollect.train._report import report
from recollect.train._settings import ScalableSettings, Settings
from recollect.train._step import Step
from recollect.train._summary import Summary, summarize, write_summary
from recollect.train._surroundings import drift_told_once, make_fabric, threads, told
from recollect.train._text import histories_text
from recollect.train._trainer import Trainer

__all__ = ["load_graph", "single"]

_DEEP = 2**30  # bytes of activations in all layers


def load_graph(settings: Settings, console: Console) -> TrainingGraph:
    """Load and prepare the graph of a run; show how it is cut, and what the histories will take."""
    device = make_fabric(settings).device
    with told(console):
        loaded = build_dataset(settings.dataset, settings.data)
        graph = prepare(settings, loaded)
    if settings.dataset.path is not None:
        show_graph(console, describe(loaded))
    if isinstance(settings.model, ScalableSettings) and graph.ptr is not None:
        histories = expect_histories(settings.model, graph, settings.training, device)
        console.print(f"histories: {histories_text(histories)}", highlight=False, markup=False, soft_wrap=True)
        check_room(histories, device)
    return graph


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
    fabric = make_fabric(settings)
    graph = graph or load_graph(settings, console)
    activations = settings.model.num_layers * settings.model.hidden_channels * graph.data.num_nodes * 4
    if fabric.device.type == "cpu" and activations > _DEEP:
        map_large_blocks()
    with threads(settings, graph.data.num_nodes):
        return _execute(fabric, settings, graph, folder, console, brief)


def _execute(
    fabric: Fabric, settings: Settings, graph: TrainingGraph, folder: RunFolder | None, console: Console, brief: bool
) -> Summary:
    fabric.seed_everything(settings.seed, verbose=False)
    step = Step(fabric, settings, graph, build_model(settings.model, graph, settings.training, fabric.device))
    folder = folder or create(settings)  # only now: what cannot start leaves no folder behind
    trainer = Trainer(settings, step, folder.checkpoint)
    if folder.checkpoint.exists():
        trainer.load()
        console.print(f"going on after epoch {trainer.epoch}", highlight=False)
    if not brief:
        console.print(f"run: {folder.path}", highlight=False, markup=False, soft_wrap=True)
    try:
        _fit(trainer, folder, console, brief)
    except ValueError as error:
        if settings.training.buffer_size is None or "buffer_size" not in str(error):
            raise
        raise UsageError(f"training.buffer_size={settings.training.buffer_size} is too small: {error}") from error
    trainer.restore_best()
    logits = step.evaluate()
    test, others = score(step.graph, logits, "test"), other_scores(step.graph, logits, "test")
    costs = _measure(settings, step, console) if settings.measure.enabled else Costs()
    summary = {**summarize(trainer, test, costs), "other_scores": others}
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
            drift_told_once(console),
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
