"""Where rows cross between the tables, which lie on the host, and the device that computes a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recollect._transfer import Fetch, sent
from recollect._util._tree import Tree
from recollect._verdicts import settle
from recollect.messages import made_of, take_made
from recollect.outofcore._parts import Part
from recollect.outofcore._tables import Changes

__all__ = ["Crossing", "Late", "device_of"]

Late = tuple[Tensor, Callable[[Tensor], object]]
"""Numbers of the device, and what is done with them on the host."""


def device_of(model: nn.Module) -> torch.device:
    """Return where a network is.

    Raises:
        ValueError: in several places, or in none that has values.
    """
    found = {parameter.device for parameter in model.parameters()}
    if len(found) > 1 or any(device.type == "meta" for device in found):
        raise ValueError(
            f"the network has parameters on {', '.join(sorted(map(str, found)))}, but the parts of a WholeGraph are "
            "computed on one device: move it there before, by model.to(device)"
        )
    return found.pop() if found else torch.device("cpu")


class Crossing:
    """Sends what is read of a part to the device, and brings back what an operation changes: in one wait.

    On the CPU nothing moves.

    Args:
        memory: bytes of parts that stay on the device: the first ones, since in each pass all come in turn. Others are
            sent for each operation, with what convolutions made of their edges.

    Attributes:
        device: that computes.
    """

    def __init__(self, memory: int) -> None:
        self.device = torch.device("cpu")
        self._memory = self._left = memory
        self._kept: dict[int, Part] = {}

    @property
    def moves(self) -> bool:
        """Whether the device is another than that of the tables."""
        return self.device.type != "cpu"

    def aim(self, device: torch.device) -> None:
        """Compute on a device from now on."""
        if device != self.device:
            self.device, self._left = device, self._memory
            self._kept.clear()

    def there(self, part: Part, rows: Any) -> tuple[Part, Any]:
        """Return a part, and what was read of it, where they are computed. Its halo stays, which names rows of tables.

        Args:
            part: on the host.
            rows: tensors in any containers; those of the part's edges are found in the part that is returned.
        """
        if not self.moves:
            return part, rows
        there = self._kept.get(part.number) or self._sent(part)
        return there, self.rows(rows, {id(part.edges[name]): value for name, value in there.edges.items()})

    def rows(self, rows: Any, known: Mapping[int, Tensor] | None = None) -> Any:
        """Return what was read where it is computed; tensors that are there by the identity of those on the host."""
        if not self.moves:
            return rows
        tree, known = Tree(rows), known or {}
        return tree.build([known[id(each)] if id(each) in known else sent(each, self.device) for each in tree.tensors])

    def _sent(self, part: Part) -> Part:
        tree = Tree((part.edge_index, part.edges, part.x, part.y, part.train))
        edge_index, edges, x, y, train = tree.build([sent(each, self.device) for each in tree.tensors])
        there = replace(part, edge_index=edge_index, edges=edges, x=x, y=y, train=train)
        made = made_of(part.edge_index)
        if made is not None:
            tree = Tree(made)
            take_made(edge_index, tree.build([sent(each, self.device) for each in tree.tensors]))
        if self._left >= part.nbytes and len(self._kept) == part.number:
            self._left -= part.nbytes
            self._kept[part.number] = there
        return there

    def leave(self, part: Part, there: Part) -> None:
        """Take notice that an operation is done with a part: what was made of its edges is wanted again."""
        if not self.moves or part.number in self._kept:
            return
        made, known = made_of(there.edge_index), made_of(part.edge_index)
        if made is not None and (known is None or made.number > known.number):
            tree = Tree(made)
            take_made(part.edge_index, tree.build([each.cpu() for each in tree.tensors]))

    def back(self, changes: Changes, late: Sequence[Late] = ()) -> Changes:
        """Return what an operation changes, on the host.

        Args:
            changes: of the device.
            late: numbers of the operation, which are looked at first.

        Raises:
            Exception: what those who look at numbers raise, here or by :func:`recollect.frames.settle`.
        """
        if not self.moves:
            return changes
        tree = Tree((changes.rows, changes.added, changes.state, [numbers for numbers, _ in late]))
        changes.rows, changes.added, changes.state, numbers = tree.build(_fetched(tree.tensors))
        settle()  # what was sent before has arrived too
        for found, (_, look) in zip(numbers, late, strict=True):
            look(found)
        return changes

    def settle(self) -> None:
        """Give the verdicts over what the device has computed until now."""
        if self.moves:
            settle()

    def on_host(self, value: Any) -> Any:
        """Return a value whose tensors are on the host."""
        tree = Tree(value)
        return tree.build(_fetched(tree.tensors))


@torch.no_grad()
def _fetched(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors on the host; of a device they come one after the other, and the last one is waited for."""
    coming: list[Tensor | Fetch] = []
    known: dict[Any, Fetch] = {}  # the same rows go to several tables
    for tensor in tensors:
        if tensor.device.type == "cpu":
            coming.append(tensor)
            continue
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        coming.append(known[key] if key in known else known.setdefault(key, Fetch(tensor.detach())))
    found = [each if isinstance(each, Tensor) else each.read() for each in reversed(coming)]
    return found[::-1]
