"""What is wrong with values that are of the right type: by themselves, and with one another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter

from recollect._util._sizes import as_size
from recollect.train._errors import UsageError, choose_from
from recollect.train._keys import show
from recollect.train._settings import SEEDS, ScalableSettings, Settings, about, keys, values

__all__ = ["check", "check_given"]


def check(settings: Settings) -> None:
    """Refuse values that are out of range, and those that do not go together.

    Raises:
        UsageError: there is one; the message says which are allowed.
    """
    for fault in _faults(settings):
        raise UsageError(fault)


def check_given(settings: Settings, given: Iterable[str]) -> None:
    """Refuse keys that were given and that nothing would look at.

    Raises:
        UsageError: there is one; the message says with which option of which group it counts.
    """
    for key in given:
        group, *options = about(key).needs or (None,)
        if group and (found := getattr(settings, group).name) not in options:
            raise UsageError(
                f"{key} counts only with {group}={' or '.join(options)}, and this is {group}={found}: leave it out, or "
                f"write {group}={options[0]} as well"
            )
        if key == "measure.depths" and (settings.model.family, settings.training.name) != ("reversible", "full"):
            raise UsageError(
                f"measure.depths={settings.measure.depths}: memory is measured against depth of networks that are made "
                f"in any depth, model=revgnn with training=full, and this is model={settings.model.kind} with "
                f"training={settings.training.name}; leave it out"
            )


def _faults(settings: Settings) -> Iterator[str]:
    """All that is wrong, in a sentence each."""
    for key, own in keys(settings.model.kind).items():
        if fault := own.fault(key, attrgetter(key)(settings)):
            yield fault
    yield from _device(settings.device)
    if settings.seed + settings.runs > SEEDS:
        yield (
            f"seed={settings.seed} and runs={settings.runs}: the last run's seed must be below {SEEDS} too; give a "
            "smaller seed"
        )
    depths = settings.measure.depths
    if depths is not None and (not depths or min(depths) < 1):
        yield f"measure.depths={depths}: must be a list of numbers of layers, each at least 1, or null"
    yield from _training(settings)
    if settings.training.name == "autoscale":
        yield from _parts(settings)
    if settings.training.name == "wholegraph":
        yield from _whole_graph(settings)
    if settings.devices > 1:
        yield from _devices(settings)
    if settings.memory_budget is not None:
        yield from _budget(settings)
    if settings.objective.name != "mean" and settings.precision == "16-mixed":
        yield (
            f"objective={settings.objective.name}: precision=16-mixed scales losses, and a Gramian is of losses as "
            "they are; choose 32-true or bf16-mixed"
        )


def _device(device: str) -> Iterator[str]:
    """Refuse a kind of device that torch does not know; it is asked only about one that is not usual."""
    usual = ("auto", "cpu", "cuda")
    if device in usual:
        return
    import torch  # takes seconds

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = dict.fromkeys([*usual, *([] if accelerator is None else [accelerator.type])])
    if device not in devices:
        yield f"device: {choose_from('value', device, devices)}"


def _lacking(settings: Settings, needed: str) -> str:
    """Those of the words ``key=one|other,third`` that the settings do not meet; nobody is told to write the third.

    Keys that this kind of network does not have are met.
    """
    words = []
    known = values(settings) | {"objective": settings.objective.name, "training": settings.training.name}
    for key, _, right in (word.partition("=") for word in needed.split()):
        if key in known and show(known[key]).removesuffix(".0") not in right.replace(",", "|").split("|"):
            words.append(f"{key}={right.partition(',')[0].replace('|', ' or ')}")
    return ", ".join(words)


def _devices(settings: Settings) -> Iterator[str]:
    if settings.model.family == "own":
        yield (
            f"devices={settings.devices} needs a network whose histories can lie over processes, and model="
            f"{settings.model.name} has none: choose gcn, gat, gcn2, appnp, pna, pna_jk, gin or revgnn, and "
            "training=autoscale, or revgnn and training=wholegraph"
        )
    needed = (
        "training=autoscale training.layerwise=true training.pool_size=null training.lipschitz=0 "
        "training.history_device=null,cpu objective=mean device=cpu,auto runs=1"
    )
    if settings.training.name == "wholegraph":
        needed = "training.store=null device=cpu,auto runs=1"
        if settings.training.num_parts % settings.devices:
            yield (
                f"devices={settings.devices}: each takes as many parts of training=wholegraph, and training.num_parts="
                f"{settings.training.num_parts} is not divisible by it"
            )
    if words := _lacking(settings, needed):
        yield f"devices={settings.devices}: several processes train on parts, and need {words}"
    if settings.training.num_parts < settings.devices:
        yield f"devices={settings.devices}: each needs a part, and training.num_parts={settings.training.num_parts}"


def _budget(settings: Settings) -> Iterator[str]:
    """A plan is of a step of one loss, on the whole graph at once."""
    try:
        as_size(settings.memory_budget, "memory_budget")
    except ValueError as error:
        yield str(error)
    budget, training = f"memory_budget={settings.memory_budget}", settings.training.name
    if training != "full":
        ways = ("fewer training.parts_per_batch, or " if training == "autoscale" else "") + "more training.num_parts"
        yield (
            f"{budget} decides what a step on the whole graph keeps, and training={training} takes steps part by part: "
            f"what they need is set by {ways}; leave memory_budget out, or choose training=full"
        )
    if settings.objective.name != "mean":
        yield (
            f"{budget}: the plan is of a step of one loss, and objective={settings.objective.name} goes backward for "
            "each of many: choose objective=mean, or leave memory_budget out"
        )
    if settings.measure.depths is not None:
        yield (
            f"{budget}: the plan is of this depth, so there is no curve over measure.depths={settings.measure.depths}; "
            "leave one of them out"
        )


def _training(settings: Settings) -> Iterator[str]:
    training, model = settings.training, settings.model
    if training.compensate and (training.edge_dropout or training.lipschitz or settings.objective.name != "mean"):
        yield (
            f"training.compensate={training.compensate} takes one backward pass of one loss over the edges that there "
            "are, so it needs training.edge_dropout=0, training.lipschitz=0 and objective=mean"
        )
    if training.refresh_every and not training.compensate:
        yield (
            f"training.refresh_every={training.refresh_every} refreshes corrected histories: add "
            "training.compensate=cut (or complete); others are made exact by each evaluation"
        )
    if training.combine is not None or training.combine_score != "x^2":
        yield from _combination(settings)
    if training.edge_dropout and not model.weighs_edges:
        yield (
            f"training.edge_dropout={training.edge_dropout}: model={model.name} takes no notice of the edges' weights, "
            "which edge dropout changes; set it to 0"
        )
    if training.lipschitz:
        noise = model.options.get("noise", 0.0) if isinstance(model, ScalableSettings) else 0.0
        if model.kind != "gin" or noise <= 0 or (model.num_layers or 0) < 2:
            found = f"model.options.noise={noise} and model.num_layers={model.num_layers}"
            yield (
                f"training.lipschitz={training.lipschitz}: needs model=gin with model.options.noise above 0 and at "
                f"least two layers (got {found if model.kind == 'gin' else model.name}); set it to 0, or choose these"
            )


def _combination(settings: Settings) -> Iterator[str]:
    training, model = settings.training, settings.model
    combine = f"training.combine={training.combine}"
    if training.combine is None:
        yield (
            f"training.combine_score={training.combine_score} says how far rows are combined, and none are: give "
            "training.combine=1 (or less) as well, or leave it out"
        )
    elif training.combine > 1:
        yield f"{combine}: must be at least 0 and at most 1"
    if not training.compensate:
        yield f"{combine} is part of the correction of histories: add training.compensate=cut (or complete)"
    if model.family == "reversible" or model.kind == "pna_jk":
        yield (
            f"{combine}: model={model.name} has no combined rows; leave it at null, or choose gcn, gat, gcn2, appnp, "
            "pna or gin"
        )


def _parts(settings: Settings) -> Iterator[str]:
    training, model = settings.training, settings.model
    if getattr(model, "conv", None) == "gcn" and getattr(model, "conv_kwargs", {}).get("normalize", True):
        yield (
            "training=autoscale: model.conv=gcn divides by the degrees of neighbours, which a mini-batch does not know "
            "of the nodes around it: choose model.conv=sage (or gat, gen, gin, graphconv), "
            "model.conv_kwargs.normalize=false, or training=wholegraph"
        )
    if training.parts_per_batch > training.num_parts:
        yield (
            f"training.parts_per_batch={training.parts_per_batch}: must be at most training.num_parts="
            f"{training.num_parts}"
        )
    if training.buffer_size is not None and training.pool_size is None:
        yield (
            f"training.buffer_size={training.buffer_size}: is the size of buffers of which there are none; set "
            "training.pool_size=2, or leave it out"
        )


def _whole_graph(settings: Settings) -> Iterator[str]:
    needed = (
        "training.edge_dropout=0 training.lipschitz=0 model.disable=false precision=32-true "
        "objective=mean|multitask model.norm=layer,null model.options.batch_norm=false model.options.noise=0"
    )
    if words := _lacking(settings, needed):
        yield f"training=wholegraph computes a step part by part, and needs {words}"
