"""Whether layers need no more than a mini-batch has: its nodes, and the edges into them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autoscale._network import LayeredGNN
from recollect.messages import adjacency_of_edges, values_of
from recollect.messages.reach import DRAWING, Constant, Cut, Probe, copied, other_numbers, same

__all__ = ["check_locality"]

_WEIGHTS = "edge_weight"
_HISTORIES = ("histories", "gradients")


def check_locality(model: LayeredGNN, x: Tensor, adj_t: Tensor, inputs: Mapping[str, Any]) -> bool:
    """Look, on a small graph, whether each layer does for parts of it what it does for the whole.

    A copy of the network runs, in evaluation mode and with other parameters. What cannot be run on another graph, such
    as layers that read a table by the number of a node, is not looked at.

    Args:
        model: whose ``forward_layer`` is run; it stays as it is.
        x: features of a mini-batch and its halo.
        adj_t: edges of the mini-batch, sparse CSR.
        inputs: what the layers' state begins with.

    Returns:
        Whether that is known for later mini-batches too: without edges nothing is seen.

    Raises:
        ValueError: what a layer returns for a node depends on more than the node and the edges into it.
    """
    if x.dim() != 2 or not x.is_floating_point() or x.device.type == "meta":
        return True
    values = values_of(adj_t).detach()
    if not values.numel():
        return False
    edges = {name: value for name, value in inputs.items() if "edge" in name and isinstance(value, Tensor)}
    if edges.keys() != inputs.keys() or any(value.size(0) != values.numel() for value in edges.values()):
        return True
    with DRAWING, torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        try:
            failing = _first_that_looks_further(_other(model), x, edges | {_WEIGHTS: values})
        except Exception:  # whatever layers raise on a graph that is not theirs
            return True
    if failing is not None:
        raise ValueError(
            f"{failing} of the {type(model).__name__} returns for a node what depends on more than the node and the "
            "edges into it, and a mini-batch has no more: it goes by degrees of neighbours (as GCNConv: normalise the "
            "whole graph by recollect.autoscale.normalize, and let the layer take weights), looks further than a step "
            "(make each step a layer), or normalises over nodes (use norms over channels, such as LayerNorm)"
        )
    return True


def _other(model: LayeredGNN) -> LayeredGNN:
    """Return a copy of a network without its histories, with moved parameters, on the CPU."""
    other = copy.copy(model)
    kinds = (dict, list, set)
    other.__dict__ |= {name: copy.copy(value) for name, value in vars(model).items() if isinstance(value, kinds)}
    own = {name: child for name, child in model._modules.items() if name not in _HISTORIES and child is not None}
    parts = copied(nn.ModuleList(own.values())).cpu().eval()
    other._modules |= dict(zip(own, parts, strict=True))
    for held in (other._parameters, other._buffers):
        for name, value in held.items():
            if value is not None:
                held[name] = copy.deepcopy(value.detach()).cpu()  # type: ignore[assignment]
    other.training = False
    generator = torch.Generator().manual_seed(2)
    tensors = (*parts.parameters(), *(value for value in other._parameters.values() if value is not None))
    for value in tensors:
        if value.is_floating_point():
            value.add_(torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) * 0.1)
    return other


def _first_that_looks_further(model: LayeredGNN, x: Tensor, edges: Mapping[str, Tensor]) -> str | None:
    seen = {name: other_numbers(value.detach().cpu(), seed) for seed, (name, value) in enumerate(edges.items())}
    probe = Probe(seen, x.size(1), x.dtype)
    number = probe.rows.size(0)
    adj_t = adjacency_of_edges(probe.edge_index, probe.edges[_WEIGHTS], number, number)
    state = {name: value for name, value in probe.edges.items() if name != _WEIGHTS}
    found = [probe.rows]
    for layer in range(model.num_layers):
        found.append(_run(model, layer, found[-1], adj_t, state))
    found.append(_run(model, None, found[-1], adj_t, state))
    again = _run(model, 0, probe.rows, adj_t, {name: probe.edges[name] for name in seen if name != _WEIGHTS})
    if not same(again, found[1]):  # what does not repeat itself cannot be compared
        return None
    failing = [place for part in probe.cuts if not part.further for place in _differs(model, part, found)]
    if not failing:
        return None
    return "the readout" if min(failing) == model.num_layers else f"layer {min(failing)}"


def _differs(model: LayeredGNN, part: Cut, found: list[Tensor]) -> list[int]:
    """Return the first layer that returns something else for a part, given what is right, if there is one."""
    size, n_id = part.stop - part.start, torch.cat([torch.arange(part.start, part.stop), part.halo])
    adj_t = adjacency_of_edges(part.edge_index, part.edges[_WEIGHTS], n_id.numel(), size)
    state = {name: value for name, value in part.edges.items() if name != _WEIGHTS}
    for layer in range(model.num_layers):
        out = _run(model, layer, found[layer][n_id], adj_t, state)
        if not same(out, found[layer + 1][part.start : part.stop]):
            return [layer]
    out = _run(model, None, out, adj_t, state)
    return [] if same(out, found[-1][part.start : part.stop]) else [model.num_layers]


def _run(model: LayeredGNN, layer: int | None, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
    with Constant():
        return model.readout(x, state) if layer is None else model.run_layer(layer, x, adj_t, state)
