"""The graph behind losses: captures, and the uses of parameters."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recollect.autogram import Engine
from recollect.autogram._capture import Capture
from recollect.autogram._walk import walk


def graph_of(engine, output, *modules):
    parameters = {id(p): p for module in modules for p in module.parameters()}
    return walk(output, engine._recorder, parameters)


def uses_of(graph, parameter):
    return graph.uses.get(id(parameter), [])


def test_a_layers_uses_belong_to_its_capture():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    engine = Engine(net)
    graph = graph_of(engine, net(torch.rand(5, 3)), net)
    assert len(graph.captures) == 2
    for layer in (net[0], net[2]):
        for parameter in layer.parameters():
            (use,) = uses_of(graph, parameter)
            assert graph.nodes[use.capture].call.layer is layer


def test_a_use_outside_of_any_layer():
    layer = nn.Linear(3, 3)
    engine = Engine(layer)
    graph = graph_of(engine, layer(torch.rand(5, 3)) @ layer.weight, layer)
    captures = [use.capture for use in uses_of(graph, layer.weight)]
    assert sorted(capture is None for capture in captures) == [False, True]


def test_another_engines_captures_are_passed_by():
    layer = nn.Linear(3, 3)
    first, second = Engine(layer), Engine(layer)
    output = layer(torch.rand(5, 3))
    for engine in (first, second):
        graph = graph_of(engine, output, layer)
        assert len(graph.captures) == 1
        assert all(use.capture is not None for use in uses_of(graph, layer.weight))


def test_a_layer_whose_inside_is_used_by_others(monkeypatch):
    layer = nn.Linear(3, 3)
    engine = Engine(layer)
    inside = []
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: inside.append(original(*args)) or inside[-1])
    y = layer(torch.rand(5, 3))
    graph = graph_of(engine, y + inside[0].sin(), layer)
    assert graph.captures == []
    assert all(use.capture is None for use in uses_of(graph, layer.weight))


def test_a_cast_of_a_parameter_is_the_parameter():
    """Under autocast all uses of a weight share one cast of it."""
    layer = nn.Linear(3, 3)
    engine = Engine(layer)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(layer(torch.rand(5, 3)))
    graph = graph_of(engine, output, layer)
    assert [use.capture for use in uses_of(graph, layer.weight)] == graph.captures


def test_a_parameter_as_a_layers_input():
    layer, prompt = nn.Linear(3, 3), nn.ParameterList([torch.rand(5, 3)])
    engine = Engine(layer)
    graph = graph_of(engine, layer(prompt[0]), layer, prompt)
    (use,) = uses_of(graph, prompt[0])
    assert use.capture is None or id(prompt[0]) not in {id(p) for p in layer.parameters()}
    assert len(graph.captures) == 1


def test_a_layers_weight_as_its_input():
    layer = nn.Linear(3, 3)
    engine = Engine(layer)
    assert graph_of(engine, layer(layer.weight), layer).captures == []


def test_forms():
    lstm = nn.LSTM(3, 3)
    engine = Engine(lstm)

    def form(output):
        return graph_of(engine, output, lstm).form

    x = torch.rand(4, 5, 3)
    assert form(lstm(x)[0].sum()) == form(lstm(x[:2])[0].sum()) or len(x) != 2  # steps are nodes of their own
    assert form(lstm(x)[1][0].sum()) != form(lstm(x)[1][1].sum())  # of other outputs


def test_the_nodes_towards_captures():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    engine = Engine(net)
    output = net(torch.rand(5, 3)) * nn.Parameter(torch.rand(4)).exp()
    graph = graph_of(engine, output, net)
    kinds = {graph.kinds[k] for k in graph.towards_captures}
    assert kinds == {"MulBackward0", "TanhBackward0", Capture}


class Sentences(nn.Module):
    """Tokens alone go in; each position has an embedding, and sees all others."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.layer = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        h = self.layer(self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))).tanh()
        return ((h @ h.mT).softmax(-1) @ self.layer(h)).square().sum(-1).flatten()


def test_indices_are_data_and_positions_are_none():
    """Losses of all tokens take a pass for each position: a network is not run back behind each for every loss."""
    torch.manual_seed(0)
    model = Sentences().double()
    engine = Engine(model)
    losses = model(torch.randint(7, (3, 5)))
    assert engine.explain(losses) == "5 backward passes of 3 losses each for 4 parameters"
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    jacobian = torch.stack(rows)
    torch.testing.assert_close(engine.compute_gramian(losses), jacobian @ jacobian.T)


class Steps(nn.Module):
    """The last state of recurrent layers one behind the other."""

    def __init__(self, count=1):
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(4, 4, batch_first=True) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)[0]
        return x[:, -1].sum(1)


def saved_bytes(output):
    """How many bytes of tensors that are no parameters the nodes of a graph have saved."""
    waiting, seen, storages = [output.grad_fn], set(), {}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(child for child, _ in node.next_functions)
        for name in dir(node):
            if name.startswith("_saved_"):
                with contextlib.suppress(RuntimeError):
                    value = getattr(node, name)
                    for tensor in value if isinstance(value, tuple) else (value,):
                        if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("count", [1, 2])
def test_layers_by_which_no_pass_comes_are_freed_with_the_graph(count):
    net, x = Steps(count), torch.rand(3, 5, 4)
    engine = Engine(net)
    kept = engine.compute_gramian(net(x))  # the first of its form, which keeps the graph in any case
    for retain in (True, False):
        losses = net(x)
        before = saved_bytes(losses)
        torch.testing.assert_close(engine.compute_gramian(losses, retain_graph=retain), kept)
        assert before > 0
        if retain:
            assert saved_bytes(losses) == before
            losses.sum().backward(retain_graph=True)
        else:
            assert saved_bytes(losses) == 0
            with pytest.raises(RuntimeError, match="backward through"):
                losses.sum().backward()


def test_what_others_hold_of_a_freed_layer_stays():
    layer, x = nn.LSTM(4, 4), torch.rand(5, 3, 4)
    engine = Engine(layer)
    for _ in range(2):
        states, (last, _) = layer(x)
        expected = states.detach().clone(), last.detach().clone()
        engine.compute_gramian(states[-1].sum(1), retain_graph=False)
        assert torch.equal(states, expected[0])
        assert torch.equal(last, expected[1])
