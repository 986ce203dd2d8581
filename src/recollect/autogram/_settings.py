"""What autograd's nodes keep of how their operations were called, as far as it says where a batch goes."""

from __future__ import annotations

from typing import Any

__all__ = ["settings_of"]

_AXES = ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1", "_saved_shifts")

_attributes: dict[str, tuple[str, ...]] = {}  # which a kind of node has: what autograd has is the same for all


def settings_of(node: Any, name: str) -> list[Any]:
    """Return a node's axes and shifts; of a batch normalisation, whether it is by the statistics of the batch.

    Args:
        node: of a graph.
        name: its kind.
    """
    if "BatchNorm" in name:
        return [getattr(node, "_saved_training", True)]
    known = _attributes.get(name)
    if known is None:
        known = _attributes[name] = tuple(attribute for attribute in _AXES if hasattr(node, attribute))
    return [getattr(node, attribute, None) for attribute in known]
