"""State dicts of PyGAS's models, under the names that this package's have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recollect.autoscale import ScalableGNN

__all__ = ["PygasReport", "load_pygas_state_dict"]

# GATConv's parameters by the names that torch_geometric gave them: until 1.7, until 2.4, and today's.
_GAT = {
    "lin_l.weight": "lin.weight",
    "lin_r.weight": "lin.weight",
    "lin_src.weight": "lin.weight",
    "lin_dst.weight": "lin.weight",
    "att_l": "att_src",
    "att_r": "att_dst",
}


@dataclass(frozen=True)
class PygasReport:
    """What was done to the entries of a state dict; each is named as it was given.

    Attributes:
        renamed: from the name given to the model's.
        transposed: names of matrices that the model has transposed.
        unused: names of norms that PyGAS's models have but do not apply.

    Example:
        >>> import torch
        >>> from recollect.models import GCN, PygasReport, load_pygas_state_dict
        >>> model = GCN(num_nodes=10, in_channels=4, hidden_channels=8, out_channels=3, num_layers=1)
        >>> given = {"convs.0.weight": torch.ones(4, 3), "convs.0.bias": torch.zeros(3)}
        >>> load_pygas_state_dict(model, given) == PygasReport()  # all is as here
        True
    """

    renamed: dict[str, str] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def load_pygas_state_dict(model: ScalableGNN, state_dict: Mapping[str, Tensor]) -> PygasReport:
    """Load the state dict of one of PyGAS's models (``torch_geometric_autoscale.models``) into the model of its name.

    Its convolutions are torch_geometric's, whose parameters had other names in other releases; those of 1.7 and of 2
    are known. Nothing is written unless everything fits.

    Args:
        model: a :class:`GCN`, :class:`GAT`, :class:`APPNP`, :class:`GCN2`, :class:`PNA` or :class:`PNA_JK` of the same
            numbers.
        state_dict: of PyGAS's model.

    Returns:
        Which entries were renamed, transposed or of no use.

    Raises:
        ValueError: entries are missing or unknown, have other shapes, or disagree.

    Example:
        >>> import torch
        >>> from recollect.models import GCN, load_pygas_state_dict
        >>> model = GCN(num_nodes=10, in_channels=4, hidden_channels=8, out_channels=3, num_layers=1)
        >>> given = {"convs.0.lin.weight": torch.ones(3, 4), "convs.0.bias": torch.zeros(3)}
        >>> load_pygas_state_dict(model, given).transposed
        ['convs.0.lin.weight']
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("histories.")}
    report, found, problems = PygasReport(), dict[str, Tensor](), list[str]()
    for given, value in state_dict.items():
        name, turned = _renamed(given, own)
        if name in own:
            value = value.t() if turned else value
            if value.shape != own[name].shape:
                expected = list(own[name].t().shape if turned else own[name].shape)
                problems.append(f"{given} has shape {list(state_dict[given].shape)}, but {expected} is expected")
            elif name in found and not torch.equal(found[name], value):
                problems.append(f"{given} differs from another entry that is {name} as well")
            found[name] = value
            report.transposed.extend([given] if turned else [])
            report.renamed.update({given: name} if name != given else {})
        elif _is_unused(given, state_dict):
            report.unused.append(given)
        else:
            norm = "a norm that was applied: the model needs batch_norm=True"
            problems.append(f"{given} is {norm if given.startswith('bns.') else 'unknown'}")
    problems += [f"{name} is missing" for name in own if name not in found]
    if problems:
        raise ValueError(
            f"this state dict does not fit a {type(model).__name__} with these numbers: {'; '.join(problems)}. Make "
            "the model with the numbers of the one that it was saved of"
        )
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    return report


def _renamed(given: str, own: Mapping[str, Tensor]) -> tuple[str, bool]:
    """Return what an entry is called here, and whether it is transposed here."""
    match = re.match(r"(convs\.\d+)\.(.+)$", given)
    if match is None or given in own:
        return given, False
    conv, name = match.groups()
    if name == "lin.weight" and f"{conv}.weight" in own:  # GCNConv's since 2.0
        return f"{conv}.weight", True
    return f"{conv}.{_GAT.get(name, name)}", False


def _is_unused(given: str, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether this is part of a norm that never saw a batch."""
    match = re.match(r"bns\.\d+\.", given)
    return match is not None and not bool(state_dict.get(f"{match[0]}num_batches_tracked", torch.ones(())))
