"""What `recollect train --help` prints."""

from __future__ import annotations

import textwrap
from typing import Any

from recollect.train._check import documented
from recollect.train._config import defaults, groups
from recollect.train._settings import FREE_KEYS

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
  recollect train resume=runs/20260101-120000_digits_revgnn
"""


def help_text() -> str:
    """Groups with their options, then keys with their defaults, values and meaning."""
    lines = [_HEAD, "groups and their options (the first key of each line is a group):"]
    values = defaults()
    for group, options in groups().items():
        lines += [f"  {group}=", *_wrapped(options, values.get(f"{group}.name"))]
    lines += ["", "keys, with the values they have if nothing is said:"]
    texts = documented()
    for key, value in {**values, **defaults(_OTHER)}.items():
        value = values.get(key, value)
        text = texts.get(key) or texts[key.rpartition(".")[0]]
        choices = f" ({', '.join(text['choices'])})" if text["choices"] else ""
        own = text["help"] if key in texts else f"option of this {key.partition('.')[0]}"
        start = f"  {key + '=' + _show(value):<36} "
        lines += textwrap.wrap(
            own + choices, _WIDTH, initial_indent=start, subsequent_indent=" " * 39, break_on_hyphens=False
        )
    lines += ["", f"Below {', '.join(FREE_KEYS)} any key can be set: what is there depends on model.conv.", ""]
    return "\n".join(lines)


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
