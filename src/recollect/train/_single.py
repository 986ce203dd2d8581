"""One run: a network is trained, measured and reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console

from recollect.data import describe
from recollect.memory import map_large_blocks, peak_memory
from recollect.train._budget import read_rows, write_rows
from recollect.train._build import build_dataset
from recollect.train._config import write
from recollect.train._errors import UsageError
from recollect.train._failures import buildable, enough_memory, explained
from recollect.train._files import write_text
from recollect.train._folder import RunFolder, create
from recollect.train._graph import TrainingGraph
from recollect.train._logs import Logs
from recollect.train._measure import Costs, measure
from recollect.train._metrics import other_scores, score
from recollect.train._progress import show_graph, show_summary, training_bar
from recollect.train._report import report
from recollect.train._room import check_network
from recollect.train._settings import Settings
from recollect.train._step import Step
from recollect.train._summary import Summary, summarize, write_summary
from recollect.train._surroundings import drift_told_once, make_fabric, threads, told
from recollect.train._team import team
from recollect.train._text import budget_text, bytes_text
from recollect.train._trainer import Trainer
from recollect.train.families import Family, family_of, outline_of

__all__ = ["in_folder", "load_graph", "single"]

_DEEP = 2**30  # bytes of activations in all layers


def load_graph(settings: Settings, console: Console) -> TrainingGraph:
    """Load and prepare the graph of a run; show how it is cut, and what the histories will take."""
    device, family = make_fabric(settings).device, family_of(settings)
    with told(console), enough_memory():
        loaded = build_dataset(settings.dataset, settings.data)
        graph = family.prepare(loaded)
    if settings.dataset.path is not None:
        show_graph(console, describe(loaded))
    if (outline := outline_of(settings, graph)) is not None:
        with enough_memory(), buildable():
            check_network(settings, outline, graph.data.num_nodes, device, family.any_depth)
    if (expected := family.expect(graph, device)) is not None:
        console.print(expected, highlight=False, markup=False, soft_wrap=True)
    return graph


def single(
    settings: Settings,
    console: Console,
    folder: RunFolder | None = None,
    graph: TrainingGraph | None = None,
    brief: bool = False,
    family: Family | None = None,
) -> Summary:
    """Start a run, or go on with it.

    Args:
        settings: of the run.
        console: where progress and table are shown.
        folder: of the run, if it was there before.
        graph: by these settings, if it was loaded before.
        brief: show only a bar.
        family: of the network, if it is not the one that the settings name.
    """
    return in_folder(settings, console, folder, graph, brief, family)[0]


def in_folder(
    settings: Settings,
    console: Console,
    folder: RunFolder | None,
    graph: TrainingGraph | None,
    brief: bool = False,
    family: Family | None = None,
) -> tuple[Summary, RunFolder]:
    """As `single`; return the folder too."""
    fabric = make_fabric(settings)
    graph = graph or load_graph(settings, console)
    family = family or family_of(settings)
    features, activations = family.size(graph.data.num_nodes)
    if fabric.device.type == "cpu" and 4 * activations > _DEEP:
        map_large_blocks()
    with threads(settings.threads, features):
        fabric.seed_everything(settings.seed, verbose=False)
        with enough_memory():
            step = Step(fabric, family, graph, family.build(graph, fabric.device))
            del graph  # one of several processes needs its own part from here on
            family.rehearse(step.evaluate)
        with _planned(settings, step, folder, Console(quiet=True) if brief else console):
            return _in_folder(settings, step, folder, console, brief)


def _in_folder(
    settings: Settings, step: Step, folder: RunFolder | None, console: Console, brief: bool
) -> tuple[Summary, RunFolder]:
    group = team()
    if folder is None:  # only now: what cannot start leaves no folder behind
        folder = RunFolder(group.share(create(settings).path if group.is_first else None))
    with folder.locked() if group.is_first else nullcontext(), explained(folder):
        return _execute(settings, step, folder, console, brief), folder


def _execute(settings: Settings, step: Step, folder: RunFolder, console: Console, brief: bool) -> Summary:
    """Train, measure and report; of several processes the first writes the files."""
    trainer, group = Trainer(settings, step, folder.checkpoint), team()
    if step.plan is not None:
        write_rows(folder.plan, step.plan)
    if group.share(folder.checkpoint.exists()):
        trainer.load()
        console.print(f"going on after epoch {trainer.epoch}", highlight=False)
        if trainer.done and trainer.epoch < settings.epochs:
            console.print(
                f"validation did not get better for {settings.patience} epochs: patience=null goes on all the same",
                highlight=False,
            )
    if not (step.family.draws_alike or trainer.draws_on):
        group.draw_apart(settings.seed, trainer.epoch)
    if not brief:
        among = f", by {group.size} processes" if group.size > 1 else ""
        console.print(f"run: {folder.path}{among}", highlight=False, markup=False, soft_wrap=True)
    try:
        _fit(trainer, folder, console, brief)
    except ValueError as error:
        if settings.training.buffer_size is None or "buffer_size" not in str(error):
            raise
        raise UsageError(f"training.buffer_size={settings.training.buffer_size} is too small: {error}") from error
    trainer.restore_best()
    logits = step.evaluate()
    test, others = score(step.graph, logits, "test"), other_scores(step.graph, logits, "test")
    costs, peaks = _costs(settings, step, console)
    trainer.restore_best()  # measuring takes steps
    summary = {**summarize(trainer, test, costs), "other_scores": others, **peaks}
    if group.is_first:
        write_text(folder.report, report(summary, trainer.history, write(settings)))
        write_summary(folder.summary, summary)
        if not brief:
            show_summary(console, summary, folder.path)
    return summary


@contextmanager
def _planned(settings: Settings, step: Step, folder: RunFolder | None, console: Console) -> Iterator[None]:
    """Keep steps within the budget, if the settings have one; afterwards the network is what it was."""
    if settings.memory_budget is None:
        yield
        return
    with console.status("planning what is kept of each layer, by the first batch"):
        planned = step.keep_within(settings.memory_budget, () if folder is None else read_rows(folder.plan))
    try:
        console.print(budget_text(planned.summarize()), highlight=False, markup=False, soft_wrap=True)
        yield
    finally:
        planned.switch(on=False)


def _fit(trainer: Trainer, folder: RunFolder, console: Console, brief: bool) -> None:
    if not team().is_first:
        trainer.fit(lambda row: None)
        return
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


def _costs(settings: Settings, step: Step, console: Console) -> tuple[Costs, dict[str, list[int]]]:
    """What a step costs; of several processes, the peak of each in an epoch's steps."""
    group = team()
    if group.size > 1:
        with peak_memory() as memory:
            step.train()
        peaks = group.collect(memory.peak_bytes)
        shown = ", ".join(bytes_text(peak) for peak in peaks)
        console.print(f"peak of an epoch's steps in each process: {shown}", highlight=False)
        return Costs(), {"peak_bytes_of_ranks": peaks}
    if not settings.measure.enabled:
        return Costs(), {}
    with console.status("measuring") as status:
        costs = measure(settings, step, lambda text: status.update(f"measuring memory and time: {text}"))
    if settings.measure.depths and costs.left_out:
        console.print(
            f"measure.depths={costs.left_out} left out: with them measuring would take longer than measure.seconds="
            f"{settings.measure.seconds:g}; give more of these",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return costs, {}
