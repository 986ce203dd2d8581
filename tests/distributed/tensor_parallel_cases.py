"""DTensors as parameters, arguments and outputs of frames, against the same network on whole tensors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from processes import TOLERANCE, Wrap, assert_close, full, gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import recollect
import recollect.invertible as inn
from recollect.reversible import GroupAddRev

WIDTH, ROWS, LENGTH = 8, 4, 6


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        y: Tensor = self.down(self.dropout(torch.tanh(self.up(self.norm(x)))))
        return y


class Net(nn.Module):
    """Three residual blocks; ``around`` wraps each."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp(dropout=dropout) for _ in range(3))
        self.around: Wrap = plain

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.around(block, x)
        return x


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GroupAddRev(nn.ModuleList(Mlp(WIDTH // 2) for _ in range(2)), fuse=False) for _ in range(3)
        )
        self.around: Wrap = plain

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, None)
        return x

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for layer in self.layers for block in layer.convs]


class Coupled(Reversible):
    """A chain of couplings, whose inputs are whole tensors or DTensors."""

    def __init__(self, kind: type[nn.Module], out: int, dim: int = 2) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(kind(*(self.make(out) for _ in range(2)), dim=dim) for _ in range(3))

    @staticmethod
    def make(out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH // 2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, out * WIDTH // 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for layer in self.layers for block in layer.blocks]


def switch_off(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, GroupAddRev):
            module.disable = True
        if isinstance(module, inn.Module):
            module.invertible = module.checkpoint = False
    return net


def check(
    make: Callable[[], nn.Module],
    prepare: Callable[[nn.Module, DeviceMesh], None],
    world: int,
    *,
    wrap: Wrap = plain,
    placement: Any = None,
    dtype: torch.dtype = torch.float64,
    steps: int = 2,
    tolerance: float = 1.0,
) -> None:
    """Compare loss and gradients, those of the input too, on a tensor that all ranks have."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(7)
    net = make().to(dtype)
    oracle = switch_off(copy.deepcopy(net))
    prepare(net, mesh)
    net.around = wrap
    results = []
    for model, spread in ((net, True), (oracle, False)):
        x = torch.randn(ROWS, LENGTH, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))
        if spread and placement is not None:
            x = distribute_tensor(x, mesh, [placement])
        x.requires_grad_()
        for _ in range(steps):
            model.zero_grad()
            x.grad = None
            y = model(x)
            loss = full_keeping_grad(y).sin().square().mean()
            loss.backward()
        results.append((loss.detach(), full(x.grad), gradients(model)))
    (loss, dx, found), (expected_loss, expected_dx, expected) = results
    tolerance *= TOLERANCE[dtype]
    assert_close(loss, expected_loss, tolerance, "loss")
    assert_close(dx, expected_dx, tolerance, "gradient of the input")
    assert_close(found, expected, tolerance, "gradient")


def full_keeping_grad(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensor_parallel(net: nn.Module, mesh: DeviceMesh) -> None:
    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tensor_parallel_linears(net: nn.Module, mesh: DeviceMesh) -> None:
    for block in net.blocks:
        parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def sequence_parallel(net: nn.Module, mesh: DeviceMesh) -> None:
    for block in net.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            },
        )


def prepared(net: nn.Module, mesh: DeviceMesh) -> None:
    """The blocks' inputs become DTensors in hooks, inside of the checkpoint."""
    for block in net.blocks:
        plan = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),))
        parallelize_module(block, mesh, plan)
        parallelize_module(
            block,
            mesh,
            {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Replicate()),
            },
        )


def replicated(net: nn.Module, mesh: DeviceMesh) -> None:
    distribute_module(net, mesh)


def both(net: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism over the ranks, and fully_shard over a mesh of one."""
    grid = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("data", "tensor"))
    tensor_parallel(net, grid["tensor"])
    for block in net.blocks:
        fully_shard(block, mesh=grid["data"])
    fully_shard(net, mesh=grid["data"])


CASES: dict[str, Callable[[Wrap, int, int], None]] = {}


def case(name: str, make: Callable[[], nn.Module], prepare: Callable[[nn.Module, DeviceMesh], None], **options: Any):
    def run(wrap: Wrap, rank: int, world: int) -> None:
        check(make, prepare, world, wrap=wrap, **options)

    CASES[name] = run


case("tensor_parallel", Net, tensor_parallel)
case("tensor_parallel-float32", Net, tensor_parallel, dtype=torch.float32)
case("sequence_parallel", Net, sequence_parallel, placement=Shard(1))
case("sequence_parallel-rows", Net, prepared)
case("replicated", Net, replicated, placement=Replicate())
case("sharded_rows", Net, replicated, placement=Shard(0))
case("with_fully_shard", Net, both)
case("rev-tensor_parallel", Reversible, tensor_parallel, tolerance=10.0)
case("rev-replicated", Reversible, replicated, placement=Replicate(), tolerance=10.0)
case("rev-sharded_rows", Reversible, replicated, placement=Shard(0), tolerance=10.0)
case("rev-sequence_parallel", Reversible, sequence_parallel, placement=Shard(1), tolerance=10.0)
for kind, out in ((inn.AdditiveCoupling, 1), (inn.AffineCoupling, 2)):
    make = functools.partial(Coupled, kind, out)
    case(f"{kind.__name__}-tensor_parallel", lambda m=make: m(), tensor_parallel_linears)
    for placement in (Replicate(), Shard(0), Shard(1)):
        case(f"{kind.__name__}-{placement}", make, replicated, placement=placement)


def function_of(name: str, function: Callable[..., Any], *placements: Any, inverse: Callable[..., Any] | None = None):
    """Register a checkpoint of a function of DTensors; ``inverse`` makes it a stage of a chain of two."""

    def run(wrap: Wrap, rank: int, world: int) -> None:
        mesh = init_device_mesh("cpu", (world,))
        results = []
        for how in (wrap, plain):
            leaves: list[Any] = [
                distribute_tensor(
                    torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)),
                    mesh,
                    [placement],
                ).requires_grad_()
                for i, placement in enumerate(placements)
            ]
            hidden: list[Any] = [leaf * 1.0 for leaf in leaves]
            for _ in range(2 if inverse is not None else 1):
                options = {"inverse": inverse} if inverse is not None and how is recollect.checkpoint else {}
                hidden = how(function, *hidden, **options)
                hidden = list(hidden) if isinstance(hidden, tuple) else [hidden]
            loss = torch.stack([h.full_tensor().sin().sum() for h in hidden]).sum()
            loss.backward()
            placed = [leaf.grad.placements for leaf in leaves]
            results.append((loss.detach(), {str(i): full(leaf.grad) for i, leaf in enumerate(leaves)}, placed))
        (loss, found, placed), (expected_loss, expected, expected_placed) = results
        assert_close(loss, expected_loss, 1e-10, "loss")
        assert_close(found, expected, 1e-10, "gradient")
        assert placed == expected_placed

    CASES[name] = run


def mixed(x: Tensor, y: Tensor) -> Tensor:
    """Another layout on the way."""
    product = cast(DTensor, x.tanh() @ y.T).redistribute(placements=[Replicate()])
    result: Tensor = product.softmax(-1) * product.sin()
    return result


def swap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return b + a.tanh(), a


def swap_back(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return a, x - a.tanh()


function_of("function-replicated", mixed, Replicate(), Replicate())
function_of("function-mixed", mixed, Shard(0), Replicate())
function_of("function-columns", mixed, Shard(1), Shard(1))
function_of("inverse-replicated", swap, Replicate(), Replicate(), inverse=swap_back)
function_of("inverse-rows", swap, Shard(0), Shard(0), inverse=swap_back)
function_of("inverse-mixed", swap, Shard(0), Replicate(), inverse=swap_back)


def partial_sums(wrap: Wrap, rank: int, world: int) -> None:
    """A DTensor that is yet to be summed over the ranks, as the argument of a checkpoint."""
    mesh = init_device_mesh("cpu", (world,))
    results = []
    for how in (wrap, plain):
        local = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        x = DTensor.from_local(local, mesh, [Partial()])
        y = how(lambda v: v.redistribute(placements=[Replicate()]).tanh(), x)
        y.full_tensor().sin().sum().backward()
        results.append(local.grad)
    assert_close(*results, 1e-10, "gradient")


CASES["partial"] = partial_sums


def memory_of_a_rank(wrap: Wrap, rank: int, world: int) -> None:
    """The bytes of a DTensor are those of this rank."""
    whole = torch.zeros(4, 6, dtype=torch.float64)
    part = distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(0)])
    assert recollect.memory.tensor_bytes(part) == whole.nbytes // world


CASES["memory"] = memory_of_a_rank
