"""What `recollect train --help` prints."""

from __future__ import annotations

import textwrap
from typing import Any

from recollect.train._check import documented
from recollect.train._config import defaults, groups
from recollect.train._settings import FREE_KEYS, GROUP_KEYS

__all__ = ["help_text"]

_WIDTH = 120
_OTHER = "model=gcn"  # has the keys of the models with histories
_FILE = "dataset=file"
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
    lines += ["", f"Below {', '.join(FREE_KEYS)} any key can be set: what is there depends on model.conv.", ""]
    return "\n".join(lines)


def _sections() -> dict[str, list[str]]:
    """Lines for each key, below what it needs in order to count."""
    values, texts = defaults(), documented()
    always = "keys, with the values they have if nothing is said:"
    found: dict[str, list[str]] = {always: []}
    for key, value in values.items():
        needs = texts.get(key, {}).get("needs")
        title = f"only with {needs[0]}={' or '.join(needs[1:])}:" if needs else always
        if key not in GROUP_KEYS:
            found.setdefault(title, []).extend(_described(key, value, texts))
    for key, value in defaults(_FILE).items():
        if key not in values and (needs := texts.get(key, {}).get("needs")):
            found.setdefault(f"only with {needs[0]}={' or '.join(needs[1:])}:", []).extend(
                _described(key, value, texts)
            )
    others = {key: value for key, value in defaults(_OTHER).items() if key not in values}
    title = f"only with a model with histories, in place of revgnn's own; the values of {_OTHER}:"
    return {**found, title: [line for key, value in others.items() for line in _described(key, value, texts)]}


def _described(key: str, value: Any, texts: dict[str, dict[str, Any]]) -> list[str]:
    """A key with its value and meaning, in lines."""
    text = texts.get(key) or texts[key.rpartition(".")[0]]
    choices = f" ({', '.join(text['choices'])})" if text["choices"] else ""
    own = text["help"] if key in texts else f"option of this {key.partition('.')[0]}"
    start = f"  {key + '=' + _show(value):<36} "
    return textwrap.wrap(
        own + choices, _WIDTH, initial_indent=start, subsequent_indent=" " * 39, break_on_hyphens=False
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
