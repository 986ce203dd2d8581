"""Convolutions inside a block are computed without a row for each edge, with the numbers that the plain call gives."""

from __future__ import annotations

import copy
import pickle
import threading
import types
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch_geometric.nn import GATConv, GATv2Conv, GCNConv, GINConv, GraphConv, SAGEConv
from torch_geometric.nn import Sequential as GraphSequential

import recollect
from recollect.memory import peak_memory
from recollect.messages import convolve
from recollect.models import RevGNN
from recollect.reversible import GroupAddRev

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CHANNELS = 8


def gin(channels: int, **options: object) -> nn.Module:
    return GINConv(nn.Sequential(nn.Linear(channels, channels), nn.Tanh()), **options)


CONVS: dict[str, Callable[[int], nn.Module]] = {
    **{f"sage, {aggr}": lambda c, aggr=aggr: SAGEConv(c, c, aggr=aggr) for aggr in ("mean", "sum", "max", "min")},
    **{f"graphconv, {aggr}": lambda c, aggr=aggr: GraphConv(c, c, aggr=aggr) for aggr in ("add", "mean", "max", "min")},
    **{f"gin, {aggr}": lambda c, aggr=aggr: gin(c, aggr=aggr) for aggr in ("add", "mean", "max", "min")},
    "gcn": lambda c: GCNConv(c, c),
}


class Usual(nn.Module):
    """Norm, activation, convolution; with the graph by position or by name."""

    def __init__(self, conv: nn.Module, channels: int, by_name: bool = False, norm: type = nn.LayerNorm, p: float = 0):
        super().__init__()
        self.norm, self.dropout, self.conv, self.by_name = norm(channels), nn.Dropout(p), conv, by_name

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.dropout(self.norm(x).relu())
        return self.conv(x, edge_index=edge_index) if self.by_name else self.conv(x, edge_index)


class Several(nn.Module):
    """Two convolutions, one of them in a part that is in a part, and one in a list."""

    def __init__(self, make: Callable[[int], nn.Module], channels: int):
        super().__init__()
        self.first = Usual(Usual(make(channels), channels), channels, by_name=True)
        self.rest = nn.ModuleList([make(channels), nn.Tanh()])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.rest[1](self.rest[0](x=self.first(x, edge_index), edge_index=edge_index))


def in_sequential(make: Callable[[int], nn.Module], channels: int) -> nn.Module:
    inner = GraphSequential("x, graph", [(nn.LayerNorm(channels), "x -> x"), (make(channels), "x, graph -> x")])
    return GraphSequential("x, edge_index", [(inner, "x, edge_index -> x"), nn.Tanh()])


PLACES: dict[str, Callable[[Callable[[int], nn.Module], int], nn.Module]] = {
    "the block itself": lambda make, channels: make(channels),
    "behind a norm": lambda make, channels: Usual(make(channels), channels),
    "the graph by name": lambda make, channels: Usual(make(channels), channels, by_name=True),
    "several": Several,
    "in nested Sequentials": in_sequential,
    "behind dropout": lambda make, channels: Usual(make(channels), channels, p=0.5),
    "behind BatchNorm": lambda make, channels: Usual(make(channels), channels, norm=nn.BatchNorm1d),
}
every_conv = pytest.mark.parametrize("make", CONVS.values(), ids=CONVS.keys())
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())


def a_graph(nodes: int = 30, edges: int = 150, seed: int = 0) -> Tensor:
    return torch.randint(nodes - 1, (2, edges), generator=torch.Generator().manual_seed(seed))


def layers_of(make: Callable[[], nn.Module], depth: int, **options: bool) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(GroupAddRev(make(), num_groups=2, **options) for _ in range(depth))


def run(layers: nn.ModuleList, x: Tensor, *graphs: Tensor, keep: bool, fuse: bool) -> dict[str, Tensor]:
    """Return the output, the gradients and the buffers of one step, with fresh random draws."""
    for layer in layers:
        layer.disable, layer.fuse = keep, fuse
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    h = leaf * 1
    for i, layer in enumerate(layers):
        h = layer(h, graphs[i % len(graphs)])
    grads = torch.autograd.grad(h.sin().sum(), [leaf, *layers.parameters()])
    buffers = {name: buffer.double().clone() for name, buffer in layers.named_buffers()}
    return {"out": h.detach(), **{str(i): grad for i, grad in enumerate(grads)}, **buffers}


def assert_same(make: Callable[[], nn.Module], x: Tensor, *graphs: Tensor, tolerance: float = 1e-10) -> None:
    """Two steps: everything kept and every convolution called as it is; and as the library does it."""
    layers = layers_of(make, 3).to(x.dtype)
    others = copy.deepcopy(layers)
    for _ in range(2):
        expected = run(layers, x, *graphs, keep=True, fuse=False)
        found = run(others, x, *graphs, keep=False, fuse=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():  # sums of sums grow, and the inverse drifts with them
            size = float(value.abs().max()) if value.numel() else 0.0
            assert_close(found[name], value, rtol=tolerance, atol=tolerance * max(size, 1.0))
        for graph in graphs:
            graph.copy_(graph.flip(1).roll(3, 1) % x.size(0))  # another graph in place
            graph[0].add_(1).remainder_(x.size(0))


class TestNumbers:
    @every_place
    @every_conv
    def test_are_those_of_the_plain_call(self, make, place):
        assert_same(lambda: place(make, CHANNELS), torch.randn(30, 2 * CHANNELS).double(), a_graph())

    @every_conv
    def test_in_float32_and_with_a_graph_for_each_call(self, make):
        graphs = [a_graph(seed=seed, edges=60 + seed) for seed in range(3)]
        x = torch.randn(30, 2 * CHANNELS, generator=torch.Generator().manual_seed(3))
        assert_same(lambda: Usual(make(CHANNELS), CHANNELS), x, *graphs, tolerance=1e-4)

    @every_conv
    def test_under_autocast(self, make):
        """As near to the numbers in float32 as the plain call is."""
        layers, x, graph = (
            layers_of(lambda: Usual(make(CHANNELS), CHANNELS), 2),
            torch.randn(30, 2 * CHANNELS),
            a_graph(),
        )
        exact = run(layers, x, graph, keep=True, fuse=False)
        with torch.autocast("cpu", torch.bfloat16):
            plain = run(layers, x, graph, keep=True, fuse=False)
            found = run(layers, x, graph, keep=False, fuse=True)
        for name, value in exact.items():
            error = (plain[name] - value).norm()
            assert (found[name] - value).norm() <= 3 * error + 0.02 * value.norm(), name

    @every_conv
    def test_of_second_order(self, make):
        block, x, graph = Usual(make(CHANNELS), CHANNELS).double(), torch.randn(30, CHANNELS).double(), a_graph()
        orders = []
        for call in (block, lambda *args: convolve(block, *args)):
            leaf = x.clone().requires_grad_()
            first = torch.autograd.grad(call(leaf, graph).sin().sum(), [leaf, *block.parameters()], create_graph=True)
            orders.append([*first, *torch.autograd.grad(sum(grad.sin().sum() for grad in first), leaf)])
        assert_close(*orders, rtol=1e-10, atol=1e-10)

    def test_in_checkpoints_around_and_inside(self):
        block, graph = Usual(SAGEConv(CHANNELS, CHANNELS, aggr="max"), CHANNELS).double(), a_graph()
        x = torch.randn(30, CHANNELS).double().requires_grad_()

        def inside(x: Tensor, edge_index: Tensor) -> Tensor:
            return convolve(block, x, edge_index)

        expected = torch.autograd.grad(block(x, graph).sin().sum(), x)
        for out in (recollect.checkpoint(inside, x, graph), convolve(lambda: recollect.checkpoint(inside, x, graph))):
            assert_close(torch.autograd.grad(out.sin().sum(), x), expected)

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.sampled_from(["layer norm", "batch norm", "relu", "tanh", "dropout", "linear", *CONVS]),
            min_size=1,
            max_size=6,
        ),
        st.booleans(),
        st.integers(0, 2**16),
        st.integers(1, 60),
    )
    def test_of_random_blocks(self, names, nested, seed, edges):
        others = {
            "layer norm": lambda: nn.LayerNorm(4),
            "batch norm": lambda: nn.BatchNorm1d(4),
            "relu": nn.ReLU,
            "tanh": nn.Tanh,
            "dropout": lambda: nn.Dropout(0.3),
            "linear": lambda: nn.Linear(4, 4),
        }

        def block() -> nn.Module:
            steps: list[tuple[nn.Module, str]] = []
            for name in names:
                steps.append((CONVS[name](4), "x, edge_index -> x") if name in CONVS else (others[name](), "x -> x"))
                if name.endswith((", sum", ", add")):  # sums of sums grow until rounding is all there is
                    steps.append((nn.Tanh(), "x -> x"))
            made = GraphSequential("x, edge_index", steps)
            return GraphSequential("x, edge_index", [(made, "x, edge_index -> x"), nn.Tanh()]) if nested else made

        torch.manual_seed(seed)
        x, graph = torch.randn(9, 8).double(), torch.randint(9, (2, edges))
        # Batch norms of what is nearly constant, one after the other, magnify rounding.
        assert_same(block, x, graph, tolerance=1e-6 if names.count("batch norm") > 1 else 1e-9)


class TestCost:
    @every_place
    @every_conv
    def test_no_row_for_each_edge(self, make, place):
        nodes, edges, channels = 300, 24_000, 32
        graph, layers = a_graph(nodes, edges), layers_of(lambda: place(make, channels), 2).double()
        x = torch.randn(nodes, 2 * channels).double()
        run(layers, x, graph, keep=False, fuse=True)
        with peak_memory() as memory:
            run(layers, x, graph, keep=False, fuse=True)
        assert memory.peak_bytes < edges * channels * 8

    def test_revgnn_of_max_aggregation(self):
        nodes, edges, channels = 300, 24_000, 32
        model = RevGNN(4, 2 * channels, 3, 2, conv="sage", conv_kwargs={"aggr": "max"})
        x, graph = torch.randn(nodes, 4), a_graph(nodes, edges)
        model(x, graph).sum().backward()
        with peak_memory() as memory:
            model(x, graph).sum().backward()
        assert memory.peak_bytes < edges * channels * 4

    def test_what_is_not_fused_makes_them(self):
        """Which shows that the others' peaks would show it."""
        nodes, edges, channels = 300, 24_000, 32
        graph, x = a_graph(nodes, edges), torch.randn(nodes, 2 * channels)
        for fuse, conv in ((False, SAGEConv(channels, channels)), (True, GATv2Conv(channels, channels))):
            layers = layers_of(lambda conv=conv: Usual(conv, channels), 2)
            with peak_memory() as memory:
                run(layers, x, graph, keep=False, fuse=fuse)
            assert memory.peak_bytes > edges * channels * 4


class Watched(nn.Module):
    """A block that does something while it runs."""

    def __init__(self, conv: nn.Module, during: Callable[[nn.Module], object]):
        super().__init__()
        self.conv, self.during = conv, during

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        self.during(self)
        return self.conv(x, edge_index)


@pytest.fixture
def conv() -> nn.Module:
    return SAGEConv(CHANNELS, CHANNELS)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(30, CHANNELS, generator=torch.Generator().manual_seed(0))


def peak_of(call: Callable[[], object]) -> int:
    with peak_memory() as memory:
        call()
    return memory.peak_bytes


class TestNobodyElse:
    """Classes and modules are afterwards, and for everybody else, what they were."""

    def test_modules_are_as_they_were(self, conv, x):
        before, of_class = dict(vars(conv)), dict(vars(SAGEConv))
        convolve(Usual(conv, CHANNELS), x, a_graph())
        assert vars(conv) == before
        assert dict(vars(SAGEConv)) == of_class

    def test_also_after_an_error(self, conv, x):
        def fails(_: nn.Module) -> None:
            raise ValueError("in the block")

        with pytest.raises(ValueError, match="in the block"):
            convolve(Watched(conv, fails), x, a_graph())
        assert "forward" not in vars(conv)

    def test_also_after_a_block_in_a_block_and_a_convolution_that_is_there_twice(self, conv, x):
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one = self.two = conv

            def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
                inner = convolve(self.one, x, edge_index)
                assert "forward" in vars(conv)  # still
                return self.two(inner, edge_index)

        graph = a_graph()
        assert_close(convolve(Twice(), x, graph), conv(conv(x, graph), graph))
        assert "forward" not in vars(conv)

    def test_copies_that_the_block_makes_of_itself(self, conv, x):
        copies = []

        def during(block: nn.Module) -> None:
            copies.extend([copy.deepcopy(block.conv), pickle.loads(pickle.dumps(block.conv))])

        graph = a_graph()
        expected = convolve(Watched(conv, during), x, graph)
        with torch.no_grad():
            conv.lin_l.weight.zero_()
        for other in copies:
            assert_close(other(x, graph), expected)  # with weights of their own
            assert_close(convolve(other, x, graph), expected)

    def test_other_threads_call_the_convolution_as_it_is(self, conv):
        nodes, edges = 300, 60_000
        x, graph = torch.randn(nodes, CHANNELS), a_graph(nodes, edges)
        peaks: list[int] = []

        def elsewhere() -> None:
            peaks.append(peak_of(lambda: conv(x, graph)))

        def during(_: nn.Module) -> None:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

        convolve(Watched(conv, during), x, graph)
        assert peaks[0] > edges * CHANNELS * 4

    def test_threads_with_a_convolution_in_common(self, conv):
        x, graph = torch.randn(30, 2 * CHANNELS), a_graph()
        layers = nn.ModuleList(GroupAddRev(nn.ModuleList([conv, conv])) for _ in range(3))
        expected = run(layers, x, graph, keep=True, fuse=False)["out"]
        for layer in layers:
            layer.disable, layer.fuse = False, True
        wrong: list[object] = []

        def work() -> None:
            for _ in range(30):
                h = x.clone().requires_grad_()
                for layer in layers:
                    h = layer(h, graph)
                if not torch.allclose(h, expected, atol=1e-4):
                    wrong.append(h)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert "forward" not in vars(conv)


class Own(SAGEConv):
    def message(self, x_j: Tensor) -> Tensor:
        return 2 * x_j


class Weighted(nn.Module):
    def __init__(self, conv: nn.Module, by_name: bool):
        super().__init__()
        self.conv, self.by_name = conv, by_name

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        weight = torch.linspace(0, 1, edge_index.size(1), dtype=x.dtype)
        return self.conv(x, edge_index, edge_weight=weight) if self.by_name else self.conv(x, edge_index, weight)


class Bipartite(nn.Module):
    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv((x, 2 * x), edge_index, size=(x.size(0), x.size(0)))


def replaced() -> nn.Module:
    """Its forward was put on it, as wrappers do."""
    conv = SAGEConv(CHANNELS, CHANNELS)
    conv.forward = types.MethodType(lambda self, x, edge_index: 2 * SAGEConv.forward(self, x, edge_index), conv)
    return Usual(conv, CHANNELS)


def hooked(register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        conv = SAGEConv(CHANNELS, CHANNELS)
        getattr(conv, register)(lambda module, args, out: 2 * out)
        return Usual(conv, CHANNELS)

    return make


LEFT_ALONE: dict[str, Callable[[], nn.Module]] = {
    "a subclass": lambda: Usual(Own(CHANNELS, CHANNELS), CHANNELS),
    "weights": lambda: Weighted(GraphConv(CHANNELS, CHANNELS), by_name=False),
    "weights by name": lambda: Weighted(GCNConv(CHANNELS, CHANNELS), by_name=True),
    "bipartite": lambda: Bipartite(SAGEConv(CHANNELS, CHANNELS)),
    "a forward of its own": replaced,
    "a hook": hooked("register_forward_hook"),
    "a hook on messages": hooked("register_message_forward_hook"),
    "gat of two maps": lambda: Usual(GATConv((CHANNELS, CHANNELS), CHANNELS), CHANNELS),
    "gatv2": lambda: Usual(GATv2Conv(CHANNELS, CHANNELS), CHANNELS),
    "cached": lambda: Usual(GCNConv(CHANNELS, CHANNELS, cached=True), CHANNELS),
}


class TestLeftAlone:
    @pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
    def test_what_is_not_sure(self, make, x):
        block, graph = make(), a_graph()
        assert torch.equal(convolve(block, x, graph), block(x, graph))

    @pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
    def test_what_is_not_sure_in_a_reversible_layer(self, make):
        layers, graph = layers_of(make, 2).double(), a_graph()
        x = torch.randn(30, 2 * CHANNELS, generator=torch.Generator().manual_seed(0)).double()
        expected = run(layers, x, graph, keep=True, fuse=False)
        assert_close(run(layers, x, graph, keep=False, fuse=True), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda conv, x, graph: conv(x, graph, None, None),
            lambda conv, x, graph: conv(x, graph, edge_weight=None),
            lambda conv, x, graph: conv(x, graph, None, size=None),
            lambda conv, x, graph: conv(x),
        ],
    )
    def test_arguments_that_the_convolution_does_not_take(self, wrong, conv, x):
        class Wrong(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = conv

            def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
                return wrong(self.conv, x, edge_index)

        with pytest.raises(TypeError) as expected:
            Wrong()(x, a_graph())
        with pytest.raises(TypeError) as found:
            convolve(Wrong(), x, a_graph())
        assert str(found.value) == str(expected.value)

    def test_a_hook_that_is_taken_off_before_backward(self, conv):
        """Backward runs what forward ran."""
        block, graph = Usual(conv, CHANNELS).double(), a_graph()
        x = torch.randn(30, CHANNELS).double().requires_grad_()
        hook = conv.register_forward_hook(lambda module, args, out: None)
        out = recollect.checkpoint(lambda x: convolve(block, x, graph), x)
        hook.remove()
        expected = torch.autograd.grad(block(x, graph).sin().sum(), x)
        assert_close(torch.autograd.grad(out.sin().sum(), x), expected)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks at it
    @pytest.mark.parametrize("place", ["the block", "the convolution", "a function that calls it"])
    def test_what_is_compiled(self, place, conv):
        """It is compiled once, whoever calls it."""
        compilations = []

        def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
            compilations.append(graph)
            return graph.forward

        block = Usual(conv, CHANNELS)
        if place == "the block":
            called = torch.compile(block, backend=backend)
        elif place == "the convolution":
            conv.compile(backend=backend)
            called = block
        else:
            compiled = torch.compile(lambda x, graph: conv(x.relu(), graph), backend=backend)

            class Calls(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.conv = conv

                def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
                    return compiled(x, edge_index)

            called = Calls()
        torch._dynamo.reset()
        x, graph = torch.randn(30, CHANNELS), a_graph()
        expected = convolve(called, x, graph)
        number = len(compilations)
        assert number
        for _ in range(4):
            assert_close(convolve(called, x, graph), expected)
        assert len(compilations) == number

    def test_transforms_of_a_block(self, conv, x):
        block, graph = Usual(conv, CHANNELS), a_graph()
        found, expected = (
            torch.func.jacrev(lambda x, call=call: call(x, graph).sin())(x)
            for call in (lambda *args: convolve(block, *args), block)
        )
        assert_close(found, expected)

    def test_functional_call_of_a_block(self, conv, x):
        block, graph = Usual(conv, CHANNELS), a_graph()
        other = {name: parameter.detach().clone().requires_grad_() for name, parameter in block.named_parameters()}

        class Calls(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = block

            def forward(self, x: Tensor) -> Tensor:
                return convolve(self.block, x, graph)

        named = {f"block.{name}": 2 * value for name, value in other.items()}
        out = torch.func.functional_call(Calls(), named, (x,))
        expected = torch.func.functional_call(block, {name: 2 * value for name, value in other.items()}, (x, graph))
        assert_close(out, expected)
        assert_close(
            torch.autograd.grad(F.relu(out).sum(), other["conv.lin_l.weight"]),
            torch.autograd.grad(F.relu(expected).sum(), other["conv.lin_l.weight"]),
        )


class InCheckpoint(nn.Module):
    """One convolution in a checkpoint, which runs it again when the block is over, and one beside it."""

    def __init__(self, how: Callable[..., Tensor], make: Callable[[int], nn.Module]):
        super().__init__()
        self.how, self.first, self.second = how, make(CHANNELS // 2), make(CHANNELS // 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.how(self.first, x, edge_index).tanh(), edge_index)


CHECKPOINTS: dict[str, Callable[..., Tensor]] = {
    "recollect": recollect.checkpoint,
    "torch": lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False),
    "twice": lambda f, *args: recollect.checkpoint(recollect.checkpoint, f, *args),
}


@pytest.mark.parametrize("disable", [False, True])
@pytest.mark.parametrize("name", ["sage, mean", "graphconv, max", "gcn"])
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_a_convolution_in_a_checkpoint_within_the_block(how, name, disable):
    edge_index = torch.randint(12, (2, 40), generator=torch.Generator().manual_seed(0))
    x = torch.randn(12, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for one, off in ((lambda f, *args: f(*args), True), (CHECKPOINTS[how], disable)):
        torch.manual_seed(2)
        layer = GroupAddRev(InCheckpoint(one, CONVS[name]), num_groups=2, disable=off).double()
        out = layer(x.requires_grad_(), edge_index)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
