"""Any graph, cut anyhow: mini-batches with exact histories compute the whole graph's rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recollect.autoscale import EvalSubgraphLoader, ScalableGNN, SubgraphLoader, normalize, permute, to_adj_t
from recollect.models import APPNP, GCN, GCN2, GIN

Data: Any = pytest.importorskip("torch_geometric.data").Data

IN, HIDDEN, OUT = 3, 4, 2
MODELS: dict[str, Any] = {
    "gcn": lambda n, layers, **options: GCN(n, IN, HIDDEN, OUT, layers, **options),
    "gcn2": lambda n, layers, **options: GCN2(n, IN, HIDDEN, OUT, layers, residual=True, **options),
    "appnp": lambda n, layers, **options: APPNP(n, IN, HIDDEN, OUT, layers, **options),
    "gin": lambda n, layers, **options: GIN(n, IN, HIDDEN, OUT, layers, **options),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Tensor, list[int], ScalableGNN]:
    """A graph in the order of its parts, where they begin, those of a mini-batch, and a model."""
    n = draw(st.integers(1, 12))
    node = st.integers(0, n - 1)
    edges = draw(st.lists(st.tuples(node, node), max_size=30))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=5)))
    ptr = torch.tensor([0, *cuts, n])
    parts = draw(st.lists(st.integers(0, len(cuts)), min_size=1, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    data = Data(
        x=torch.randn(n, IN, dtype=torch.float64, generator=generator),
        edge_index=torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).t().contiguous(),
        edge_weight=torch.rand(len(edges), dtype=torch.float64, generator=generator),
        num_nodes=n,
    )
    data = to_adj_t(permute(data, torch.randperm(n, generator=generator), log=False, kinds={"edge_weight": "edge"}))
    data.adj_t = normalize(data.adj_t)
    options: dict[str, Any] = {"history_dtype": torch.float64, "recompute": draw(st.booleans())}
    if draw(st.booleans()):
        options |= {"pool_size": draw(st.integers(1, 3)), "buffer_size": max(n, 1)}
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))](n, draw(st.integers(1, 4)), **options).double()
    return data, ptr, parts, model


def constant_halo(model: ScalableGNN, data: Any, rows: Tensor) -> Tensor:
    """The rows' outputs on the whole graph, all other rows of each layer's input being constants."""
    true, whole = data.x, data.x
    state: dict = {}
    other: dict = {}
    for layer in range(model.num_layers):
        true = model.forward_layer(layer, true, data.adj_t, state).detach()
        state = {name: value.detach() for name, value in state.items()}
        out = model.forward_layer(layer, whole, data.adj_t, other)
        whole = true.clone()
        whole[rows] = out[rows]
    return model.readout(whole, other)[rows]


@settings(deadline=None, max_examples=60)
@given(cases())
def test_any_mini_batch_of_any_partition(case):
    data, ptr, parts, model = case
    model.eval()
    whole = model(loader=EvalSubgraphLoader(data, ptr, log=False))
    torch.testing.assert_close(whole, model(data.x, data.adj_t).detach(), rtol=1e-10, atol=1e-10)
    held = [history.pull() for history in model.histories]
    model.train()
    (batch,) = SubgraphLoader(data, ptr, len(parts), sampler=parts, log=False)
    out = model(batch.data.x, batch.data.adj_t, *batch[1:])
    rows = batch.n_id[: batch.batch_size]
    torch.testing.assert_close(out.detach(), whole[rows], rtol=1e-10, atol=1e-10)
    leaves = list(model.parameters())
    found = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(constant_halo(model, data, rows).sin().sum(), leaves, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        else:
            assert a is b
    for history, before in zip(model.histories, held, strict=True):
        torch.testing.assert_close(history.pull(), before, rtol=1e-10, atol=1e-10)
