"""What `recollect train --help` prints."""

from __future__ import annotations

import textwrap
from typing import Any

from recollect.train._config import defaults, groups
from recollect.train._settings import keys

__all__ = ["help_text"]

_WIDTH = 120
_OTHER = "model=gcn"  # has the keys of the models with histories
_HEAD = """\
usage: recollect train [group=option ...] [key=value ...]

Train a deep reversible graph network, and measure what its depth costs. With no argument: 64 layers on the embedded
graph 'digits', on the CPU or the GPU, in about a minute. Or train a network on parts of the graph, with histories
for what is around them; a preset is a row of published results. For example:

  recollect train dataset=cora data.root=graphs model.num_layers=112 seed=3
  recollect train preset=cora_gcn data.root=graphs            # 20 runs with histories; training=full: without them
  recollect train preset=cora_gcn runs=1 training.errors_every=10
  recollect train dataset=file dataset.path=my_graph.npz      # a graph of your own
  recollect train resume=runs/20260101-120000_digits_revgnn
"""


def help_text() -> str:
    """Groups with their options, then keys with their defaults, values and meaning."""
    lines = [_HEAD, "groups, and the options of each:"]
    values = defaults()
    for group, options in groups().items():
        lines += [f"  {group}=", *_wrapped(options, values.get(f"{group}.name"))]
    for title, found in _sections().items():
        lines += ["", title, *found]
    free = ", ".join(key for key, about in keys().items() if about.free)
    lines += ["", f"Below {free} any key can be set: what is there depends on model.conv.", ""]
    return "\n".join(lines)


def _sections() -> dict[str, list[str]]:
    """Lines for each key, below what it needs in order to count."""
    usual, others, known = defaults(), defaults(_OTHER), keys()
    always = "keys, with the values they have if nothing is said:"
    histories = f"only with a model with histories, in place of revgnn's own; the values of {_OTHER}:"
    found: dict[str, list[str]] = {always: []}
    for key, value in usual.items():
        about = known.get(key)
        if about and about.needs:
            found.setdefault(f"only with {about.needs[0]}={' or '.join(about.needs[1:])}:", []).extend(
                _described(key, value)
            )
        elif not about or not about.group:
            found[always] += _described(key, value)
    found[histories] = [line for key in others if key not in usual for line in _described(key, others[key])]
    return found


def _described(key: str, value: Any) -> list[str]:
    """A key with its value and meaning, in lines."""
    about = keys().get(key)
    text = about.help if about else f"option of this {key.partition('.')[0]}"
    choices = f" ({', '.join(about.choices)})" if about and about.choices else ""
    start = f"  {key + '=' + _show(value):<36} "
    return textwrap.wrap(
        text + choices, _WIDTH, initial_indent=start, subsequent_indent=" " * 39, break_on_hyphens=False
    )


def _wrapped(options: list[str], default: str | None) -> list[str]:
    lines, line = [], "   "
    for option in options:
        word = f" {option} (default)" if option == default else f" {option}"
        if len(line) + len(word) > 110:
            lines.append(line)
            line = "   "
        line += word
    return [*lines, line]


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(" ", "")
