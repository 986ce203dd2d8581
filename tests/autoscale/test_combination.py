"""Halo rows that are combined from histories and fresh ones, against the same written out on the whole graph."""

import copy

import pytest
import torch
from compensation_zoo import (
    DOUBLE,
    NODES,
    OTHERS,
    PTR,
    SUMS,
    epoch,
    error,
    fill,
    gradients_of,
    loss_of,
    make,
    make_data,
    run,
    whole,
)
from torch_geometric.data import Data

from recollect.autoscale import Combination, SubgraphLoader, permute, to_adj_t
from recollect.messages import rows_of, sparse_csr
from recollect.models import GCN

EXACT = 1e-12
SCORES = {
    "1": lambda x: 1.0,
    "x": lambda x: x,
    "x^2": lambda x: x**2,
    "2x-x^2": lambda x: 2 * x - x**2,
    "sin(x)": lambda x: float(torch.tensor(x, dtype=torch.float64).sin()),
}
INDUCED = [name for name in SUMS if name != "own"]
COMPLETE = [*INDUCED, *(name for name in OTHERS if name != "pna-jk")]
CASES = [*((name, "induced") for name in INDUCED), *((name, "complete") for name in COMPLETE)]
cases = pytest.mark.parametrize(("name", "outward"), CASES)


def sparse_data():
    """Few enough edges that no node outside has all of its own in a mini-batch."""
    return make_data(edges=70)


def batches(data, outward, parts=1):
    return list(SubgraphLoader(data, PTR, parts, log=False, outward=outward))


def combined(name, layers, score="x", alpha=0.7, **options):
    return make(name, layers, compensate=True, combine=Combination(alpha, score), **options)


def drawn(model, data, seed=0):
    """Histories that are far from exact."""
    generator = torch.Generator().manual_seed(seed)
    _, rows, gradients = whole(model, data)
    return [[row + 0.3 * torch.randn(row.shape, generator=generator, dtype=row.dtype) for row in found]
            for found in (rows, gradients)]  # fmt: skip


class Slow:
    """The method for one mini-batch, with a row for each node of the graph.

    Rows of the out-neighbours T of the batch B are computed from edges that come from B, T and the in-neighbours H of
    B, or with ``complete`` from all; gradients go back the same way, and parameters get those of B's rows alone.
    """

    def __init__(self, model, data, inside, complete, rows, gradients):
        self.model, self.data, self.rows, self.gradients = model, data, rows, gradients
        self.inside = inside
        adj_t = data.adj_t
        edges = list(zip(adj_t.col_indices().tolist(), rows_of(adj_t).tolist(), strict=True))
        own = set(inside.tolist())
        self.targets = sorted({target for source, target in edges if source in own and target not in own})
        near = own | set(self.targets) | {source for source, target in edges if target in own}
        score = SCORES[model.combine.score]
        found_betas = []
        for node in self.targets:
            into = [source in near for source, target in edges if target == node]
            out = [target in own or target in self.targets for source, target in edges if source == node]
            found_betas.append([score(sum(found) / len(found) if found else 1.0) for found in (into, out)])
        self.betas = model.combine.alpha * torch.tensor(found_betas, dtype=torch.float64).reshape(-1, 2)
        kept = [complete or target not in self.targets or source in near for source, target in edges]
        kept = torch.tensor(kept)
        counts = rows_of(adj_t)[kept].bincount(minlength=NODES)
        self.adj_t = sparse_csr(
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]), adj_t.col_indices()[kept], adj_t.values()[kept],
            (NODES, NODES),
        )  # fmt: skip
        self.inputs = {name: data[name][kept] for name in model.inputs}

    def mix(self, old, fresh, column):
        beta = self.betas[:, column : column + 1]
        return (1 - beta) * old[self.targets] + beta * fresh[self.targets]

    def run(self):
        """Return the output, the parameters' gradients, and the rows that are pushed forward and backward."""
        model, last = self.model, self.model.num_layers - 1
        state, x = dict(self.inputs), self.data.x.clone()
        given, outs = [], []
        for layer in range(last + 1):
            given.append(x.detach().requires_grad_())
            outs.append(model.run_layer(layer, given[-1], self.adj_t, state))
            if layer < last:
                x = self.rows[layer].clone()
                x[self.targets] = self.mix(self.rows[layer], outs[-1].detach(), 0)
                x[self.inside] = outs[-1].detach()[self.inside]
        own = outs[last].detach()[self.inside].requires_grad_()
        out = model.readout(own, state)
        loss = loss_of(out, self.data.node_share[self.inside])
        parameters = list(model.parameters())
        found = [torch.zeros_like(p) for p in parameters]

        def add(grads):
            for total, grad in zip(found, grads, strict=True):
                total += 0 if grad is None else grad

        add(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        (v,) = torch.autograd.grad(loss, own)
        pushed, outside = {}, None
        for layer in range(last, -1, -1):
            pushed[layer] = v
            add(torch.autograd.grad(outs[layer][self.inside], parameters, v, retain_graph=True, allow_unused=True))
            if layer == 0:
                break
            cotangent = torch.zeros_like(outs[layer])
            cotangent[self.inside] = v
            cotangent[self.targets] = self.gradients[layer][self.targets] if outside is None else outside
            (grad,) = torch.autograd.grad(outs[layer], given[layer], cotangent, retain_graph=True)
            v = grad[self.inside]
            outside = self.mix(self.gradients[layer - 1], grad, 1)
        return out, torch.cat([grad.flatten() for grad in found]), [row.detach()[self.inside] for row in outs], pushed


@cases
@pytest.mark.parametrize("layers", [2, 4])
def test_a_mini_batch_is_the_one_written_out(name, outward, layers):
    data, model = sparse_data(), combined(name, layers)
    rows, gradients = drawn(model, data)
    for batch in batches(data, outward):
        twin = copy.deepcopy(model)
        fill(twin, rows, gradients)
        out = run(twin, batch)
        loss_of(out, batch.data.node_share[: batch.batch_size]).backward()
        inside = batch.n_id[: batch.batch_size]
        slow = Slow(model, data, inside, outward == "complete", rows, gradients)
        expected, grads, pushed, pushed_back = slow.run()
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        assert error(gradients_of(twin), grads) < EXACT
        for layer in range(1, layers):
            torch.testing.assert_close(
                twin.histories[layer - 1].pull(inside), pushed[layer - 1], rtol=1e-11, atol=1e-12
            )
            found = twin.gradients.table(layer).pull(inside)
            torch.testing.assert_close(found, pushed_back[layer], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_every_score(score, alpha):
    data, model = sparse_data(), combined("gcn", 3, score, alpha)
    rows, gradients = drawn(model, data)
    fill(model, rows, gradients)
    (batch, *_) = batches(data, "induced", 2)
    slow = Slow(model, data, batch.n_id[: batch.batch_size], False, rows, gradients)
    assert slow.betas.numel()
    out = run(model, batch)
    loss_of(out, batch.data.node_share[: batch.batch_size]).backward()
    expected, grads, *_ = slow.run()
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    assert error(gradients_of(model), grads) < EXACT


@cases
@pytest.mark.parametrize("layers", [2, 4])
def test_exact_histories_and_no_fresh_rows_give_the_whole_graphs_gradient(name, outward, layers):
    data, model = sparse_data(), combined(name, layers, alpha=0.0)
    expected, *tables = whole(model, data)
    fill(model, *tables)
    assert error(epoch(model, data, outward), expected) < EXACT
    other = combined(name, layers, score="1", alpha=1.0)  # incomplete rows are not exact
    fill(other, *tables)
    assert (error(epoch(other, data, outward), expected) > 1e-6) == (outward == "induced" or layers > 2)


def test_fresh_rows_stand_in_for_rows_that_were_never_pushed():
    data, found = make_data(), {}
    for alpha in (0.0, 1.0):
        model = combined("gcn", 4, "1", alpha)
        expected = whole(model, data)[0]
        found[alpha] = error(epoch(model, data, "induced"), expected)
    assert found[1.0] < 0.5 * found[0.0], found


def test_without_gradients_the_output_is_the_same():
    data, model = sparse_data(), combined("gcn2", 3)
    fill(model, *drawn(model, data))
    (batch, *_) = batches(data, "induced")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        out = run(twin, batch)
    assert torch.equal(run(model, batch), out)
    assert twin.gradients.table(1).table.clock.pushes == 1  # those that filled them


@pytest.mark.parametrize(
    "options",
    [{"recompute": True}, {"pool_size": 2, "buffer_size": NODES}, {"history_path": True}, {"recompute": False}],
    ids=["frames", "pool", "file", "modes"],
)
def test_beside_frames_pools_and_files(options, tmp_path):
    if "history_path" in options:
        options = {"history_path": tmp_path}
    data, found = sparse_data(), []
    both: list[dict] = [{}, options]
    for given in both:
        model = combined("gcn", 4, **given)
        fill(model, *drawn(model, data))
        found.append(epoch(model.eval() if options == {"recompute": False} and given else model, data, "induced"))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_a_graph_without_edges_between_mini_batches():
    data = Data(x=torch.randn(NODES, 3).double(), edge_index=torch.arange(NODES).repeat(2, 1))
    data = to_adj_t(permute(data, torch.arange(NODES), log=False))
    data.node_share = torch.rand(NODES, 4).double()
    data.adj_t = sparse_csr(
        data.adj_t.crow_indices(), data.adj_t.col_indices(), data.adj_t.values().double(), (NODES,) * 2
    )
    model = combined("gcn", 3)
    expected = whole(model, data)[0]
    assert error(epoch(model, data, "induced"), expected) < EXACT


def test_what_is_refused():
    data = sparse_data()
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            Combination(alpha)
    with pytest.raises(ValueError, match="score is 'cubic', but must be one of '1', 'x', "):
        Combination(score="cubic")
    with pytest.raises(ValueError, match="combine= is part of the correction of histories"):
        make("gcn", 3, combine=Combination())
    with pytest.raises(ValueError, match='give the loader outward="induced"'):
        epoch(combined("gcn", 3), data, True)
    with pytest.raises(ValueError, match="is for combine=Combination"):
        epoch(make("gcn", 3, compensate=True), data, "induced")
    for name in OTHERS:
        with pytest.raises(NotImplementedError, match="depends on the target's other sources"):
            epoch(combined(name, 3), data, "induced")
    for name, outward in (("own", "induced"), ("own", "complete"), ("pna-jk", "complete")):
        with pytest.raises(NotImplementedError, match="jumping knowledge"):
            epoch(combined(name, 3), data, outward)
    model = combined("gcn", 3)
    (batch, *_) = batches(data, "induced")
    out = run(model, batch)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="go backward once for each forward pass"):
        out.sum().backward()


def test_features_of_nodes_that_are_no_halo_come_from_the_graph():
    data = sparse_data()
    batch = next(b for b in batches(data, "induced") if set(b.data.outward.n_id.tolist()) - set(b.n_id.tolist()))
    batch.data.outward.nodes.pop("x")
    with pytest.raises(ValueError, match="the loader's graph has no x"):
        run(combined("gcn", 3), batch)


def test_symmetric_graphs_need_no_other_features():
    graph = make_data(edges=70)
    edges = torch.stack([graph.adj_t.col_indices(), rows_of(graph.adj_t)])
    data = Data(x=graph.x, edge_index=torch.cat([edges, edges.flip(0)], 1), node_share=graph.node_share)
    data = to_adj_t(permute(data, torch.arange(NODES), log=False))
    for batch in batches(data, "induced"):
        outward = batch.data.outward
        assert sorted(outward.n_id.tolist()) == sorted(batch.n_id.tolist())
        torch.testing.assert_close(outward.share[0], outward.share[1])
        batch.data.outward.nodes.pop("x")
        model = GCN(NODES, 3, 6, 4, 3, compensate=True, combine=Combination(), **DOUBLE).double()
        run(model, batch).sum().backward()
