"""What `recollect train --help` prints."""

from __future__ import annotations

import textwrap
from typing import Any

from recollect.train._config import defaults, groups
from recollect.train._keys import show
from recollect.train._settings import about, keys

__all__ = ["help_text"]

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


_ALWAYS = "keys, with the values they have if nothing is said:"
_HISTORIES = f"only with a model with histories, in place of revgnn's own; the values of {_OTHER}:"


def help_text() -> str:
    """Groups with their options, then keys with their defaults, values and meaning."""
    usual, others = defaults(), defaults(_OTHER)
    sections: dict[str, list[str]] = {_ALWAYS: []}
    for key, value in (usual | {key: others[key] for key in others if key not in usual}).items():
        needs = about(key).needs
        title = f"only with {needs[0]}={' or '.join(needs[1:])}:" if needs else _ALWAYS
        if not about(key).group:
            sections.setdefault(title if key in usual else _HISTORIES, []).extend(_described(key, value))
    lines = [_HEAD, "groups, and the options of each:"]
    for group, options in groups().items():
        named = (f"{option} (default)" if option == usual.get(f"{group}.name") else option for option in options)
        lines += [f"  {group}=", *_wrapped(" ".join(named), "    ", "    ")]
    for title, found in sections.items():
        lines += ["", title, *found]
    free = ", ".join(key for key, own in keys().items() if own.free)
    return "\n".join(
        [*lines, "", f"Below {free} any key can be set: what is there depends on model.conv and model.target.", ""]
    )


def _described(key: str, value: Any) -> list[str]:
    """A key with its value and meaning, in lines."""
    text = about(key).help or f"option of this {key.partition('.')[0]}"
    choices = about(key).choices
    return _wrapped(
        text + (f" ({', '.join(choices)})" if choices else ""), f"  {key + '=' + show(value):<36} ", " " * 39
    )


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
