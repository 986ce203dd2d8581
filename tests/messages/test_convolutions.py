"""`convolve` returns what the convolution does, and makes no row for each edge; what it cannot do, it leaves alone."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_zoo import ZOO
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch_geometric import EdgeIndex
from torch_geometric.nn import GATConv, GCNConv, GINConv, GraphConv, SAGEConv
from torch_geometric.nn.aggr import MaxAggregation

import recollect
from recollect.memory import peak_memory
from recollect.messages import _adjacency, _rules, convolve, sparse_csr
from recollect.messages._attention import attend
from recollect.messages._extreme import extreme
from recollect.messages._products import propagate
from recollect.reversible import GroupAddRev

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's own forward mode

CHANNELS = 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(CHANNELS, 5), nn.Tanh(), nn.Linear(5, CHANNELS))


FUSED: dict[str, Callable[[], nn.Module]] = {
    "sage": lambda: SAGEConv(CHANNELS, CHANNELS),
    "sage, sum": lambda: SAGEConv(CHANNELS, CHANNELS, aggr="sum"),
    "sage, project, normalize": lambda: SAGEConv(CHANNELS, CHANNELS, project=True, normalize=True),
    "sage, no root, no bias": lambda: SAGEConv(CHANNELS, CHANNELS, root_weight=False, bias=False),
    "sage, lazy": lambda: SAGEConv(-1, CHANNELS),
    "sage, max": lambda: SAGEConv(CHANNELS, CHANNELS, aggr="max"),
    "sage, min, project": lambda: SAGEConv(CHANNELS, CHANNELS, aggr="min", project=True),
    "graphconv": lambda: GraphConv(CHANNELS, CHANNELS),
    "graphconv, max": lambda: GraphConv(CHANNELS, CHANNELS, aggr="max"),
    "graphconv, min": lambda: GraphConv(CHANNELS, CHANNELS, aggr="min"),
    "graphconv, mean": lambda: GraphConv(CHANNELS, CHANNELS, aggr="mean", bias=False),
    "gin": lambda: GINConv(mlp()),
    "gin, mean, trained eps": lambda: GINConv(mlp(), eps=0.3, train_eps=True, aggr="mean"),
    "gin, max": lambda: GINConv(mlp(), aggr="max"),
    "gin, min": lambda: GINConv(mlp(), aggr="min"),
    "gcn": lambda: GCNConv(CHANNELS, CHANNELS),
    "gcn, improved": lambda: GCNConv(CHANNELS, CHANNELS, improved=True, bias=False),
    "gcn, no loops": lambda: GCNConv(CHANNELS, CHANNELS, add_self_loops=False),
    "gat": lambda: GATConv(CHANNELS, CHANNELS),
    "gat, heads": lambda: GATConv(CHANNELS, 2, heads=3, negative_slope=0.5, residual=True),
    "gat, averaged heads, no loops": lambda: GATConv(CHANNELS, CHANNELS, 2, concat=False, add_self_loops=False),
    "gat, attention dropped in training": lambda: GATConv(CHANNELS, CHANNELS, dropout=0.5, bias=False).eval(),
    "gcn, not normalized": lambda: GCNConv(CHANNELS, CHANNELS, normalize=False),
}


def patched() -> nn.Module:
    conv = SAGEConv(CHANNELS, CHANNELS)
    conv.message = lambda x_j: 2 * x_j
    return conv


def with_hook(register: str, hook: Callable) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        conv = SAGEConv(CHANNELS, CHANNELS)
        getattr(conv, register)(hook)
        return conv

    return make


def compiled() -> nn.Module:
    conv = SAGEConv(CHANNELS, CHANNELS)
    conv.compile(backend="eager")
    return conv


def explained() -> nn.Module:
    conv = SAGEConv(CHANNELS, CHANNELS)
    conv.explain = True
    conv._edge_mask, conv._loop_mask, conv._apply_sigmoid = torch.full((40,), 0.5), torch.ones(40) > 0, False
    return conv


def with_other_aggregation() -> nn.Module:
    conv = SAGEConv(CHANNELS, CHANNELS)
    conv.aggr_module = MaxAggregation()
    return conv


def with_a_hook_on_its_aggregation() -> nn.Module:
    conv = SAGEConv(CHANNELS, CHANNELS)
    conv.aggr_module.register_forward_hook(lambda module, args, out: 2 * out)
    return conv


def with_a_graph_inside() -> nn.Module:
    """Its cache holds another graph than it is called with, and it goes by its cache."""
    conv = GCNConv(CHANNELS, CHANNELS, cached=True)
    conv(torch.randn(12, CHANNELS), torch.tensor([[0, 1], [1, 0]]))
    return conv


class Doubled(SAGEConv):
    def message(self, x_j: Tensor) -> Tensor:
        return 2 * x_j


LEFT_ALONE: dict[str, Callable[[], nn.Module]] = {
    "gat, attention dropped": lambda: GATConv(CHANNELS, CHANNELS, dropout=0.5),
    "gat, two maps": lambda: GATConv((CHANNELS, CHANNELS), CHANNELS),
    "sage, two aggregations": lambda: SAGEConv(CHANNELS, CHANNELS, aggr=["mean", "max"]),
    "sage, aggregation exchanged": with_other_aggregation,
    "gcn, max": lambda: GCNConv(CHANNELS, CHANNELS, aggr="max"),
    "sage, product": lambda: SAGEConv(CHANNELS, CHANNELS, aggr="mul"),
    "gcn, mean": lambda: GCNConv(CHANNELS, CHANNELS, aggr="mean"),
    "against the edges": lambda: SAGEConv(CHANNELS, CHANNELS, flow="target_to_source"),
    "gcn, cached": lambda: GCNConv(CHANNELS, CHANNELS, cached=True),
    "nodes along another dimension": lambda: SAGEConv(CHANNELS, CHANNELS, node_dim=0),
    "gcn with a graph inside": with_a_graph_inside,
    "compiled": compiled,
    "a subclass": lambda: Doubled(CHANNELS, CHANNELS),
    "a method put on it": patched,
    "a hook": with_hook("register_forward_hook", lambda module, args, out: 2 * out),
    "a hook on messages": with_hook("register_message_forward_hook", lambda module, args, out: 2 * out),
    "a hook on its aggregation": with_a_hook_on_its_aggregation,
    "explained": explained,
}
TRANSFORMS: dict[str, Callable[..., object]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, -x])),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "make_fx": lambda f, x: make_fx(f)(x)(-x),
}


class Calling(nn.Module):
    """Calls a convolution in one of two ways."""

    def __init__(self, conv: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv = conv
        self.call = call

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.call(self.conv, x, edge_index)


every_fused = pytest.mark.parametrize("make", FUSED.values(), ids=FUSED.keys())
every_left_alone = pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())


@pytest.fixture
def x():
    return torch.randn(12, CHANNELS, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.fixture
def edge_index():
    """Repeated edges and loops are there; node 11 has no edge."""
    return torch.randint(11, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def products(monkeypatch):
    """The adjacencies of the products and of the reductions that ran, one after the other."""
    calls = []

    def counting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(adj_t: Tensor, *args: object) -> Tensor:
            calls.append(adj_t)
            return function(adj_t, *args)

        return counted

    monkeypatch.setattr(_rules, "propagate", counting(propagate))
    monkeypatch.setattr(_rules, "attend", counting(attend))
    monkeypatch.setattr(_rules, "extreme", counting(extreme))
    return calls


def gradients(out: Tensor, x: Tensor, conv: nn.Module, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.sin().sum(), [x, *conv.parameters()], **options)


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @every_fused
    def test_have_the_type_of_the_convolutions_own(self, make, dtype, x, edge_index):
        conv, x = make().to(dtype), x.detach().to(dtype)
        conv(x, edge_index)  # a lazy one gets its parameters
        assert convolve(conv, x, edge_index).dtype == conv(x, edge_index).dtype

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("graph", ZOO, ids=lambda graph: graph.__name__)
    @every_fused
    def test_are_those_of_the_convolution(self, make, graph, dtype):
        data, conv = graph(), make().to(dtype)
        x = data.x.to(dtype).requires_grad_()
        expected = conv(x, data.edge_index)
        found = convolve(conv, x, data.edge_index)
        assert found.dtype == dtype
        assert_close(found, expected)
        assert_close(gradients(found, x, conv), gradients(expected, x, conv))

    @every_fused
    def test_of_second_order(self, make, x, edge_index):
        x, conv = x.detach().double().requires_grad_(), make().double()
        orders = []
        for out in (conv(x, edge_index), convolve(conv, x, edge_index)):
            first = gradients(out, x, conv, create_graph=True)
            orders.append(torch.autograd.grad(sum(grad.sin().sum() for grad in first), x))
        assert_close(*orders)

    def test_in_batches_of_gradients_and_of_features(self, x, edge_index):
        conv = SAGEConv(CHANNELS, CHANNELS)
        out, grads = convolve(conv, x, edge_index), torch.randn(4, *x.shape)
        (found,) = torch.autograd.grad(out, x, grads, is_grads_batched=True)
        expected = [torch.autograd.grad(conv(x, edge_index), x, grad)[0] for grad in grads]
        assert_close(found, torch.stack(expected))
        rows = torch.stack([x.detach(), -x.detach()])
        batched = torch.func.vmap(lambda x: convolve(conv, x, edge_index))(rows)
        assert_close(batched, torch.stack([conv(row, edge_index) for row in rows]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision_are_nearer_than_the_convolutions_own(self, dtype, x, edge_index):
        exact = GraphConv(CHANNELS, CHANNELS)
        conv, half = copy.deepcopy(exact).to(dtype), x.detach().to(dtype)
        expected = exact(half.float(), edge_index)
        assert convolve(conv, half, edge_index).dtype == dtype
        error = (convolve(conv, half, edge_index).float() - expected).norm()
        assert error <= (conv(half, edge_index).float() - expected).norm() * 1.1
        assert error <= 0.02 * expected.norm()

    @every_fused
    def test_under_autocast(self, make, x, edge_index):
        """GCNConv adds up in float32 there, as its weights have the type of the features."""
        torch.manual_seed(0)
        conv = make()
        exact = conv(x, edge_index)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = conv(x, edge_index), convolve(conv, x, edge_index)
        assert found.dtype == expected.dtype
        assert (found - exact).norm() <= (expected - exact).norm() * 2

    def test_in_a_frame(self, x, edge_index):
        conv = SAGEConv(CHANNELS, CHANNELS)
        framed = recollect.checkpoint(lambda x: convolve(conv, x, edge_index).relu(), x)
        assert_close(gradients(framed, x, conv), gradients(conv(x, edge_index).relu(), x, conv))

    def test_of_a_graph_first_seen_in_inference_mode(self, x, edge_index):
        conv = SAGEConv(CHANNELS, CHANNELS)
        with torch.inference_mode():
            convolve(conv, x, edge_index)
        assert_close(gradients(convolve(conv, x, edge_index), x, conv), gradients(conv(x, edge_index), x, conv))

    def test_of_an_edge_index_that_changes(self, x, edge_index, products):
        conv = SAGEConv(CHANNELS, CHANNELS)

        def set_data() -> None:
            edge_index.data = edge_index.flip(0)

        for change in (lambda: None, lambda: edge_index.add_(1), lambda: edge_index[0].sub_(1), set_data):
            change()
            assert_close(convolve(conv, x, edge_index), conv(x, edge_index))
        more = torch.cat([x.detach(), torch.ones(3, CHANNELS)])
        assert_close(convolve(conv, more, edge_index), conv(more, edge_index))
        assert len(products) == 5

    def test_in_forward_mode(self, x, edge_index, products):
        conv, x = SAGEConv(CHANNELS, CHANNELS), x.detach()
        tangents = []
        with forward_ad.dual_level():
            for call in (conv, functools.partial(convolve, conv)):
                out = call(forward_ad.make_dual(x, x.cos()), edge_index)
                tangents.append(forward_ad.unpack_dual(out).tangent)
        assert_close(*tangents)
        assert len(products) == 1

    def test_with_another_default_device(self, x, edge_index, products):
        conv = SAGEConv(CHANNELS, CHANNELS)
        with torch.device("meta"):
            grads = gradients(convolve(conv, x, edge_index), x, conv)
        assert_close(grads, gradients(conv(x, edge_index), x, conv))
        assert len(products) == 1

    def test_of_a_backward_without_the_hook_that_the_forward_had(self, x, edge_index, products):
        """Backward runs again what forward ran; a hook that was there without grad leaves nothing behind."""
        conv = SAGEConv(CHANNELS, CHANNELS)
        hook = conv.register_forward_hook(lambda module, args, out: None)
        with torch.no_grad():
            convolve(conv, x, edge_index)
        hook.remove()
        convolve(conv, x, edge_index)
        assert len(products) == 1
        hook = conv.register_forward_hook(lambda module, args, out: None)
        out = recollect.checkpoint(lambda x: convolve(conv, x, edge_index).relu(), x)
        hook.remove()
        assert_close(gradients(out, x, conv), gradients(conv(x, edge_index).relu(), x, conv))


class TestCost:
    @every_fused
    def test_is_a_product(self, make, x, edge_index, products):
        convolve(make(), x, edge_index)
        assert len(products) == 1

    def test_no_row_for_each_edge(self):
        """The messages would be 40 times the features; all that a step makes is less than 7 times."""
        nodes, channels = 500, 64
        conv, edge_index = SAGEConv(channels, channels), torch.randint(nodes, (2, 40 * nodes))
        x = torch.randn(nodes, channels, requires_grad=True)
        features = x.untyped_storage().nbytes()
        peaks = []
        for call in (convolve, lambda conv, x, edge_index: conv(x, edge_index)):
            call(conv, x, edge_index).sum().backward()
            with peak_memory() as memory:
                call(conv, x, edge_index).sum().backward()
            peaks.append(memory.peak_bytes / features)
        assert peaks[0] < 7
        assert peaks[1] > 40

    def test_edges_that_a_block_makes_are_not_kept(self):
        """As deep as the layers may be, there are those of one block."""

        class OnFewerEdges(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = SAGEConv(CHANNELS, CHANNELS)

            def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
                return convolve(self.conv, x, edge_index[:, torch.rand(edge_index.size(1)) < 0.5])

        x, edge_index = torch.randn(20, 2 * CHANNELS, requires_grad=True), torch.randint(20, (2, 4000))
        peaks = []
        for depth in (1, 10):
            layers = [GroupAddRev(OnFewerEdges(), num_groups=2) for _ in range(depth)]
            with peak_memory() as memory:
                h = x
                for layer in layers:
                    h = layer(h, edge_index)
                h.sum().backward()
            peaks.append(memory.peak_bytes)
        assert peaks[1] < 1.3 * peaks[0]

    def test_backward_asks_for_no_adjacency_that_is_kept_anyway(self, x, edge_index):
        """It has no fingerprint and is not rebuilt."""
        conv = SAGEConv(CHANNELS, CHANNELS)
        x = x.detach().requires_grad_()
        certified = []
        for _ in range(2):  # in the first call it is made
            recollect.frames.certificate_of_process.reset()
            out = recollect.checkpoint(lambda x: convolve(conv, x, edge_index), x)
            out.sum().backward()
            certified.append(recollect.frames.certificate_of_process.equal)
        assert certified == [4, 1]

    def test_edges_are_sorted_once(self, x, edge_index, products):
        """For all layers and passes, forward and backward: one adjacency for each kind of sums."""
        convs = [make().double() for make in FUSED.values() for _ in range(2)]
        x = x.detach().double().requires_grad_()
        for _ in range(2):
            for conv in convs:
                gradients(convolve(conv, x, edge_index), x, conv)
        assert len(products) == 2 * len(convs)
        assert (
            len({id(adj_t) for adj_t in products}) == 7
        )  # sums, means, three ways of GCN's weights, two of attention's loops

    def test_edges_are_sorted_once_in_nested_frames(self, x, edge_index, products):
        layer = GroupAddRev(SAGEConv(CHANNELS, CHANNELS), num_groups=2)
        h = torch.cat([x, x], 1).detach().requires_grad_()
        recollect.checkpoint(functools.partial(recollect.checkpoint, layer), h, edge_index).sum().backward()
        assert len(products) > 2
        assert len({id(adj_t) for adj_t in products}) == 1

    def test_what_is_kept_dies_with_the_graph(self, x, edge_index, products):
        gc.collect()  # the graphs of other tests
        convolve(SAGEConv(CHANNELS, CHANNELS), x, edge_index).sum().backward()
        before, gone = len(_adjacency._KNOWN), weakref.ref(products.pop())
        del edge_index
        gc.collect()
        assert gone() is not None  # the fixture holds it
        clone = torch.randint(5, (2, 9))
        convolve(SAGEConv(CHANNELS, CHANNELS), x, clone).sum().backward()
        gone = weakref.ref(products.pop())
        assert len(_adjacency._KNOWN) == before + 1
        del clone
        gc.collect()
        assert len(_adjacency._KNOWN) == before
        assert gone() is None


class TestLeftAlone:
    @pytest.mark.parametrize("kind", [GATConv, SAGEConv])
    def test_a_method_put_on_the_class(self, kind, x, edge_index, monkeypatch):
        conv = kind(CHANNELS, CHANNELS)
        message = kind.message

        @functools.wraps(message)  # it has the name, and the module, of the method
        def doubled(self, *args, **named):
            return 2 * message(self, *args, **named)

        monkeypatch.setattr(kind, "message", doubled)
        assert torch.equal(convolve(conv, x, edge_index), conv(x, edge_index))

    @every_left_alone
    def test_convolutions(self, make, x, edge_index, products):
        conv = make()
        torch.manual_seed(0)
        expected = conv(x, edge_index)
        torch.manual_seed(0)
        assert torch.equal(convolve(conv, x, edge_index), expected)
        assert not products

    @pytest.mark.parametrize(
        "form",
        [
            lambda edge_index: EdgeIndex(edge_index, sparse_size=(12, 12)),
            lambda edge_index: sparse_csr(torch.arange(13), torch.arange(12), torch.ones(12), (12, 12)),
            lambda edge_index: edge_index[:, :0],
        ],
        ids=["EdgeIndex", "sparse", "no edges"],
    )
    def test_graphs(self, form, x, edge_index, products):
        conv = SAGEConv(CHANNELS, CHANNELS)
        graph = form(edge_index)
        assert torch.equal(convolve(conv, x, graph), conv(x, graph))
        assert not products

    def test_a_graph_of_inference_mode(self, x, edge_index, products):
        """Its changes are not counted."""
        conv = SAGEConv(CHANNELS, CHANNELS)
        with torch.inference_mode():
            graph = edge_index.clone()
            assert torch.equal(convolve(conv, x, graph), conv(x, graph))
        assert not products

    def test_arguments_that_are_none_are_no_arguments(self, x, edge_index, products):
        conv = GraphConv(CHANNELS, CHANNELS)
        assert_close(convolve(conv, x, edge_index, None), conv(x, edge_index, None))
        assert len(products) == 1

    def test_further_arguments(self, x, edge_index, products):
        conv, weight = GraphConv(CHANNELS, CHANNELS), torch.rand(40)
        assert torch.equal(convolve(conv, x, edge_index, weight), conv(x, edge_index, weight))
        assert not products

    def test_any_callable(self, x, edge_index):
        assert convolve(lambda x, graph, more: (x, graph, more), x, edge_index, 3) == (x, edge_index, 3)

    def test_a_graph_that_a_convolution_caches(self, x, edge_index):
        """Whatever it is called with later."""
        conv = GCNConv(CHANNELS, CHANNELS, cached=True)
        first = convolve(conv, x, edge_index)
        assert torch.equal(convolve(conv, x, edge_index.flip(0)), first)

    @pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
    def test_transforms(self, transform, x, edge_index, products):
        """Also where a transform is the first to see the graph; it is as good as new after."""
        conv, x = GraphConv(CHANNELS, CHANNELS), x.detach()
        expected = transform(lambda x: conv(x, edge_index).sin(), x)
        assert_close(transform(lambda x: convolve(conv, x, edge_index).sin(), x), expected)
        assert not products
        assert_close(convolve(conv, x, edge_index), conv(x, edge_index))

    def test_parameters_in_a_transform(self, x, edge_index):
        """Only the parameters are tensors of the transform."""
        conv, x = SAGEConv(CHANNELS, CHANNELS), x.detach()

        def loss(call: Callable[..., Tensor], lin_l: Tensor) -> Tensor:
            return torch.func.functional_call(Calling(conv, call), {"conv.lin_l.weight": lin_l}, (x, edge_index)).sum()

        def plain(conv: nn.Module, x: Tensor, edge_index: Tensor) -> Tensor:
            return conv(x, edge_index)

        weight = conv.lin_l.weight.detach()
        found, expected = (torch.func.grad(functools.partial(loss, call))(weight) for call in (convolve, plain))
        assert_close(found, expected)

    def test_without_numbers(self, x, edge_index, products):
        conv = SAGEConv(CHANNELS, CHANNELS)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert convolve(conv, x, edge_index).shape == x.shape
        assert not products

    def test_compiled(self, x, edge_index, products):
        conv = SAGEConv(CHANNELS, CHANNELS)
        compiled = torch.compile(lambda x, edge_index: convolve(conv, x, edge_index), backend="eager")
        assert_close(compiled(x, edge_index), conv(x, edge_index))
        assert not products

    @pytest.mark.parametrize("wrong", [12, -13])
    def test_edges_to_nowhere(self, wrong, x, edge_index, products):
        """The convolution says what is wrong."""
        conv = SAGEConv(CHANNELS, CHANNELS)
        edge_index[0, 3] = wrong
        with pytest.raises(IndexError) as expected:
            conv(x, edge_index)
        with pytest.raises(IndexError) as found:
            convolve(conv, x, edge_index)
        assert str(found.value) == str(expected.value)
        assert not products
