"""What a region takes and returns: tensors in any container, keyword arguments, tensors of any kind."""

import functools
import types
from collections import ChainMap, OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from seam_oracle import assert_right, assert_right_or_refused, data, float64, results
from torch import nn

import recollect
from recollect.frames import FrameError, couple

assert float64 is not None  # a fixture of every test here

Point = namedtuple("Point", "h scale")


@dataclass
class State:
    h: torch.Tensor
    scale: Any
    steps: int = 0


@dataclass(frozen=True)
class Frozen:
    h: torch.Tensor
    scale: Any


class ModelOutput(OrderedDict):
    """As transformers' outputs are: items are attributes too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


torch.utils._pytree.register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: ModelOutput(zip(names, values, strict=True)),
)


def _data(h, scale):
    return pytest.importorskip("torch_geometric.data").Data(x=h, scale=scale)


def _own_data(h, scale):
    """Of a class that a user derives from ``Data``."""
    graph = pytest.importorskip("torch_geometric.data").Data
    return type("Molecule", (graph,), {"__module__": __name__})(x=h, scale=scale)


def _read(value):
    """Return ``h`` and ``scale`` of any of the containers."""
    if isinstance(value, (dict, UserDict, ChainMap)):
        return value["h"], value["scale"]
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        h, scale = value
        return h, scale
    return (value.x if hasattr(value, "edge_index") else value.h), value.scale


CONTAINERS = {
    "list": lambda h, s: [h, s],
    "tuple": lambda h, s: (h, s),
    "dict": lambda h, s: {"h": h, "scale": s},
    "OrderedDict": lambda h, s: OrderedDict(h=h, scale=s),
    "defaultdict": lambda h, s: defaultdict(list, h=h, scale=s),
    "namedtuple": Point,
    "dataclass": State,
    "frozen dataclass": Frozen,
    "ModelOutput": lambda h, s: ModelOutput(h=h, scale=s),
    "Data": _data,
    "class of its own from Data": _own_data,
}
each_container = pytest.mark.parametrize("kind", CONTAINERS)
mutable = pytest.mark.parametrize(
    "kind", [k for k in CONTAINERS if k not in ("tuple", "namedtuple", "frozen dataclass")]
)


def _write(value, name, new):
    if isinstance(value, dict):
        value[name] = new
    elif isinstance(value, list):
        value[("h", "scale").index(name)] = new
    else:
        setattr(value, "x" if name == "h" and hasattr(value, "edge_index") else name, new)


# Containers.


@each_container
def test_tensors_in_a_container_get_their_gradients(kind):
    def step(wrap):
        lin, leaf = nn.Linear(4, 4), torch.randn(4, requires_grad=True)

        def region(state):
            h, scale = _read(state)
            return CONTAINERS[kind]((lin(h) * scale).tanh(), scale * 2)

        state = CONTAINERS[kind](data(), leaf)
        for _ in range(3):
            state = wrap(region, state)
        h, scale = _read(state)
        (h.square().sum() + scale.sum()).backward()
        return [*results(lin), leaf.grad]

    assert_right(step)


@each_container
def test_containers_in_containers(kind):
    def step(wrap):
        lin, leaf = nn.Linear(4, 4), torch.randn(4, requires_grad=True)

        def region(outer, by_name):
            h, scale = _read(outer[0]["inner"])
            return {"out": [(lin(h) * scale * by_name[0][1]).tanh()]}

        made = CONTAINERS[kind](data(), leaf)
        wrap(region, [{"inner": made}], ((None, torch.rand(4)),))["out"][0].square().sum().backward()
        return [*results(lin), leaf.grad]

    assert_right(step)


@each_container
@pytest.mark.parametrize("zeros", [False, True])
def test_a_tensor_in_a_container_that_is_changed_in_place_afterwards(kind, zeros):
    def step(wrap):
        lin, last, scale = nn.Linear(4, 4), nn.Linear(4, 4), torch.rand(4)
        if zeros:
            nn.init.zeros_(last.weight)

        def region(state):
            h, scale = _read(state)
            return last((lin(h) + scale).tanh())

        y = wrap(region, CONTAINERS[kind](data(), scale))
        scale.add_(3)
        y.square().sum().backward()
        return results(lin, last)

    assert_right_or_refused(step)


@mutable
def test_a_container_whose_tensor_is_replaced_afterwards(kind):
    def step(wrap):
        lin = nn.Linear(4, 4)

        def region(state):
            h, scale = _read(state)
            return (lin(h) * scale).tanh()

        state = CONTAINERS[kind](data(), torch.rand(4))
        y = wrap(region, state)
        _write(state, "scale", torch.rand(4) + 5)
        _write(state, "h", None)
        y.square().sum().backward()
        return results(lin)

    assert_right(step)


@mutable
def test_a_container_that_each_layer_updates(kind):
    def step(wrap):
        layers = [nn.Linear(4, 4) for _ in range(3)]

        def calling(layer):
            def run(state):
                h, scale = _read(state)
                _write(state, "h", (layer(h) * scale).tanh())
                return state

            return run

        state = CONTAINERS[kind](data(), torch.rand(4))
        for layer in layers:
            state = wrap(calling(layer), state)
        _read(state)[0].square().sum().backward()
        return [*results(*layers), _read(state)[0]]

    assert_right_or_refused(step)


@pytest.mark.parametrize("way", ["append", "clear", "update"])
def test_a_container_of_the_caller_that_a_region_fills(way):
    """Such as a cache of keys and values: what it holds afterwards is the forward's, once."""

    def step(wrap):
        lin, cache = nn.Linear(4, 4), {"append": [], "clear": [1, 2], "update": {}}[way]

        def region(h, cache):
            y = lin(h).tanh()
            if way == "append":
                cache.append(y)
            elif way == "clear":
                cache.clear()
            else:
                cache.update({len(cache): y})
            return y + len(cache)

        y = wrap(region, data(), cache)
        y.square().sum().backward()
        return [*results(lin), torch.tensor(len(cache))]

    assert_right_or_refused(step)


def test_settings_in_a_container_without_tensors_changed_afterwards():
    def step(wrap):
        lin, settings = nn.Linear(4, 4), {"scale": [2.0]}
        y = wrap(lambda h, settings: (lin(h) * settings["scale"][0]).tanh(), data(), settings)
        settings["scale"][0] = 9.0
        y.square().sum().backward()
        return results(lin)

    assert_right_or_refused(step)


# Partials, closures, defaults.


def _block(w, x, mask):
    return (x @ w).masked_fill(~mask, 0).tanh()


class _Masked:
    def __init__(self, w, mask):
        self.w, self.mask = w, mask

    def run(self, x):
        return _block(self.w, x, self.mask)


@pytest.mark.parametrize("way", ["partial", "partial of partial", "closure", "default", "method", "argument"])
def test_a_mask_that_is_used_again(way):
    def step(wrap):
        w, mask, x = torch.randn(4, 4, requires_grad=True), torch.rand(16, 4) > 0.5, torch.randn(16, 4)
        y = {
            "partial": lambda: wrap(functools.partial(_block, w, mask=mask), x),
            "partial of partial": lambda: wrap(functools.partial(functools.partial(_block, w), mask=mask), x),
            "closure": lambda: wrap(lambda x: _block(w, x, mask), x),
            "default": lambda: wrap(lambda x, mask=mask: _block(w, x, mask), x),
            "method": lambda: wrap(_Masked(w, mask).run, x),
            "argument": lambda: wrap(_block, w, x, mask),
        }[way]()
        mask.logical_not_()
        y.square().sum().backward()
        return (w.grad,)

    assert_right_or_refused(step)


def test_tensors_of_a_partial_that_require_grad():
    def step(wrap):
        w, v = torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True)
        region = functools.partial(lambda w, x, shift: (x @ w + shift["v"]).tanh(), w * 2, shift={"v": v.sin()})
        wrap(region, data()).square().sum().backward()
        return w.grad, v.grad

    assert_right(step)


# Keyword arguments.


def test_a_layer_of_torch_with_keyword_arguments():
    def step(wrap):
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        wrap(layer, torch.randn(2, 5, 8), src_mask=mask, is_causal=True).square().sum().backward()
        return results(layer)

    assert_right(step)


def test_attention_whose_query_key_and_value_are_one_tensor_by_keyword():
    def step(wrap):
        layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8, requires_grad=True)
        y, _ = wrap(layer, query=x, key=x, value=x, need_weights=False)
        y.square().sum().backward()
        return [*results(layer), x.grad]

    assert_right(step)


def test_keyword_arguments_get_their_gradients():
    def step(wrap):
        lin, a, b = nn.Linear(4, 4), torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
        region = lambda h, *, scale, more, name: (lin(h) * scale + more["b"] * len(name)).tanh()  # noqa: E731
        wrap(region, data(), scale=a * 1, more={"b": b}, name="xy").square().sum().backward()
        return [*results(lin), a.grad, b.grad]

    assert_right(step)


def test_keyword_arguments_changed_afterwards():
    def step(wrap):
        lin, shift = nn.Linear(4, 4), torch.zeros(4)
        y = wrap(lambda h, shift: (lin(h) + shift).tanh(), data(), shift=shift)
        shift.add_(1)
        y.square().sum().backward()
        return results(lin)

    assert_right_or_refused(step)


def test_a_region_with_keyword_arguments_alone():
    def step(wrap):
        lin = nn.Linear(4, 4)
        wrap(lambda **kwargs: lin(kwargs["h"]).tanh() * kwargs["n"], h=data(), n=3).square().sum().backward()
        return results(lin)

    assert_right(step)


def test_keyword_arguments_of_a_coupling():
    def step(wrap):
        blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
        scale = torch.randn(4, requires_grad=True)
        run = lambda z, block, scale=1.0: block(z).tanh() * scale  # noqa: E731
        f, g = (functools.partial(run, block=block) for block in blocks)
        x = torch.randn(16, 8, requires_grad=True)
        if wrap.framed:
            y = couple([f, g], x * 1, [(), ()], kwargs=[{"scale": scale}, {}])
        else:
            a, b = x.chunk(2, -1)
            a = a + f(b, scale=scale)
            y = torch.cat([a, b + g(a)], -1)
        y.square().sum().backward()
        return [*results(*blocks), scale.grad, x.grad]

    assert_right(step)


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": False},
        {"use_reentrant": False, "preserve_rng_state": True},
        {"use_reentrant": False, "determinism_check": "default", "debug": False},
        {"use_reentrant": False, "early_stop": True},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchs_own_keywords_are_not_the_functions(options):
    lin, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)), data()
    grads = []
    for checkpoint in (torch.utils.checkpoint.checkpoint, recollect.checkpoint):
        lin.zero_grad()
        torch.manual_seed(1)
        checkpoint(lin, x, **options).square().sum().backward(retain_graph=True)
        grads.append([p.grad.clone() for p in lin.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


# Tensors of other kinds.


class Image(torch.Tensor):
    pass


def test_a_subclass_stays_one_in_a_rebuild():
    def step(wrap):
        lin, x = nn.Linear(4, 4), torch.randn(16, 4).as_subclass(Image).requires_grad_()
        wrap(lambda t: (lin(t) * (2 if type(t) is Image else 3)).tanh(), x).square().sum().backward()
        return (lin.weight.grad.as_subclass(torch.Tensor), x.grad.as_subclass(torch.Tensor))

    assert_right(step)


def test_a_subclass_in_a_container_and_by_keyword():
    def step(wrap):
        lin, x = nn.Linear(4, 4), torch.randn(16, 4).as_subclass(Image)
        region = lambda d, t: lin(d["x"]) * (2 if isinstance(d["x"], Image) and isinstance(t, Image) else 3)  # noqa: E731
        wrap(region, {"x": x}, t=x).tanh().square().sum().backward()
        return (lin.weight.grad.as_subclass(torch.Tensor),)

    assert_right(step)


def test_a_parameter_among_the_arguments_stays_one():
    def step(wrap):
        w = nn.Parameter(torch.randn(4, 4))
        wrap(lambda x, w: (x @ w * (2 if isinstance(w, nn.Parameter) else 3)).tanh(), data(), w).sum().backward()
        return (w.grad,)

    assert_right(step)


def test_one_tensor_twice_is_one_tensor():
    def step(wrap):
        lin, x = nn.Linear(4, 4), data()
        region = lambda a, b, c: lin(a) * (2 if a is b and c[0] is a else 3)  # noqa: E731
        wrap(region, x, x, [x]).tanh().square().sum().backward()
        return results(lin)

    assert_right(step)


@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced", "flipped strides", "complex", "sparse", "scalar"])
def test_layouts_and_types(kind):
    def step(wrap):
        base = torch.randn(4, 4, requires_grad=True)
        x = {
            "transposed": lambda: base.mT,
            "expanded": lambda: base[:1].expand(4, 4),
            "sliced": lambda: base[::2, 1:3],
            "flipped strides": lambda: base.unfold(0, 2, 1),
            "complex": lambda: torch.complex(base, base.sin()).conj(),
            "sparse": lambda: (base * 1).to_sparse(),
            "scalar": lambda: base.sum(),
        }[kind]()
        region = lambda t: (t * t).to_dense().abs().square() if kind == "sparse" else (t.sin() * t).abs()  # noqa: E731
        wrap(region, x).sum().backward()
        return (base.grad,)

    assert_right(step)


def test_nested_tensors():
    def step(wrap):
        lin, parts = nn.Linear(4, 4), [torch.randn(3, 4), torch.randn(5, 4)]
        jagged = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
        wrap(lambda t: lin(t).sin(), jagged).values().square().sum().backward()
        return [*results(lin), jagged.grad.values()]

    assert_right(step)


def test_nested_tensors_in_a_coupling_in_lists_and_by_keyword():
    jagged = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
    lin = nn.Linear(4, 4)
    recollect.checkpoint(lambda a, k: lin(a[0]).sin() * k, [jagged], k=jagged).values().sum().backward()
    assert lin.weight.grad is not None
    block = nn.Linear(2, 2)
    couple([block, torch.sin], jagged.requires_grad_() * 1, [(), ()]).values().sum().backward()
    assert block.weight.grad is not None


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_tensors_without_values(mode):
    from contextlib import nullcontext

    from torch._subclasses.fake_tensor import FakeTensorMode

    device = "meta" if mode == "meta" else "cpu"
    with FakeTensorMode() if mode == "fake" else nullcontext():
        layers = nn.Sequential(nn.Linear(4, 4, device=device), nn.BatchNorm1d(4, device=device), nn.Dropout(0.5))
        x = torch.randn(16, 4, device=device, requires_grad=True)
        recollect.checkpoint(layers, x).sum().backward()
        assert x.grad.shape == x.shape
        block = nn.Linear(2, 2, device=device)
        couple([block, torch.sin], x * 1, [(), ()]).sum().backward()
        assert block.weight.grad.shape == (2, 2)


# Compiled by others.


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["layer", "region", "with buffers", "traced", "function"])
def test_scripted_regions(kind):
    def step(wrap):
        lin = nn.Linear(4, 4)
        if kind == "layer":
            region = nn.Sequential(lin, torch.jit.script(nn.Linear(4, 4)))
        elif kind == "region":
            region = torch.jit.script(nn.Sequential(lin, nn.Tanh()))
        elif kind == "with buffers":
            region = torch.jit.script(nn.Sequential(lin, nn.BatchNorm1d(4)))
        elif kind == "traced":
            region = torch.jit.trace(nn.Sequential(lin, nn.Tanh()), torch.randn(16, 4))
        else:
            scripted = torch.jit.script(_scriptable)
            region = lambda x: scripted(lin(x))  # noqa: E731
        wrap(region, data()).square().sum().backward()
        buffers = [b.to(torch.float64) for b in region.buffers()] if isinstance(region, nn.Module) else []
        return [lin.weight.grad if kind != "traced" else torch.zeros(4, 4), *buffers]

    assert_right(step)


def _scriptable(x: torch.Tensor) -> torch.Tensor:
    return x.tanh() * 2


# Outputs.


@each_container
def test_gradients_flow_through_every_tensor_of_an_output(kind):
    def step(wrap):
        lin, x = nn.Linear(4, 4), data()
        out = wrap(lambda h: CONTAINERS[kind](lin(h).tanh(), lin(h).exp()), x)
        h, scale = _read(out)
        scale.sum().backward(retain_graph=True)
        h.sum().backward()
        return results(lin)

    assert_right(step)


@each_container
def test_a_graph_that_was_freed_is_named_whatever_the_output_is_in(kind):
    lin = nn.Linear(4, 4)
    h, scale = _read(recollect.checkpoint(lambda h: CONTAINERS[kind](lin(h).tanh(), lin(h).exp()), data()))
    loss = h.sum() + scale.sum()
    loss.backward()
    with pytest.raises((FrameError, RuntimeError), match=r"second time|retain_graph"):
        loss.backward()


def test_a_dataclass_is_replaced_and_not_changed():
    def step(wrap):
        lin = nn.Linear(4, 4)
        region = lambda s: replace(s, h=lin(s.h).tanh(), steps=s.steps + 1)  # noqa: E731
        state = State(data(), torch.ones(()))
        for _ in range(3):
            state = wrap(region, state)
        (state.h * state.steps).square().sum().backward()
        return [*results(lin), torch.tensor(state.steps)]

    assert_right(step)


def test_objects_that_nobody_can_open_are_passed_on():
    def step(wrap):
        lin, box = nn.Linear(4, 4), types.SimpleNamespace(scale=torch.rand(4, requires_grad=True))
        wrap(lambda h, box: (lin(h) * box.scale).tanh(), data(), box).square().sum().backward()
        return [*results(lin), box.scale.grad]

    assert_right(step)
