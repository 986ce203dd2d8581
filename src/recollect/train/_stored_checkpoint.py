"""A checkpoint that may have been changed since: its fields are checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from recollect.train._errors import InvalidRunError

__all__ = ["check_checkpoint"]

_NUMBER = (int, float)
_ROW = ("epoch", "loss", "train_accuracy", "val_accuracy", "val_loss", "learning_rate", "seconds")


_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of each parameter, by Adam


def check_checkpoint(
    state: Any, network: nn.Module, optimizer: Optimizer, others: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Refuse a checkpoint whose fields are not those that a trainer of this network saves.

    Args:
        state: what `torch.load` made of the file.
        network: whose parameters and buffers it must hold.
        optimizer: of the network.
        others: states that are there now, by the names of their fields: what is stored must be like them.
        path: for messages.

    Raises:
        InvalidRunError: a field is missing, or of another form; the message names it.
    """
    wrong = _wrong_field(state, network, optimizer, others)
    if wrong:
        raise InvalidRunError(f"the checkpoint {path} cannot be read ({wrong}); start the run anew")
    return dict(state)


def _wrong_field(state: Any, network: nn.Module, optimizer: Optimizer, others: Mapping[str, Any]) -> str:
    """What is wrong, or nothing."""
    if not isinstance(state, Mapping):
        return f"it holds a {type(state).__name__}"
    fields = {"model": Mapping, "optimizer": Mapping, "best_state": Mapping, "random": Mapping}
    if not isinstance(state.get("kept", []), list):  # earlier ones have none
        return "its field 'kept' is of another type"
    for name, kind in {**fields, **dict.fromkeys(others, Mapping), "history": list, "best_epoch": int}.items():
        if not isinstance(state.get(name), kind):
            return f"its field {name!r} is missing or of another type"
    return (
        _wrong_tensors("model", state["model"], network)
        or (_wrong_tensors("best_state", state["best_state"], network) if state["best_epoch"] else "")
        or _wrong_history(state["history"], state["best_epoch"])
        or _wrong_optimizer(state["optimizer"], optimizer)
        or next((f"{name} is not of this run" for name, own in others.items() if not _alike(state[name], own)), "")
        or _wrong_random(state["random"])
    )


def _wrong_tensors(name: str, found: Mapping[Any, Any], network: nn.Module) -> str:
    expected = network.state_dict()
    if found.keys() != expected.keys():
        return f"{name} has other parameters than this model"
    for key, tensor in expected.items():
        value = found[key]
        if not isinstance(value, type(tensor)) and not (isinstance(value, Tensor) and isinstance(tensor, Tensor)):
            return f"{name}: {key!r} is a {type(value).__name__}"
        if isinstance(tensor, Tensor) and (value.shape != tensor.shape or value.dtype != tensor.dtype):
            return f"{name}: {key!r} has the shape {list(value.shape)}, and this model's {list(tensor.shape)}"
    return ""


def _wrong_history(rows: list[Any], best_epoch: int) -> str:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
            return f"history: epoch {number} is no row of numbers"
        if any(key not in row for key in _ROW) or not all(type(value) in _NUMBER for value in row.values()):
            return f"history: epoch {number} lacks a number"
        if row["epoch"] != number:
            return f"history: epoch {number} is numbered {row['epoch']}"
    if not min(1, len(rows)) <= best_epoch <= len(rows):
        return f"best_epoch is {best_epoch}, of {len(rows)} epochs"
    return ""


def _wrong_optimizer(found: Mapping[str, Any], optimizer: Optimizer) -> str:
    own = optimizer.state_dict()
    groups, states = found.get("param_groups"), found.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict) or len(groups) != len(own["param_groups"]):
        return "optimizer has other groups of parameters"
    for group, expected in zip(groups, own["param_groups"], strict=True):
        # Schedulers add keys to the groups; all others are the optimizer's.
        if not isinstance(group, dict) or not expected.keys() <= group.keys() | {"initial_lr"}:
            return "optimizer: a group of parameters lacks a setting"
        for key, value in expected.items():
            if key == "params" and group[key] != value:
                return "optimizer has other parameters than this model"
            if not _alike(group.get(key, value), value):
                return f"optimizer: {key} is {str(group[key])[:40]!r}"
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for key, values in states.items():
        if type(key) is not int or not 0 <= key < len(shapes) or not isinstance(values, dict):
            return "optimizer has a state of no parameter"
        if isinstance(optimizer, (Adam, AdamW)) and not values.keys() >= _MOMENTS:
            return f"optimizer: the state of a parameter lacks {', '.join(sorted(_MOMENTS - values.keys()))}"
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != shapes[key]:
                return f"optimizer: {name} has the shape {list(value.shape)}, and its parameter {list(shapes[key])}"
            if not isinstance(value, (Tensor, *(_NUMBER if name == "step" else (type(None),)))):
                return f"optimizer: {name} is a {type(value).__name__}"
    return ""


def _alike(value: Any, expected: Any) -> bool:
    """Whether a setting has the type that it has in this run; numbers are finite and of one kind."""
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        return type(value) is type(expected)
    if isinstance(expected, _NUMBER):
        return isinstance(value, _NUMBER) and not isinstance(value, bool) and abs(value) < float("inf")
    if isinstance(expected, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(value) == len(expected) and all(map(_alike, value, expected))
    if isinstance(expected, Mapping):
        return value.keys() == expected.keys() and all(_alike(value[key], item) for key, item in expected.items())
    return isinstance(value, type(expected))


def _wrong_random(found: Mapping[str, Any]) -> str:
    cuda = found.get("cuda")
    if (
        not isinstance(found.get("cpu"), Tensor)
        or not isinstance(cuda, list)
        or not all(isinstance(s, Tensor) for s in cuda)
    ):
        return "random holds no states of generators"
    return ""
