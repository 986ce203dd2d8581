"""What is known of a setting beside its name: meaning, range, and when it counts; and what is wrong with a value."""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import MISSING, dataclass, field
from typing import Any

from recollect.train._errors import choose_from

__all__ = ["About", "key", "show"]


@dataclass(frozen=True)
class About:
    """What is known of a key.

    Attributes:
        help: its meaning.
        low: its least value.
        above: its lower bound, excluded.
        below: its upper bound, excluded.
        choices: the values that it can have; all if there are none.
        needs: a group, and those of the group's options with which it counts; none: it always does.
        path: whether it is a path, which is taken as it stands, whatever characters it has.
        free: whether the keys below it are the network's, not ours.
        code: whether its value says which code runs: no file decides that, but whoever starts or resumes a run.
        group: the group whose option sets it, together with all that belongs to it.
        type: of its values.
    """

    help: str
    low: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    path: bool = False
    free: bool = False
    code: bool = False
    group: str | None = None
    type: Any = None

    @property
    def kind(self) -> str:
        """What a value must be, in words."""
        of = [kind for kind in typing.get_args(self.type) if kind is not types.NoneType]
        optional = isinstance(self.type, types.UnionType)
        if self.choices:
            return f"one of {', '.join([*self.choices, *(['null'] if optional else [])])}"
        return _KINDS[of[0] if optional else self.type] + (" or null" if optional else "")

    def fault(self, key: str, value: Any) -> str | None:
        """What is wrong with a value of the right type, in a sentence; None if nothing is."""
        if self.path and value == "":
            return f"{key}=: names no path; give one, or write {key}=null"
        if value is None or isinstance(value, (dict, list)):
            return None
        if self.choices and value not in self.choices:
            null = ["null"] if isinstance(self.type, types.UnionType) else []
            return f"{key}: " + choose_from("value", value, [*self.choices, *null])
        if isinstance(value, float) and not math.isfinite(value):
            return f"{key}={value}: must be a finite number"
        if (self.low is not None and value < self.low) or (self.below is not None and value >= self.below):
            upper = "" if self.below is None else f" and below {self.below}"
            return f"{key}={value}: must be at least {self.low}{upper}"
        if self.above is not None and value <= self.above:
            return f"{key}={value}: must be above {self.above}"
        return None


def show(value: Any) -> str:
    """A value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str).replace('"', "")


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    list[int]: "a list of whole numbers, such as [8,16],",
    dict[str, Any]: "keys and values, such as {aggr: max}",
}


def key(text: str, default: Any = MISSING, **known: Any) -> Any:
    """A field of settings: its meaning, its usual value (``dict``: no keys), and what else `About` has of it."""
    usual: dict[str, Any] = {"default_factory": dict} if default is dict else {"default": default}
    return field(metadata={"about": About(text, **known)}, **usual)
