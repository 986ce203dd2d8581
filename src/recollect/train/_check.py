"""Settings as a list of keys, and what is wrong with their values."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from recollect._util._sizes import as_size
from recollect.train._errors import UsageError, choose_from
from recollect.train._settings import MODELS, SEEDS, ModelSettings, ScalableSettings, Settings

__all__ = ["check", "check_given", "documented", "kind_text", "nearest_keys", "with_absolute_paths"]


@functools.cache
def documented() -> dict[str, dict[str, Any]]:
    """Key -> what `key` was told of it, and its "type", in the order of the classes."""
    known: dict[str, dict[str, Any]] = {}
    for key, _, metadata in _walk(Settings, None):
        known.setdefault(key, metadata)  # what several kinds of models have is told as of the first
    return known


def check(settings: Settings) -> None:
    """Refuse values outside of their range.

    Raises:
        UsageError: a value is out of range; the message says which are allowed.
    """
    for key, value, metadata in _walk(Settings, settings):
        if value is None or isinstance(value, (dict, list)):
            continue
        if metadata["path"] and value == "":
            raise UsageError(f"{key}=: names no path; give one, or write {key}=null")
        if metadata["choices"] and value not in metadata["choices"]:
            null = ["null"] if isinstance(metadata["type"], types.UnionType) else []
            raise UsageError(f"{key}: " + choose_from("value", value, [*metadata["choices"], *null]))
        low, above, below = metadata["low"], metadata["above"], metadata["below"]
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key}={value}: must be a finite number")
        if (low is not None and value < low) or (below is not None and value >= below):
            upper = f" and below {below}" if below is not None else ""
            raise UsageError(f"{key}={value}: must be at least {low}{upper}")
        if above is not None and value <= above:
            raise UsageError(f"{key}={value}: must be above {above}")
    _check_device(settings.device)
    if settings.seed + settings.runs > SEEDS:
        raise UsageError(
            f"seed={settings.seed} and runs={settings.runs}: the last run's seed must be below {SEEDS} too; give a "
            "smaller seed"
        )
    depths = settings.measure.depths
    if depths is not None and (not depths or min(depths) < 1):
        raise UsageError(f"measure.depths={depths}: must be a list of numbers of layers, each at least 1, or null")
    _check_training(settings)
    if settings.devices > 1:
        _check_devices(settings)
    if settings.memory_budget is not None:
        _check_budget(settings)
    if settings.objective.name != "mean" and settings.precision == "16-mixed":
        raise UsageError(
            f"objective={settings.objective.name}: precision=16-mixed scales losses, and a Gramian is of losses as "
            f"they are; choose 32-true or bf16-mixed"
        )


def _check_device(device: str) -> None:
    """Refuse a kind of device that torch does not know; it is asked only about one that is not usual."""
    usual = ("auto", "cpu", "cuda")
    if device in usual:
        return
    import torch  # takes seconds

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = dict.fromkeys([*usual, *([] if accelerator is None else [accelerator.type])])
    if device not in devices:
        raise UsageError(f"device: {choose_from('value', device, devices)}")


def _check_devices(settings: Settings) -> None:
    training = settings.training
    needed = {
        "training": ("autoscale", training.name),
        "training.layerwise": (True, training.layerwise),
        "training.pool_size": (None, training.pool_size),
        "training.compensate": (None, training.compensate),
        "training.errors_every": (None, training.errors_every),
        "training.lipschitz": (0, training.lipschitz),
        "training.history_device": (None, None if training.history_device == "cpu" else training.history_device),
        "objective": ("mean", settings.objective.name),
        "device": ("cpu", "cpu" if settings.device == "auto" else settings.device),
        "runs": (1, settings.runs),
    }
    wrong = {name: need for name, (need, found) in needed.items() if found != need}
    if settings.model.family != "histories":
        raise UsageError(
            f"devices={settings.devices} needs a network whose histories can lie over processes, and model="
            f"{settings.model.name} has none: choose gcn, gat, gcn2, appnp, pna, pna_jk or gin, and training=autoscale"
        )
    if wrong:
        words = ", ".join(f"{name}={'null' if need is None else str(need).lower()}" for name, need in wrong.items())
        raise UsageError(f"devices={settings.devices}: several processes train on parts, and need {words}")
    if training.num_parts < settings.devices:
        raise UsageError(f"devices={settings.devices}: each needs a part, and training.num_parts={training.num_parts}")


def _check_budget(settings: Settings) -> None:
    """A plan is of a step of one loss, on the whole graph at once."""
    try:
        as_size(settings.memory_budget, "memory_budget")
    except ValueError as error:
        raise UsageError(str(error)) from error
    budget, training = settings.memory_budget, settings.training.name
    ways = {
        "autoscale": "fewer training.parts_per_batch, or more training.num_parts",
        "wholegraph": "more training.num_parts",
    }
    if training in ways:
        raise UsageError(
            f"memory_budget={budget} decides what a step on the whole graph keeps, and training={training} takes steps "
            f"part by part: what they need is set by {ways[training]}; leave memory_budget out, or choose training=full"
        )
    if settings.objective.name != "mean":
        raise UsageError(
            f"memory_budget={budget}: the plan is of a step of one loss, and objective={settings.objective.name} goes "
            "backward for each of many: choose objective=mean, or leave memory_budget out"
        )
    if settings.measure.depths is not None:
        raise UsageError(
            f"memory_budget={budget}: the plan is of this depth, so there is no curve over measure.depths="
            f"{settings.measure.depths}; leave one of them out"
        )
    if settings.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"memory_budget={budget} needs a device whose memory can be measured, and device={settings.device} is "
            "none: choose cpu or cuda"
        )


def check_given(settings: Settings, keys: Iterable[str]) -> None:
    """Refuse keys that were given and that nothing would look at.

    Raises:
        UsageError: there is one; the message says with which option of which group it counts.
    """
    known = documented()
    for key in keys:
        group, *options = known.get(key, {}).get("needs") or (None,)
        if group and (found := getattr(settings, group).name) not in options:
            raise UsageError(
                f"{key} counts only with {group}={' or '.join(options)}, and this is {group}={found}: leave it out, or "
                f"write {group}={options[0]} as well"
            )


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with paths that do not depend on the working directory."""

    def absolute(value: str) -> str:
        return str(Path(value).expanduser().resolve())

    changes: dict[str, dict[str, Any]] = {}
    for key, value, metadata in _walk(Settings, settings):
        if metadata["path"] and value:
            group, _, name = key.rpartition(".")
            changes.setdefault(group, {})[name] = absolute(value)
    own = changes.pop("", {})
    return replace(settings, **own, **{g: replace(getattr(settings, g), **new) for g, new in changes.items()})


def kind_text(key: str) -> str | None:
    """What a key's value must be, in words; None if the key is unknown."""
    hint = documented().get(key, {}).get("type")
    of = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    optional = isinstance(hint, types.UnionType)
    text = _KINDS.get(of[0] if optional else hint)
    return text and text + (" or null" if optional else "")


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    list[int]: "a list of whole numbers, such as [8,16],",
    dict[str, Any]: "keys and values, such as {aggr: max}",
}


def _check_whole_graph(settings: Settings) -> None:
    model = settings.model
    if model.family != "reversible":
        raise UsageError(
            f"training=wholegraph needs a reversible network, and model={model.name} is none: choose revgnn, or "
            "training=autoscale"
        )
    needed = {
        "training.edge_dropout": (0, settings.training.edge_dropout),
        "training.lipschitz": (0, settings.training.lipschitz),
        "model.disable": (False, getattr(model, "disable", False)),
        "device": ("cpu", "cpu" if settings.device == "auto" else settings.device),
        "precision": ("32-true", settings.precision),
    }
    wrong = [f"{name}={need}".lower() for name, (need, found) in needed.items() if found != need]
    if settings.objective.name == "iwrm":
        wrong.append("objective=mean or multitask")
    if getattr(model, "norm", None) == "batch":
        wrong.append("model.norm=layer")
    if wrong:
        raise UsageError(f"training=wholegraph computes a step part by part, and needs {', '.join(wrong)}")


def _check_training(settings: Settings) -> None:
    training = settings.training
    if training.compensate and (training.edge_dropout or training.lipschitz or settings.objective.name != "mean"):
        raise UsageError(
            f"training.compensate={training.compensate} takes one backward pass of one loss over the edges that there "
            "are, so it needs training.edge_dropout=0, training.lipschitz=0 and objective=mean"
        )
    if training.refresh_every and not training.compensate:
        raise UsageError(
            f"training.refresh_every={training.refresh_every} refreshes corrected histories: add "
            "training.compensate=cut (or complete); others are made exact by each evaluation"
        )
    if training.edge_dropout and not settings.model.weighs_edges:
        raise UsageError(
            f"training.edge_dropout={training.edge_dropout}: model={settings.model.name} takes no notice of the edges' "
            f"weights, which edge dropout changes; set it to 0"
        )
    if training.lipschitz:
        _check_lipschitz(settings.model, training.lipschitz)
    if training.name == "full":
        return
    if training.name == "wholegraph":
        _check_whole_graph(settings)
        return
    if settings.model.family == "reversible":
        _check_reversible_parts(settings)
    if training.parts_per_batch > training.num_parts:
        raise UsageError(
            f"training.parts_per_batch={training.parts_per_batch}: must be at most training.num_parts="
            f"{training.num_parts}"
        )
    if training.buffer_size is not None and training.pool_size is None:
        raise UsageError(
            f"training.buffer_size={training.buffer_size}: is the size of buffers of which there are none; set "
            f"training.pool_size=2, or leave it out"
        )


def _check_reversible_parts(settings: Settings) -> None:
    """Refuse what deep reversible networks have no histories for."""
    training, model = settings.training, settings.model
    if training.compensate:
        raise UsageError(
            f"training.compensate={training.compensate}: model={model.name} has no corrected histories: leave it at "
            "null, or choose gcn, gcn2 or appnp; training=wholegraph has the exact gradient"
        )
    conv, options = getattr(model, "conv", None), getattr(model, "conv_kwargs", {})
    if conv == "gcn" and options.get("normalize", True):
        raise UsageError(
            "training=autoscale: model.conv=gcn divides by the degrees of neighbours, which a mini-batch does not know "
            "of the nodes around it: choose model.conv=sage (or gat, gen, gin, graphconv), "
            "model.conv_kwargs.normalize=false, or training=wholegraph"
        )


def _check_lipschitz(model: ModelSettings, weight: float) -> None:
    noise = model.options.get("noise", 0.0) if isinstance(model, ScalableSettings) else 0.0
    if model.kind == "gin" and noise > 0 and (model.num_layers or 0) > 1:
        return
    found = (
        f"model.options.noise={noise} and model.num_layers={model.num_layers}" if model.kind == "gin" else model.name
    )
    raise UsageError(
        f"training.lipschitz={weight}: needs model=gin with model.options.noise above 0 and at least two layers (got "
        f"{found}); set it to 0, or choose these"
    )


def nearest_keys(wrong: str, right: Iterable[str]) -> str:
    """Say which keys are nearest to one that is not there, by their names and by what they mean."""
    known = documented()

    def likeness(key: str) -> float:
        said = wrong.rpartition(".")[2].replace("_", " ")
        name = key.rpartition(".")[2].replace("_", " ")
        meaning = re.split(r"[,:;(]", known.get(key, {}).get("help", ""))[0]
        return max(_ratio(wrong, key), _ratio(said, name), _ratio(said, meaning))

    near = sorted(right, key=likeness, reverse=True)
    best = [key for key in near[:3] if likeness(key) >= max(_NEAR, 0.9 * likeness(near[0]))]
    return f"did you mean {' or '.join(best)}?" if best else "all keys: recollect train --help"


_NEAR = 0.6  # of two texts, one may be the other with some typos


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _walk(cls: Any, instance: Any, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each leaf's key, value (``None`` without an instance) and what is known of it, its type among that."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        value = None if instance is None else getattr(instance, item.name)
        hint = hints[item.name]
        if not dataclasses.is_dataclass(hint):
            yield prefix + item.name, value, {**item.metadata, "type": hint}
            continue
        classes = (type(value),) if value is not None else _MODELS if hint is ModelSettings else (hint,)
        for group in classes:
            yield from _walk(group, value, f"{prefix}{item.name}.")


_MODELS = (MODELS["revgnn"], ScalableSettings, MODELS["import"])
