"""`recollect.memory` against allocations that are known in bytes, and against the allocator's own records."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from recollect.memory import PeakMemory, peak_memory, tensor_bytes

KB = 1024  # `block()` has this many bytes
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def block(kilobytes: int = 1, **options: Any) -> Tensor:
    return torch.zeros(kilobytes * 256, **options)


def figures(memory: PeakMemory) -> tuple[int, int]:
    return memory.peak_bytes, memory.current_bytes


def measure(function: Callable[[], Any]) -> int:
    with peak_memory("cpu") as memory:
        function()
    return memory.peak_bytes


def allocator_peak(function: Callable[[], Any]) -> int:
    """Peak of the CPU allocator above its start, from the profiler's record of each allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    current = peak = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


class TestKnownAllocations:
    def test_nothing_is_nothing(self) -> None:
        with peak_memory("cpu") as memory:
            pass
        assert figures(memory) == (0, 0)

    def test_one_tensor(self) -> None:
        with peak_memory("cpu") as memory:
            kept = torch.zeros(1000, dtype=torch.float64)
        assert figures(memory) == (8000, 8000)
        assert kept.untyped_storage().nbytes() == 8000

    def test_dead_tensors_are_taken_off_at_once(self) -> None:
        with peak_memory("cpu") as memory:
            first = block(3)
            assert memory.current_bytes == 3 * KB
            del first
            assert memory.current_bytes == 0
            second = block(2)
            assert figures(memory) == (3 * KB, 2 * KB)
            del second
        assert figures(memory) == (3 * KB, 0)

    def test_chain_of_temporaries_has_two_alive(self) -> None:
        x = block()
        with peak_memory("cpu") as memory:
            for _ in range(50):
                x = x + 1
        assert figures(memory) == (2 * KB, KB)

    def test_peak_grows_and_shrinks_with_a_list(self) -> None:
        with peak_memory("cpu") as memory:
            kept = [block() for _ in range(100)]
            del kept[10:]
            kept += [block() for _ in range(50)]
        assert figures(memory) == (100 * KB, 60 * KB)

    def test_empty_tensors(self) -> None:
        with peak_memory("cpu") as memory:
            kept = [torch.empty(0), torch.empty(3, 0)]
        assert figures(memory) == (0, 0)
        assert len(kept) == 2

    def test_tensor_from_python_numbers(self) -> None:
        with peak_memory("cpu") as memory:
            kept = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        assert figures(memory) == (24, 24)
        assert kept.tolist() == [1, 2, 3]

    def test_operation_with_several_outputs(self) -> None:
        x = torch.randn(256)
        with peak_memory("cpu") as memory:
            values, indices = x.sort()
        assert figures(memory) == (KB + 2 * KB, KB + 2 * KB)
        assert values.numel() == indices.numel()

    def test_reference_cycle_lives_until_collected(self) -> None:
        gc.collect()
        with peak_memory("cpu") as memory:
            cycle: list[Any] = [block()]
            cycle.append(cycle)
            del cycle
            assert memory.current_bytes == KB
            gc.collect()
            assert memory.current_bytes == 0


class TestSharedStorages:
    def test_views_cost_nothing(self) -> None:
        with peak_memory("cpu") as memory:
            x = block(4)
            views = [x[1:], x.view(4, -1).t(), x.detach(), *x.chunk(8), x.expand(5, -1)]
        assert figures(memory) == (4 * KB, 4 * KB)
        assert len(views) == 12

    def test_a_view_keeps_all_of_its_storage(self) -> None:
        with peak_memory("cpu") as memory:
            view = block(4)[:1]
            assert memory.current_bytes == 4 * KB
            del view
            assert memory.current_bytes == 0

    def test_storages_from_before_do_not_count(self) -> None:
        x = block(4)
        with peak_memory("cpu") as memory:
            views = [x.t(), x[3:], x.detach(), x.add_(1), x.mul_(2)]
            torch.add(x, 1, out=x)
        assert figures(memory) == (0, 0)
        assert len(views) == 5

    def test_in_place_operations_cost_nothing(self) -> None:
        with peak_memory("cpu") as memory:
            x = block()
            x.add_(1).mul_(2).relu_()
            torch._foreach_add_([x, x], 1)
        assert figures(memory) == (KB, KB)

    def test_storage_made_without_an_operation(self) -> None:
        with peak_memory("cpu") as memory:
            x = torch.empty(0).set_(torch.UntypedStorage(KB))  # type: ignore[arg-type]
            x.view(-1)
            assert figures(memory) == (0, 0)
            x.untyped_storage().resize_(3 * KB)
            assert figures(memory) == (2 * KB, 2 * KB)


class TestResizing:
    def test_out_of_a_new_size_counts(self) -> None:
        out = torch.empty(0)
        x = block(2)
        with peak_memory("cpu") as memory:
            torch.add(x, 1, out=out)
            assert memory.current_bytes == 2 * KB
            del out
            assert memory.current_bytes == 0

    def test_resize_of_a_new_tensor(self) -> None:
        with peak_memory("cpu") as memory:
            x = block()
            x.resize_(1024)
            assert figures(memory) == (4 * KB, 4 * KB)
            x.resize_(4)  # tensors never give memory back in this way
            assert figures(memory) == (4 * KB, 4 * KB)

    def test_growth_of_a_tensor_from_before(self) -> None:
        x = block()
        with peak_memory("cpu") as memory:
            x.resize_(1024)
            assert figures(memory) == (3 * KB, 3 * KB)
            del x
            assert memory.current_bytes == 0

    def test_set_to_another_storage(self) -> None:
        with peak_memory("cpu") as memory:
            x, y = block(2), block(3)
            x.set_(y)  # type: ignore[call-overload]
            assert figures(memory) == (5 * KB, 3 * KB)
            x.set_()  # type: ignore[call-overload]
            del y
            assert memory.current_bytes == 0

    def test_data_assignment(self) -> None:
        with peak_memory("cpu") as memory:
            x, y = block(2), block(3)
            x.data = y
            assert figures(memory) == (5 * KB, 3 * KB)

    @pytest.mark.parametrize("typed", [False, True])
    @pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
    def test_a_storage_that_is_emptied_and_filled_again(self, typed: bool) -> None:
        with peak_memory("cpu") as memory:
            x = block(4)
            storage = x.storage() if typed else x.untyped_storage()
            storage.resize_(0)
            assert figures(memory) == (4 * KB, 0)
            other = block(4)
            assert figures(memory) == (4 * KB, 4 * KB)
            storage.resize_(4 * 256 if typed else 4 * KB)
            assert figures(memory) == (8 * KB, 8 * KB)
            del x, storage, other
            assert memory.current_bytes == 0

    def test_a_storage_from_before_that_is_emptied_and_filled_again(self) -> None:
        x = block(4)
        with peak_memory("cpu") as memory:
            x.untyped_storage().resize_(0)
            assert memory.current_bytes == 0
            x.untyped_storage().resize_(5 * KB)
            assert memory.current_bytes == KB

    def test_the_storage_method_is_put_back(self) -> None:
        before = torch.UntypedStorage.resize_
        with peak_memory("cpu"):
            with pytest.raises(ZeroDivisionError), peak_memory("cpu"):
                raise ZeroDivisionError
            assert torch.UntypedStorage.resize_ is not before
        assert torch.UntypedStorage.resize_ is before
        assert "resize_" not in vars(torch.UntypedStorage)


class TestSparse:
    def test_coo(self) -> None:
        dense = torch.eye(100)
        with peak_memory("cpu") as memory:
            sparse = dense.to_sparse()
        assert sparse._nnz() == 100
        assert memory.current_bytes == 100 * 4 + 2 * 100 * 8  # values float32, indices int64

    def test_coo_shares_the_tensors_that_it_is_made_of(self) -> None:
        indices, values = torch.zeros(2, 10, dtype=torch.int64), torch.ones(10)
        with peak_memory("cpu") as memory:
            sparse = torch.sparse_coo_tensor(indices, values, (3, 3), check_invariants=False)
            assert memory.current_bytes == 0
            summed = sparse.coalesce()
            assert memory.current_bytes == tensor_bytes(summed)
        assert not sparse.is_coalesced()
        assert memory.peak_bytes >= tensor_bytes(summed)

    def test_coo_in_place_takes_new_storages(self) -> None:
        sparse = torch.eye(8).to_sparse()
        with peak_memory("cpu") as memory:
            sparse.add_(torch.ones(8, 8).to_sparse())
            assert memory.current_bytes == tensor_bytes(sparse)
            sparse = sparse + sparse
        assert memory.current_bytes == tensor_bytes(sparse)

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
    @pytest.mark.parametrize("layout", ["csr", "csc", "bsr", "bsc"])
    def test_compressed(self, layout: str) -> None:
        blocks = ((10, 10),) if layout.startswith("bs") else ()
        original = getattr(torch.eye(100), f"to_sparse_{layout}")(*blocks)
        with peak_memory("cpu") as memory:
            sparse = original.clone()
        values = 10 * 100 * 4 if blocks else 100 * 4
        indices = (11 + 10) * 8 if blocks else (101 + 100) * 8
        assert figures(memory) == (values + indices,) * 2
        assert tensor_bytes(sparse) == values + indices

    def test_sparse_gradient(self) -> None:
        table = nn.Embedding(1000, 16, sparse=True)
        with peak_memory("cpu") as memory:
            table(torch.arange(5)).sum().backward()
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse
        # the indices' row is the int64 arange itself, kept; the ones of the sum are expanded and made dense
        assert memory.current_bytes == tensor_bytes(table.weight.grad) == 5 * 8 + 5 * 16 * 4


class TestAutograd:
    B, I, H, O = 1000, 8, 32, 4  # noqa: E741

    def mlp(self) -> tuple[nn.Linear, nn.Linear, Tensor]:
        torch.manual_seed(0)
        one, two = nn.Linear(self.I, self.H), nn.Linear(self.H, self.O)
        for parameter in (*one.parameters(), *two.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        return one, two, torch.randn(self.B, self.I)

    def test_saved_tensors_of_a_forward_pass(self) -> None:
        one, two, x = self.mlp()
        hidden, out = self.B * self.H * 4, self.B * self.O * 4
        with peak_memory("cpu") as memory:
            h = one(x)
            h = torch.relu(h)  # the layer's own output is not saved, relu's result is
            assert figures(memory) == (2 * hidden, hidden)
            y = two(h)
            del h  # only autograd holds it now
            assert memory.current_bytes == hidden + out
            loss = y.sum()
            del y  # a sum saves nothing
            assert memory.current_bytes == hidden + 4
            del loss
            assert memory.current_bytes == 0
        assert memory.peak_bytes == 2 * hidden

    def test_training_step(self) -> None:
        one, two, x = self.mlp()

        def step() -> None:
            two(torch.relu(one(x))).sum().backward()

        with peak_memory("cpu") as memory:
            step()
        # In relu's backward: its saved result, the gradient that comes and the one that goes, the loss and its 1.
        assert figures(memory) == (3 * self.B * self.H * 4 + 8, 0)

    def test_new_gradients_stay(self) -> None:
        one, two, x = self.mlp()
        two.zero_grad(set_to_none=True)
        one.zero_grad(set_to_none=True)
        with peak_memory("cpu") as memory:
            two(torch.relu(one(x))).sum().backward()
        assert memory.current_bytes == tensor_bytes(one, two)

    def test_optimizer_state(self) -> None:
        one, two, x = self.mlp()
        optimizer = torch.optim.Adam([*one.parameters(), *two.parameters()])
        parameters = tensor_bytes(one, two)
        currents = []
        for _ in range(3):
            with peak_memory("cpu") as memory:
                two(torch.relu(one(x))).sum().backward()
                optimizer.step()
            currents.append(memory.current_bytes)
        assert currents == [2 * parameters + 4 * 4, 0, 0]  # two averages, and four parameters' step counts
        assert tensor_bytes(optimizer) == 3 * parameters + 4 * 4

    def test_double_backward(self) -> None:
        x = block(requires_grad=True)
        with peak_memory("cpu") as memory:
            (first,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x)
            del first
            assert memory.current_bytes == KB
        assert second.shape == x.shape
        assert memory.peak_bytes > 2 * KB

    def test_torch_checkpoint_drops_what_lies_inside(self) -> None:
        x = block(requires_grad=True)

        def region(x: Tensor) -> Tensor:
            return x.exp().sin().exp().sin()

        with peak_memory("cpu") as memory:
            out = checkpoint(region, x, use_reentrant=False, preserve_rng_state=False)
            assert memory.current_bytes == KB  # the output
            out.sum().backward()
            del out
            assert memory.current_bytes == KB  # the gradient
        with peak_memory("cpu") as plain:
            out = region(x)
            assert plain.current_bytes == 3 * KB  # the results of both exps, which are also the sines' inputs; out
        del out

    def test_custom_function(self) -> None:
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                scaled = x * 2
                ctx.save_for_backward(scaled)
                return x * x

            @staticmethod
            def backward(ctx: Any, *grad: Tensor) -> Tensor:
                (scaled,) = ctx.saved_tensors
                return grad[0] * scaled

        x = block(requires_grad=True)
        with peak_memory("cpu") as memory:
            y = Square.apply(x)
            assert memory.current_bytes == 2 * KB
            y.backward(torch.ones_like(y))
            del y
            assert memory.current_bytes == KB

    def test_saved_tensor_hooks(self) -> None:
        x = block(requires_grad=True)

        def pack(tensor: Tensor) -> Tensor:
            return tensor.to(torch.float64)

        def unpack(tensor: Tensor) -> Tensor:
            return tensor.to(torch.float32)

        with peak_memory("cpu") as memory:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                y = x.exp()
            assert memory.current_bytes == KB + 2 * KB
            y.backward(torch.ones_like(y))
            assert x.grad is not None
            assert memory.current_bytes == 2 * KB
        # At the product: exp's result, its packed and its unpacked copy, both gradients.
        assert memory.peak_bytes == (1 + 2 + 1 + 2) * KB

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, context: Callable[[], Any]) -> None:
        x = block(requires_grad=True)
        with peak_memory("cpu") as memory, context():
            y = x.exp()
            y = y.exp()
            assert figures(memory) == (2 * KB, KB)
            del y
            assert memory.current_bytes == 0

    def test_batched_gradients(self) -> None:
        x = block(requires_grad=True)
        with peak_memory("cpu") as memory:
            y = x.exp()
            (grad,) = torch.autograd.grad(y, x, torch.ones(7, 256), is_grads_batched=True)
            del y
            assert memory.current_bytes == 7 * KB
        assert grad.shape == (7, 256)

    @pytest.mark.parametrize("depth", [1, 2, 9])
    def test_agrees_with_the_allocator(self, depth: int) -> None:
        layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(depth)))
        for parameter in layers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x = torch.randn(500, 32)

        def step() -> None:
            layers(x).sum().backward()

        step()
        assert measure(step) == allocator_peak(step) > depth * 500 * 32 * 4

    def test_residual_network_agrees_with_the_allocator(self) -> None:
        layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
        x = torch.randn(500, 32)

        def forward() -> Tensor:
            h = x
            for layer in layers:
                h = h + torch.relu(layer(h))
            return h.sum()

        assert measure(forward) == allocator_peak(forward) > 5 * 2 * 500 * 32 * 4

    def test_results_are_the_same_bit_for_bit(self) -> None:
        def train() -> list[Tensor]:
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 3)
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            x, y = torch.randn(40, 8), torch.randint(3, (40,))
            losses = []
            for _ in range(3):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return [*losses, *model.state_dict().values()]

        expected = train()
        with peak_memory("cpu"):
            found = train()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class TestContexts:
    def test_nested_contexts_are_both_right(self) -> None:
        with peak_memory("cpu") as outer:
            a = block(2)
            with peak_memory("cpu") as inner:
                b = block(3)
                del a
                assert figures(inner) == (3 * KB, 3 * KB)
                assert figures(outer) == (5 * KB, 3 * KB)
            c = block(4)
        assert figures(inner) == (3 * KB, 3 * KB)
        assert figures(outer) == (7 * KB, 7 * KB)
        del b, c
        assert figures(outer) == (7 * KB, 7 * KB)

    def test_exception_in_the_block(self) -> None:
        memory = peak_memory("cpu")
        with pytest.raises(ZeroDivisionError), memory:
            block(2).fill_(1 // 0)
        assert figures(memory) == (2 * KB, 0)
        block(7)
        assert figures(memory) == (2 * KB, 0)

    def test_exception_in_an_operation(self) -> None:
        with peak_memory("cpu") as memory:
            with pytest.raises(RuntimeError, match="size"):
                block(1) + block(2)
            kept = block()
            assert memory.current_bytes == KB
        assert kept.numel() == 256

    def test_used_again(self) -> None:
        memory = peak_memory("cpu")
        for kilobytes in (3, 2):
            with memory:
                block(kilobytes)
            assert figures(memory) == (kilobytes * KB, 0)

    def test_it_shows_what_it_measured(self) -> None:
        memory = peak_memory("cpu")
        assert repr(memory) == "PeakMemory(cpu: not entered yet)"
        with memory:
            kept = block(2)
            assert repr(memory) == "PeakMemory(measuring, peak_bytes=2048, by_device={'cpu': 2048})"
        del kept
        assert repr(memory) == "PeakMemory(measured, peak_bytes=2048, by_device={'cpu': 2048})"

    def test_inside_itself(self) -> None:
        with peak_memory("cpu") as memory:
            with pytest.raises(RuntimeError, match="inside itself"), memory:
                pass
            block(2)
        assert figures(memory) == (2 * KB, 0)

    def test_other_threads_are_not_seen(self) -> None:
        kept: list[Tensor] = []
        with peak_memory("cpu") as memory:
            thread = threading.Thread(target=lambda: kept.append(block(5)))
            thread.start()
            thread.join()
        assert figures(memory) == (0, 0)
        assert len(kept) == 1

    def test_deaths_in_other_threads_are_seen(self) -> None:
        with peak_memory("cpu") as memory:
            kept = [block(5)]
            thread = threading.Thread(target=kept.clear)
            thread.start()
            thread.join()
            assert figures(memory) == (5 * KB, 0)

    def test_tensor_subclass_with_operations_of_its_own(self) -> None:
        with peak_memory("cpu") as memory:
            pair = TwoTensor(block(2), block(2))
            assert memory.current_bytes == tensor_bytes(pair) == 4 * KB
            product = pair * pair.exp()
            assert figures(memory) == (12 * KB, 8 * KB)
            del pair, product
            assert memory.current_bytes == 0

    def test_storages_on_other_devices_are_not_the_cpus(self) -> None:
        with peak_memory("cpu") as memory:
            kept = block(5, device="meta") + 1
        assert figures(memory) == (0, 0)
        assert kept.is_meta


class TestDevices:
    def test_none_measures_the_cpu_too(self) -> None:
        with peak_memory() as memory:
            kept = block(2)
        assert memory.by_device["cpu"] == 2 * KB
        assert memory.peak_bytes >= 2 * KB
        assert kept.numel() == 512

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
    def test_names(self, device: torch.device | str) -> None:
        with peak_memory(device) as memory:
            block()
        assert memory.by_device == {"cpu": KB}

    def test_unknown_device(self) -> None:
        with pytest.raises(ValueError, match=r"'meta': it measures 'cpu' and 'cuda'"):
            peak_memory("meta")

    @pytest.mark.parametrize("device", ["cuda:99", 99])
    def test_missing_device(self, device: str | int) -> None:
        with pytest.raises(RuntimeError, match=r"'cuda:99', but \d+ CUDA devices are visible"):
            peak_memory(device)

    @needs_cuda
    def test_cuda_allocator(self) -> None:
        before = torch.zeros(1 << 20, device="cuda")
        with peak_memory("cuda") as memory:
            a = torch.zeros(1 << 20, device="cuda")
            del a
            b = torch.zeros(1 << 19, device="cuda")
            assert figures(memory) == (4 << 20, 2 << 20)
        del before, b
        assert figures(memory) == (4 << 20, 2 << 20)

    @needs_cuda
    def test_nested_cuda_contexts(self) -> None:
        with peak_memory("cuda") as outer:
            a = torch.zeros(1 << 20, device="cuda")
            del a
            with peak_memory("cuda") as inner:
                b = torch.zeros(1 << 19, device="cuda")
                del b
            assert inner.peak_bytes == 2 << 20
        assert outer.peak_bytes == 4 << 20


class TestTensorBytes:
    def test_distinct_storages_count_once(self) -> None:
        x = block(2)
        assert tensor_bytes(x, x[3:], {"a": [x.t(), (block(),)]}) == 3 * KB
        assert tensor_bytes(x[:1]) == 2 * KB
        assert tensor_bytes(x.untyped_storage()) == 2 * KB

    def test_module(self) -> None:
        module = nn.BatchNorm1d(10)
        assert tensor_bytes(module) == 4 * 10 * 4 + 8
        module(torch.randn(3, 10)).sum().backward()
        assert tensor_bytes(module, gradients=True) == 6 * 10 * 4 + 8

    def test_tied_parameters(self) -> None:
        one, two = nn.Linear(4, 4), nn.Linear(4, 4)
        two.weight = one.weight
        assert tensor_bytes(nn.ModuleList([one, two])) == 64 + 2 * 16

    def test_optimizer(self) -> None:
        layer = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        assert tensor_bytes(optimizer) == 80
        layer(torch.ones(4)).sum().backward()
        optimizer.step()
        assert tensor_bytes(optimizer) == 160
        assert tensor_bytes(optimizer, layer, gradients=True) == 240

    def test_values_without_tensors(self) -> None:
        assert tensor_bytes([None, 1, "name", 2.0], {"a": True}, torch.float32) == 0

    def test_generators_are_nests(self) -> None:
        assert tensor_bytes(block() for _ in range(3)) == 3 * KB

    def test_unknown_object(self) -> None:
        with pytest.raises(TypeError, match="cannot look into a object"):
            tensor_bytes([object()])


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize("first", [False, True], ids=["compiled before", "measured first"])
def test_compiled_functions_are_measured_as_written_and_stay_compiled(first: bool) -> None:
    """Torch never runs compiled code again of what it met under a dispatch mode."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    @torch.compile(backend=counter)
    def function(x: Tensor) -> Tensor:
        return (x + 1).cos() * (x + 2)

    x = block(requires_grad=True)
    if not first:
        function(x)
    with peak_memory("cpu") as memory:
        y = function(x)
    assert memory.peak_bytes >= 3 * KB  # cos and both factors are kept, and the product
    assert y.grad_fn is not None
    function(x)
    assert counter.frame_count == 1
