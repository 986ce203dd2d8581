"""A RevGNN on mini-batches, the slow and obvious way, and a graph for it; all in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.autoscale import SubData, partition, permute, to_adj_t
from recollect.models import RevGNN
from recollect.models._dropout import dropout_mask

Data = pytest.importorskip("torch_geometric.data").Data

NODES, IN, OUT = 40, 5, 3


def make_graph(parts: int = 4, seed: int = 0) -> tuple[Any, Tensor]:
    """Directed, with an isolated node and a self-loop, in the order of its parts."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(NODES - 1, (2, 120), generator=generator)
    edge_index[:, 0] = 3
    x = torch.randn(NODES, IN, dtype=torch.float64, generator=generator)
    y = torch.randint(2, (NODES, OUT), generator=generator)
    data = to_adj_t(Data(x=x, y=y, edge_index=edge_index.unique(dim=1)))
    perm, ptr, *_ = partition(data.adj_t, parts, "contiguous", log=False)
    return permute(data, perm, log=False), ptr


def make_model(num_layers: int = 3, *, hidden: int = 8, **options: Any) -> RevGNN:
    torch.manual_seed(0)
    if options.setdefault("num_nodes", NODES) is not None:
        options.setdefault("history_dtype", torch.float64)
    return RevGNN(IN, hidden, OUT, num_layers, **options).double()


def call(model: RevGNN, batch: SubData, **inputs: Any) -> Tensor:
    return model(batch.data.x, batch.data.adj_t, *batch[1:], **inputs)


def written_out(model: RevGNN, batch: SubData, tables: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of a mini-batch, and what each layer returns, by plain autograd.

    The halo's rows are constants, those of the tables [N, hidden_channels] of the layers' outputs; the first layer's
    input is that of their features. Draws what a model with a shared dropout mask draws, in its order.
    """
    size, halo = batch.batch_size, batch.n_id[batch.batch_size :]
    adj_t = batch.data.adj_t
    row = torch.repeat_interleave(torch.arange(adj_t.size(0)), adj_t.crow_indices().diff())
    edge_index = torch.stack([adj_t.col_indices(), row])
    number = model.num_groups
    x = model.embed(batch.data.x)
    mask: tuple[Any, ...] = (None,) * number
    if model.training and model.dropout:
        mask = dropout_mask(x, model.dropout).chunk(number, 1)
    own, around = list(x[:size].chunk(number, 1)), x[size:].chunk(number, 1)
    outputs = []
    for index in range(model.num_layers):
        behind = tables[index][halo].chunk(number, 1)
        for group in range(number):
            if group == 0:
                z = torch.cat([torch.stack(own[1:]).sum(0), torch.stack(around[1:]).sum(0)])
            else:
                z = torch.cat([own[group - 1], behind[group - 1]])
            own[group] = own[group] + model.layer(index).convs[group](z, edge_index, mask[group])[:size]
        around = behind
        outputs.append(torch.cat(own, 1))
    return model.classify(outputs[-1]), outputs
