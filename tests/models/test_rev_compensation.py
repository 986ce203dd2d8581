"""Gradients of a RevGNN's mini-batches with histories of gradients, against those of the whole graph, in float64."""

import copy
import pickle
from typing import Any

import pytest
import torch
from rev_batches_zoo import IN, NODES, OUT, Data, call, make_graph, make_model
from torch import nn
from torch_geometric.nn import GENConv

from recollect.autogram import Engine
from recollect.autoscale import (
    Combination,
    EvalSubgraphLoader,
    SubgraphLoader,
    edge_index_of,
    normalize,
    to_adj_t,
    with_weights,
)
from recollect.autoscale._separable import Form, Way
from recollect.memory import peak_memory
from recollect.models import RevGNN
from recollect.models._dropout import dropout_mask

EXACT = 1e-12
HIDDEN = 12
SUMS: dict[str, dict[str, Any]] = {
    "graphconv": {"conv": "graphconv"},
    "sage of sums": {"conv": "sage", "conv_kwargs": {"aggr": "sum"}},
    "gcn": {
        "conv": "gcn",
        "conv_kwargs": {"normalize": False, "add_self_loops": False},
        "inputs": ("edge_weight",),
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "sage": {"conv": "sage"},
    "gin": {"conv": "gin"},
    "gat": {"conv": "gat"},
    "gen": {"conv": lambda channels: GENConv(channels, channels, norm="layer")},
}
WAYS = {
    "graphconv": Way(Form.SUM_AND_OWN, products=False),
    "sage of sums": Way(Form.SUM_AND_OWN, products=False),
    "gcn": Way(Form.SUM, products=False),
    "sage": Way(Form.ALL_EDGES),
    "gin": Way(Form.ANY),
    "gat": Way(Form.ANY),
    "gen": Way(Form.ANY),
}


def make(name="graphconv", num_layers=3, **options):
    """A graph in the order of its parts, and a network for it."""
    data, ptr = make_graph()
    if name == "gcn":
        data.adj_t = normalize(data.adj_t)
    options = {"hidden": HIDDEN, "compensate": True, **(SUMS | OTHERS).get(name, {}), **options}
    return data, ptr, make_model(num_layers, **options)


def loss_of(out):
    """A sum over nodes."""
    return (out * out.sin()).sum()


def batches(data, ptr, outward):
    return SubgraphLoader(data, ptr, batch_size=2, log=False, outward=outward)


def step(model, batch):
    inputs = {"outward": batch.data.outward} if "outward" in batch.data else {}
    loss_of(call(model, batch, **inputs)).backward()


def gradients_of(model):
    """All parameters' gradients in one, which are then given up."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([grad.flatten() for grad in found])


def epoch(model, data, ptr, outward):
    for batch in batches(data, ptr, outward):
        step(model, batch)
    return gradients_of(model)


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def whole(model, data, mask=None):
    """The whole graph's gradient, the layers' outputs, and the gradients by all blocks' outputs, by plain autograd."""
    number, edge_index = model.num_groups, edge_index_of(data.adj_t)
    args = [data.adj_t.values()] if model.conv_inputs else []
    masks = [None] * number if mask is None else mask.chunk(number, 1)
    x, rows, outputs = list(model.embed(data.x).chunk(number, 1)), [], []
    for index in range(model.num_layers):
        z = torch.stack(x[1:]).sum(0)
        for group in range(number):
            out = model.layer(index).convs[group](z, edge_index, masks[group], *args)
            outputs.append(out.requires_grad_() if out.is_leaf else out)  # frozen ones are leaves
            outputs[-1].retain_grad()
            x[group] = z = x[group] + outputs[-1]
        rows.append(torch.cat(x, 1))
    loss_of(model.classify(rows[-1])).backward()
    return gradients_of(model), [row.detach() for row in rows], [out.grad for out in outputs]


def fill(model, rows, gradients=()):
    for history, values in zip(model.tables, rows, strict=True):
        history.push(values)
    for block, values in enumerate(gradients):
        if block:
            model.gradients.table(block, values.size(1)).push(values)


def written_out(model, data, batch, rows, gradients, trust):
    """One mini-batch's gradient by the formulas, from histories as they are, and W of its nodes.

    Every block is evaluated at all nodes, whose rows but the mini-batch's are those of the histories. Parameters get
    gradients from the mini-batch's rows alone, blocks' inputs from all.
    """
    number, edge_index = model.num_groups, edge_index_of(data.adj_t)
    own = batch.n_id[: batch.batch_size]
    args = [data.adj_t.values()] if model.conv_inputs else []
    parameters = list(model.parameters())
    found = [torch.zeros_like(p) for p in parameters]

    def add(out, given, *more):
        grads = torch.autograd.grad(out, [*parameters, *more], given, retain_graph=True, allow_unused=True)
        for total, grad in zip(found, grads, strict=False):
            total += 0 if grad is None else grad
        return grads[len(parameters) :]

    first = model.embed(data.x)
    stream = [group.detach()[own] for group in first.chunk(number, 1)]
    blocks = []
    for index in range(model.num_layers):
        before = first.detach() if index == 0 else rows[index - 1]
        for group in range(number):
            if group:
                z = rows[index].chunk(number, 1)[group - 1].index_copy(0, own, stream[group - 1])
            else:
                z = torch.stack(before.chunk(number, 1)[1:]).sum(0).index_copy(0, own, torch.stack(stream[1:]).sum(0))
            if index == group == 0:
                z = torch.stack(first.chunk(number, 1)[1:]).sum(0)
            else:
                z.requires_grad_()
            out = model.layer(index).convs[group](z, edge_index, None, *args)
            blocks.append((z, out))
            stream[group] = stream[group] + out.detach()[own]
    last = torch.cat(stream, 1).requires_grad_()
    (sent,) = add(loss_of(model.classify(last)), None, last)
    sent = list(sent.chunk(number, 1))
    written = {}
    for block in range(len(blocks) - 1, -1, -1):
        group, (z, out) = block % number, blocks[block]
        written[block] = sent[group]
        from_own = torch.zeros_like(out).index_copy(0, own, sent[group])
        if block == 0:
            add(out, from_own)
            break
        (grad,) = add(out, from_own, z)
        outside = trust * gradients[block].index_fill(0, own, 0.0)
        (more,) = torch.autograd.grad(out, z, outside)
        for into in [group - 1] if group else range(1, number):
            sent[into] = sent[into] + (grad + more)[own]
    add(first, torch.zeros_like(first).index_copy(0, own, torch.cat(sent, 1)))
    return torch.cat([grad.flatten() for grad in found]), written


@pytest.mark.parametrize("outward", [True, "complete"], ids=["cut", "complete"])
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", SUMS)
def test_exact_histories_give_the_whole_graphs_gradient(name, groups, layers, outward):
    data, ptr, model = make(name, layers, num_groups=groups)
    expected, rows, gradients = whole(model, data)
    fill(model, rows, gradients)
    assert error(epoch(model, data, ptr, outward), expected) < EXACT
    *_, plain = make(name, layers, num_groups=groups, compensate=False)
    fill(plain, rows)
    assert error(epoch(plain, data, ptr, False), expected) > 0.01


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_blocks_that_are_no_sums_need_all_edges_of_the_nodes_outside(name, groups, layers):
    data, ptr, model = make(name, layers, num_groups=groups)
    expected, rows, gradients = whole(model, data)
    fill(model, rows, gradients)
    assert error(epoch(model, data, ptr, "complete"), expected) < EXACT
    *_, other = make(name, layers, num_groups=groups)
    with pytest.raises(NotImplementedError, match=r"block 1 of layer 0 .*graphconv.*outward=\"complete\""):
        epoch(other, data, ptr, True)
    assert other.gradients.is_empty(1)
    assert other.never_pushed() == [NODES] * layers


@pytest.mark.parametrize(
    "options",
    [{"exact": True}, {"disable": True}, {"tied": True}, {"anchor_every": 2}, {"norm": None}, {"num_groups": 6}],
    ids=str,
)
def test_every_kind_of_stream(options):
    data, ptr, model = make(num_layers=4, **options)
    expected, rows, gradients = whole(model, data)
    fill(model, rows, gradients)
    assert error(epoch(model, data, ptr, True), expected) < (1e-8 if "exact" in options else EXACT)


@pytest.mark.parametrize("name", [*SUMS, *OTHERS])
@pytest.mark.parametrize("groups", [2, 3])
def test_dropout_whose_mask_all_mini_batches_share(groups, name, monkeypatch):
    data, ptr, model = make(name, num_groups=groups, dropout=0.4)
    mask, far = dropout_mask(torch.empty(NODES, HIDDEN, dtype=torch.float64), 0.4), 0
    monkeypatch.setattr(model, "classify", lambda x, mask=None: RevGNN.classify(model, x, torch.ones_like(x)))
    expected, rows, gradients = whole(model, data, mask)
    fill(model, rows, gradients)
    for batch in batches(data, ptr, True if name in SUMS else "complete"):
        outside = batch.data.outward.n_id
        asked = [batch.n_id, outside[~torch.isin(outside, batch.n_id)]]  # nodes two steps away have no rows at first
        monkeypatch.setattr(model, "share", lambda x, asked=asked: mask[asked.pop(0)])
        step(model, batch)
        far += len(asked) == 0
    assert error(gradients_of(model), expected) < EXACT
    assert far == (0 if name in (*SUMS, "sage") else len(ptr) // 2)


def test_nodes_two_steps_away_draw_what_layers_share_in_the_forward_pass(monkeypatch):
    data, ptr, model = make("gin", dropout=0.4)
    share, rows = model.share, []
    monkeypatch.setattr(model, "share", lambda x: rows.append(x.size(0)) or share(x))
    for batch in batches(data, ptr, "complete"):
        rows.clear()
        outside = batch.data.outward.n_id
        loss = loss_of(call(model, batch, outward=batch.data.outward))
        assert rows == [batch.n_id.numel(), int((~torch.isin(outside, batch.n_id)).sum())]
        assert rows[1]
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        assert len(rows) == 2


def test_nodes_two_steps_away_without_features_are_refused_before_anything_is_written():
    data, ptr, model = make("gin", dropout=0.4)
    batch = next(iter(batches(data, ptr, "complete")))
    del batch.data.outward.nodes["x"]
    with pytest.raises(ValueError, match=r"nodes two steps away .* has no x"):
        step(model, batch)
    assert model.never_pushed() == [NODES] * 3


def test_dropout_of_its_own_is_its_mean_at_the_nodes_outside(monkeypatch):
    data, ptr, model = make(dropout=0.4, shared_dropout=False)
    batch, modes = next(iter(batches(data, ptr, True))), []
    loss = loss_of(call(model, batch, outward=batch.data.outward))

    def run_block(index, group, *args):
        modes.append((index, group, {module.training for module in model.block_of(index, group).modules()}))
        return RevGNN.run_block(model, index, group, *args)

    monkeypatch.setattr(model, "run_block", run_block)
    loss.backward()
    assert modes == [(index, group, {False}) for index, group in ((2, 1), (2, 0), (1, 1), (1, 0), (0, 1))]
    assert {block.training for layer in model.layers for block in layer.modules()} == {True}


@pytest.mark.parametrize("name", [*SUMS, *OTHERS])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_mini_batch_with_any_histories_follows_the_formulas(groups, name, monkeypatch):
    data, ptr, model = make(name, num_groups=groups)
    channels = HIDDEN // groups
    rows = [torch.randn(NODES, HIDDEN, dtype=torch.float64) for _ in range(3)]
    gradients = [torch.randn(NODES, channels, dtype=torch.float64) for _ in range(3 * groups)]
    monkeypatch.setattr(model.gradients, "trust", lambda layer: torch.tensor(0.7, dtype=torch.float64))
    for batch in batches(data, ptr, True if name in SUMS else "complete"):
        fill(model, rows, gradients)
        expected, written = written_out(model, data, batch, rows, gradients, 0.7)
        step(model, batch)
        assert error(gradients_of(model), expected) < EXACT
        own = batch.n_id[: batch.batch_size]
        for block in range(1, 3 * groups):
            found = gradients[block].index_copy(0, own, written[block])
            torch.testing.assert_close(model.gradients.table(block).pull(), found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"history_dtype": torch.int8}, {"history_dtype": torch.float16}, {"history_path": "here"}, {"pool_size": 2}],
    ids=str,
)
@pytest.mark.parametrize("name", ["graphconv", "gin"])
def test_other_histories(name, options, tmp_path, monkeypatch):
    if "history_path" in options:
        options = options | {"history_path": tmp_path / "tables"}
    if "pool_size" in options:
        options = options | {"buffer_size": NODES}
    data, ptr, model = make(name, **options)
    fill(model, *whole(model, data)[1:])
    monkeypatch.setattr(model.gradients, "trust", lambda layer: torch.tensor(0.7, dtype=torch.float64))
    for batch in batches(data, ptr, True if name in SUMS else "complete"):
        rows = [history.pull().double() for history in model.tables]
        gradients = [None, *(model.gradients.table(block).pull().double() for block in range(1, 6))]
        expected, _ = written_out(model, data, batch, rows, gradients, 0.7)
        step(model, batch)
        assert error(gradients_of(model), expected) < EXACT
    assert {table.dtype for table in model.gradients.tables} != {torch.float16}
    assert (tmp_path / "tables" / "5.gradients").exists() == ("history_path" in options)


@pytest.mark.parametrize("name", [*SUMS, *OTHERS])
@pytest.mark.parametrize("groups", [2, 3])
def test_after_a_refresh_the_first_step_is_exact(groups, name):
    data, ptr, model = make(name, num_groups=groups, dropout=0.5)
    expected, rows, gradients = whole(model.eval(), data)
    model.train()
    everything = EvalSubgraphLoader(data, ptr, batch_size=3, log=False)
    out = model.refresh(everything, lambda out, batch: loss_of(out))
    assert model.training
    torch.testing.assert_close(out, model.eval()(data.x, data.adj_t), rtol=1e-11, atol=1e-12)
    for block in range(1, 3 * groups):
        torch.testing.assert_close(model.gradients.table(block).pull(), gradients[block], rtol=1e-11, atol=1e-12)
    for history, values in zip(model.tables, rows, strict=True):
        torch.testing.assert_close(history.pull(), values, rtol=1e-11, atol=1e-12)
    assert error(epoch(model, data, ptr, True if name in SUMS else "complete"), expected) < EXACT
    with pytest.raises(ValueError, match=r"refresh\(loader, loss\) needs the loss"):
        model.refresh(everything)


def test_histories_converge_to_the_exact_ones():
    data, ptr, model = make()
    expected, *_ = whole(model, data)
    errors = [error(epoch(model, data, ptr, True), expected) for _ in range(40)]
    assert errors[0] > 0.05, errors
    assert errors[-1] < EXACT, errors


@pytest.mark.parametrize("name", WAYS)
def test_how_gradients_are_sent_back_is_observed_for_each_kind_of_block(name):
    data, ptr, model = make(name, num_layers=5)
    epoch(model, data, ptr, True if name in SUMS else "complete")
    ways = model._block_ways
    assert set(ways.of_blocks.values()) == set(ways.of_kinds.values()) == {WAYS[name]}
    assert len(ways.of_blocks) == 9
    assert len(ways.of_kinds) <= 2  # modules and their copies


class Largest(nn.Module):
    """Takes the largest of the sources' rows, and nothing of a target without any."""

    def __init__(self, channels):
        super().__init__()
        self.lin = nn.Linear(channels, channels)

    def forward(self, x, edge_index):
        index = edge_index[1][:, None].expand(-1, x.size(1))
        return torch.zeros_like(x).scatter_reduce(0, index, self.lin(x)[edge_index[0]], "amax", include_self=False)


def test_blocks_whose_other_sources_do_not_show_in_the_first_mini_batch():
    """Of nodes 0 and 1 the nodes outside have one edge each, of nodes 2 and 3 others too."""
    source = torch.tensor([0, 1, 2, 5, 3, 4, 4])
    target = torch.tensor([2, 3, 4, 4, 5, 5, 1])
    data = to_adj_t(Data(x=torch.randn(6, IN, dtype=torch.float64), edge_index=torch.stack([source, target])))
    data.node_order = torch.arange(6)
    model = make_model(3, hidden=HIDDEN, num_nodes=6, conv=Largest, compensate=True)
    expected, rows, gradients = whole(model, data)
    fill(model, rows, gradients)
    ptr = torch.tensor([0, 2, 4, 6])
    for part in range(3):
        loader = SubgraphLoader(data, ptr, batch_sampler=[[part]], log=False, outward="complete")
        step(model, next(iter(loader)))
    assert set(model._block_ways.of_kinds.values()) == {Way(Form.ANY)}
    assert error(gradients_of(model), expected) < EXACT


def test_a_block_that_is_replaced_is_observed_again():
    data, ptr, model = make()
    epoch(model, data, ptr, True)
    model.layers[1].convs[1] = copy.deepcopy(make("gin")[2].layers[1].convs[1])
    before = [history.table.clock.pushes for history in model.tables]
    with pytest.raises(NotImplementedError, match=r"block 1 of layer 1 of RevGNN"):
        epoch(model, data, ptr, True)
    assert [history.table.clock.pushes for history in model.tables] == before  # nothing was written


def test_each_history_of_gradients_is_read_and_written_once(monkeypatch):
    data, ptr, model = make(num_groups=3)
    fill(model, *whole(model, data)[1:])
    calls = []
    for name in ("pull", "push"):
        original = getattr(model.gradients, name)
        monkeypatch.setattr(
            model.gradients,
            name,
            lambda layer, *args, name=name, original=original: calls.append((name, layer)) or original(layer, *args),
        )
    step(model, next(iter(batches(data, ptr, True))))
    assert calls == [(name, block) for block in range(8, 0, -1) for name in ("push", "pull")]


def test_a_mini_batch_goes_backward_once():
    data, ptr, model = make()
    batch = next(iter(batches(data, ptr, True)))
    out = call(model, batch, outward=batch.data.outward)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="go backward once for each forward pass, from the sum of all losses"):
        out.sum().backward()
    engine = Engine(model)
    out = call(model, batch, outward=batch.data.outward)
    with pytest.raises(RuntimeError, match="go backward once"):
        engine.compute_gramian(out.sum(0))


def test_frozen_layers_get_none():
    data, ptr, model = make()
    for part in (model.project, model.layers[0]):
        part.requires_grad_(False)
    expected, rows, gradients = whole(model, data)
    fill(model, rows, gradients)
    assert error(epoch(model, data, ptr, True), expected) < EXACT
    assert [model.gradients.table(block).table.clock.pushes for block in (1, 2, 3)] == [1, 3, 3]


def test_mini_batches_without_nodes_outside():
    data, _, model = make()
    expected, *_ = whole(model, data)
    (batch,) = SubgraphLoader(data, torch.tensor([0, NODES]), log=False, outward=True)
    step(model, batch)
    assert error(gradients_of(model), expected) < EXACT
    assert not model._block_ways.of_blocks


def test_what_training_changes_shows_in_evaluation_mode_too():
    data, ptr, model = make()
    fill(model, *whole(model, data)[1:])
    batch = next(iter(batches(data, ptr, True)))
    with torch.no_grad():
        call(model, batch, outward=batch.data.outward)
    model.eval()
    expected = call(model, batch)  # without outward edges histories of gradients are left alone
    assert torch.equal(expected, call(model, batch, outward=batch.data.outward).detach())
    assert [table.table.clock.pushes for table in model.gradients.tables] == [1] * 5


def test_what_is_refused():
    data, ptr, model = make()
    plain = next(iter(batches(data, ptr, False)))
    with pytest.raises(ValueError, match=r"outward=True\) brings them"):
        call(model, plain)
    induced = next(iter(batches(data, ptr, "induced")))
    with pytest.raises(ValueError, match="without it give outward=True"):
        call(model, induced, outward=induced.data.outward)
    batch = next(iter(batches(data, ptr, True)))
    adj_t = with_weights(batch.data.adj_t, 2 * batch.data.adj_t.values())
    with pytest.raises(ValueError, match="weights of adj_t are others"):
        make("gcn")[2](batch.data.x, adj_t, *batch[1:], outward=batch.data.outward)
    with pytest.raises(ValueError, match="RevGNN has no combined rows"):
        make(combine=Combination())
    with pytest.raises(TypeError, match=r"compensate: these are for mini-batches"):
        make(num_nodes=None)

    class Scaled(RevGNN):
        def forward(self, x, edge_index, *args, **inputs):
            return super().forward(2 * x, edge_index, *args, **inputs)

    with pytest.raises(ValueError, match=r"Scaled has a forward of its own.* run_block alone"):
        Scaled(IN, HIDDEN, OUT, 3, num_nodes=NODES, compensate=True)


class Sharing(RevGNN):
    """Shares something, and does not say what blocks multiply their input by."""

    def mask_of(self, shared, group):
        return super(RevGNN, self).mask_of(shared, group)

    def block_of(self, index, group):
        return super(RevGNN, self).block_of(index, group) if self.hidden else super().block_of(index, group)

    hidden = False


def test_networks_of_ones_own_say_what_is_needed():
    data, ptr, _ = make()
    batch = next(iter(batches(data, ptr, True)))
    options = {"conv": "graphconv", "num_nodes": NODES, "compensate": True, "history_dtype": torch.float64}
    model = Sharing(IN, HIDDEN, OUT, 2, dropout=0.5, **options).double()
    with pytest.raises(NotImplementedError, match=r"Sharing .* has no mask_of"):
        step(model, batch)
    model.hidden = True
    with pytest.raises(NotImplementedError, match=r"Sharing has no block_of"):
        step(model, batch)


def test_state_copies_and_other_graphs():
    data, ptr, model = make()
    fill(model, *whole(model, data)[1:])
    expected = epoch(model, data, ptr, True)
    assert not [name for name in model.state_dict() if "gradients" in name]
    again = make()[2]
    again.load_state_dict(model.state_dict())
    assert again.gradients.is_empty(1)
    fill(again, *whole(again, data)[1:])
    assert error(epoch(again, data, ptr, True), expected) < EXACT
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.gradients.table(5).pull(), model.gradients.table(5).pull())
        assert error(epoch(copied, data, ptr, True), expected) < EXACT
    other = model.for_graph(NODES)
    assert other.gradients.is_empty(1)
    assert [table.embedding_dim for table in other.gradients.tables] == [6] * 5  # of every block but the first
    fill(other, *whole(other, data)[1:])
    assert error(epoch(other, data, ptr, True), expected) < EXACT
    model.reset_parameters()
    assert not model.gradients.table(3).pull().any()


@pytest.mark.parametrize("larger", [{"num_layers": 24}, {"num_nodes": 4_000}], ids=str)
@pytest.mark.parametrize("outward", [True, "complete"], ids=["cut", "complete"])
def test_memory_of_a_step_depends_neither_on_depth_nor_on_the_graph(outward, larger):
    def peak(num_layers=6, num_nodes=800):
        ring = torch.arange(num_nodes)
        data = Data(x=torch.randn(num_nodes, 4), edge_index=torch.stack([ring, ring.roll(1)]))
        data = to_adj_t(data)
        data.node_order = ring
        torch.manual_seed(0)
        conv = "graphconv" if outward is True else "gin"
        model = RevGNN(4, 64, 3, num_layers, conv=conv, dropout=0.2, num_nodes=num_nodes, compensate=True)
        ptr = torch.arange(0, num_nodes + 1, 200)
        (batch, *_) = SubgraphLoader(data, ptr, log=False, outward=outward)
        step(model, batch)
        with peak_memory() as memory:
            step(model, batch)
        return memory.peak_bytes

    assert peak(**larger) < 1.1 * peak()
