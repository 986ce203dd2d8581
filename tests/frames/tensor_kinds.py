"""Functions of tensors that are not plain strided ones, and how to compare what they give."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import recollect

aten = torch.ops.aten


class Tagged(Tensor):
    """A plain subclass with an attribute."""

    tag: float


class Counting(Tensor):
    """Counts the operations that it takes part in, through ``__torch_function__``, and keeps its attribute."""

    calls = 0
    unit: str

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        Counting.calls += 1
        output = super().__torch_function__(function, kinds, args, kwargs or {})
        if isinstance(output, Counting):
            units = [a.unit for a in args if isinstance(a, Counting) and hasattr(a, "unit")]
            output.unit = units[0] if units else "?"
        return output


class Celsius(Tensor):
    """Changes what an operation computes, through ``__torch_function__``: sums are shifted, tanh is stretched."""

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(function, kinds, args, kwargs or {})
        if function is Tensor.tanh:
            return output * 2
        return output + 0.3 if function is Tensor.mul else output


class Logging(Tensor):
    """A wrapper that passes every operation on to the tensor inside, through ``__torch_dispatch__``."""

    elem: Tensor
    __slots__ = ["elem"]

    @staticmethod
    def __new__(cls, elem: Tensor) -> Logging:
        kept = elem.detach()
        wrapper = Tensor._make_wrapper_subclass(
            cls, kept.shape, strides=kept.stride(), dtype=kept.dtype, device=kept.device, requires_grad=False
        )
        wrapper.elem = kept
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"Logging({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        bare = tree_map(lambda v: v.elem if isinstance(v, Logging) else v, (args, kwargs or {}))
        output = function(*bare[0], **bare[1])
        return tree_map(lambda v: Logging(v) if isinstance(v, Tensor) else v, output)


class Quantised(Tensor):
    """A frozen weight of int8 and a scale for each row, which linear layers take back to floats."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.ints, self.scale = data, scale

    @classmethod
    def of(cls, weight: Tensor) -> Quantised:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["ints", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Quantised:
        return cls(inner["ints"], inner["scale"])

    def __repr__(self) -> str:
        return f"Quantised({self.ints})"

    def floats(self) -> Tensor:
        return self.ints.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return _QuantisedLinear.apply(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (aten.detach.default, aten.clone.default, aten.alias.default):
            return cls(*(function(part) for part in (args[0].ints, args[0].scale)))
        raise NotImplementedError(f"{function} of a quantised weight")


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantised, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x @ weight.floats().T
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        _, weight = ctx.saved_tensors
        gradients = dy @ weight.floats(), None, dy.flatten(0, -2).sum(0)
        return gradients[: len(ctx.needs_input_grad)]


@dataclass
class Case:
    """A function, and how to make its arguments.

    Args:
        function: of the arguments.
        make: returns the leaves, whose gradients are compared.
        view: turns an output into a plain dense tensor, of which the loss is the sum of squares.
        prepare: turns the leaves into the arguments.
        mode: a context for everything.
    """

    function: Callable[..., Any]
    make: Callable[[], list[Tensor]]
    view: Callable[[Any], Tensor] = lambda output: output
    prepare: Callable[..., Any] = lambda *leaves: leaves
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def tagged(x: Tensor, value: float = 3.0) -> Tensor:
    x.tag = value  # type: ignore[attr-defined]
    return x


def uses_the_tag(x: Any, *_: Any) -> Tensor:
    result: Tensor = (x * x.tag).tanh() * x
    return result


def is_kind(kind: type) -> Callable[..., Tensor]:
    """Return a function that computes something else for other types."""

    def function(x: Tensor, *others: Tensor) -> Tensor:
        y = x.tanh() * x
        for other in others:
            y = y * other.sin()
        return y if type(x) is kind else y * 0

    return function


def counting(x: Tensor) -> Tensor:
    y = x.as_subclass(Counting)
    y.unit = "m"
    return y


def uses_the_unit(x: Any) -> Tensor:
    y: Any = x.tanh() * x
    return y * (2.0 if x.unit == y.unit == "m" else 0.0)


def quantised() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    for layer in (module[0], module[2]):
        layer.weight = nn.Parameter(Quantised.of(layer.weight), requires_grad=False)
    return module


def on_module(make: Callable[[], nn.Module]) -> tuple[Callable[..., Any], Callable[[], list[Tensor]]]:
    """Return a function that runs a module, and what makes its leaves: the input and the trainable parameters."""
    box: list[nn.Module] = []

    def leaves() -> list[Tensor]:
        box[:] = [make()]
        return [random(3, 4), *(p for p in box[0].parameters() if p.requires_grad)]

    return lambda x, *_: box[0](x), leaves


def jagged(*tensors: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)


def lengths() -> list[Tensor]:
    return [random(n, 4) for n in (2, 5, 3)]


def attend(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(-2)


def coo(values: Tensor) -> Tensor:
    index = torch.tensor([[0, 0, 1, 3], [1, 2, 0, 3]])
    return torch.sparse_coo_tensor(index, values, (4, 4), check_invariants=False)


def csr(values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(torch.tensor([0, 2, 3, 3, 4]), torch.tensor([1, 2, 0, 3]), values, (4, 4))


def squared(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


_quantised, _quantised_leaves = on_module(quantised)
_lazy, _lazy_leaves = on_module(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double())

CASES: dict[str, Case] = {
    "subclass": Case(is_kind(Tagged), lambda: [random(3, 4)], prepare=lambda x: (x.as_subclass(Tagged),)),
    "subclass_leaf": Case(
        is_kind(Tagged), lambda: [torch.randn(3, 4).double().as_subclass(Tagged).requires_grad_()]
    ),
    "subclass_and_plain": Case(
        is_kind(Tagged), lambda: [random(3, 4), random(3, 4)], prepare=lambda x, y: (x.as_subclass(Tagged), y)
    ),
    "subclass_attribute": Case(
        uses_the_tag, lambda: [random(3, 4)], prepare=lambda x: (tagged(x.as_subclass(Tagged)),)
    ),
    "attribute": Case(uses_the_tag, lambda: [random(3, 4)], prepare=lambda x: (tagged(x * 1.0),)),
    "attribute_constant": Case(
        lambda x, c: x.tanh() * c * c.tag, lambda: [random(3, 4)], prepare=lambda x: (x, tagged(torch.ones(3, 4)))
    ),
    "parameter": Case(is_kind(nn.Parameter), lambda: [nn.Parameter(random(3, 4))]),
    "torch_function": Case(uses_the_unit, lambda: [random(3, 4)], prepare=lambda x: (counting(x),)),
    "torch_function_output": Case(lambda x: counting(x.tanh()) * x, lambda: [random(3, 4)]),
    "torch_function_numbers": Case(
        lambda x: x.tanh() * x.tanh().sin(),
        lambda: [random(3, 4)],
        lambda y: y.as_subclass(Tensor),
        lambda x: (x.as_subclass(Celsius),),
    ),
    "torch_function_numbers_to_the_end": Case(
        lambda x: x.tanh() * x.tanh().sin(), lambda: [random(3, 4)], prepare=lambda x: (x.as_subclass(Celsius),)
    ),
    "torch_dispatch": Case(
        is_kind(Logging),
        lambda: [Logging(torch.randn(3, 4).double()).requires_grad_()],
        prepare=lambda x: (x * 1.0,),
    ),
    "torch_dispatch_leaf": Case(is_kind(Logging), lambda: [Logging(torch.randn(3, 4).double()).requires_grad_()]),
    "two_tensor": Case(
        is_kind(TwoTensor),
        lambda: [TwoTensor(torch.randn(3, 4).double(), torch.randn(3, 4).double()).requires_grad_()],
        prepare=lambda x: (x * 1.0,),
    ),
    "two_tensor_constant": Case(
        lambda x, c: x.tanh() * c,
        lambda: [random(3, 4)],
        prepare=lambda x: (x, TwoTensor(torch.ones(3, 4).double(), torch.ones(3, 4).double())),
    ),
    "quantised_weight": Case(_quantised, _quantised_leaves),
    "quantised_argument": Case(
        lambda x, w: F.linear(x.tanh(), w).sin(),
        lambda: [random(3, 4)],
        prepare=lambda x: (x, Quantised.of(torch.randn(4, 4).double())),
    ),
    "jagged": Case(lambda x: x.tanh() * x, lengths, lambda y: y.values(), lambda *t: (jagged(*t),)),
    "jagged_linear": Case(
        lambda x, w: F.linear(x, w).relu().sin(),
        lambda: [random(4, 4), *lengths()],
        lambda y: y.values(),
        lambda w, *t: (jagged(*t), w),
    ),
    "jagged_attention": Case(attend, lengths, lambda y: y.values(), lambda *t: (jagged(*t) * 1.0,)),
    "jagged_to_dense": Case(
        lambda x: x.tanh().to_padded_tensor(0.0), lengths, prepare=lambda *t: (jagged(*t).sin(),)
    ),
    "jagged_norm": Case(
        lambda x: F.layer_norm(x, (4,)), lengths, lambda y: y.values().cumsum(0), lambda *t: (jagged(*t),)
    ),
    "nested_strided": Case(
        lambda x, w: F.linear(x, w).relu(),
        lambda: [random(4, 4), *lengths()],
        lambda y: y.to_padded_tensor(0.0),
        lambda w, *t: (torch.nested.as_nested_tensor(list(t)), w),
    ),
    "coo_argument": Case(
        lambda a, x: torch.sparse.mm(a, x.tanh()).sin(),
        lambda: [random(4), random(4, 3)],
        prepare=lambda v, x: (coo(v), x),
    ),
    "coo_coalesced": Case(
        lambda a, x: torch.sparse.mm(a, x).tanh(), lambda: [random(4), random(4, 3)],
        prepare=lambda v, x: (coo(v).coalesce(), x),
    ),
    "coo_output": Case(lambda v: coo(v.tanh() * v), lambda: [random(4)], lambda y: y.to_dense()),
    "coo_leaf": Case(
        lambda a, x: torch.sparse.mm(a, x.tanh()).sin(),
        lambda: [coo(torch.randn(4).double()).coalesce().requires_grad_(), random(4, 3)],
    ),
    "csr_argument": Case(
        lambda a, x: (a @ x.tanh()).sin(), lambda: [random(4, 3)],
        prepare=lambda x: (csr(torch.randn(4).double()), x),
    ),
    "csr_trained": Case(
        lambda a, x: torch.sparse.mm(a, x.tanh()).sin(),
        lambda: [csr(torch.randn(4).double()).requires_grad_(), random(4, 3)],
    ),
    "csr_made_inside": Case(
        lambda v, x: torch.sparse.mm(csr(v.tanh()), x).sin(), lambda: [random(4), random(4, 3)]
    ),
    "complex": Case(
        lambda x: x.tanh() * x, lambda: [random(3, 4, dtype=torch.complex128)], squared, lambda x: (x * 1.0,)
    ),
    "conjugate": Case(
        lambda x: (x.sin() * x).conj(), lambda: [random(3, 4, dtype=torch.complex128)],
        lambda y: squared(y.resolve_conj()), lambda x: (x.conj(),),
    ),
    "real_view": Case(
        lambda x: torch.view_as_real(x.sin()), lambda: [random(3, 4, dtype=torch.complex128)], prepare=lambda x: (x.mT,)
    ),
    "negative_bit": Case(
        lambda x: x.conj().imag * x.real, lambda: [random(3, 4, dtype=torch.complex128)], lambda y: y.resolve_neg()
    ),
    "bfloat16": Case(lambda x: x.tanh() * x, lambda: [random(3, 4, dtype=torch.bfloat16)]),
    "float8": Case(
        lambda x, c: x.tanh() * c.to(x.dtype), lambda: [random(3, 4)],
        prepare=lambda x: (x, torch.randn(3, 4).to(torch.float8_e4m3fn)),
    ),
    "float8_output": Case(
        lambda x: (x.tanh() * x, x.detach().to(torch.float8_e4m3fn)), lambda: [random(3, 4)], lambda y: y[0]
    ),
    "whole_numbers": Case(
        lambda x, i: (x.tanh()[i] * x[i], i + 1, x > 0), lambda: [random(3, 4)], lambda y: y[0],
        lambda x: (x, torch.tensor([2, 0])),
    ),
    "scalars": Case(lambda x: x.tanh() * x, lambda: [random()], lambda y: y.reshape(1)),
    "no_elements": Case(lambda x: x.tanh() * x, lambda: [random(0, 4)]),
    "channels_last": Case(
        lambda x: F.avg_pool2d(x.tanh(), 2) * 2,
        lambda: [random(2, 3, 4, 4)],
        prepare=lambda x: (x.to(memory_format=torch.channels_last),),
    ),
    "expanded": Case(lambda x: x.tanh() * x, lambda: [random(1, 4)], prepare=lambda x: (x.expand(3, 4),)),
    "overlapping": Case(
        lambda x: x.tanh() * x, lambda: [random(10)], prepare=lambda x: (x.as_strided((4, 4), (2, 1)),)
    ),
    "expanded_output": Case(lambda x: x.tanh().expand(3, 4), lambda: [random(1, 4)]),
    "mkldnn": Case(
        lambda x: torch.relu(x), lambda: [random(3, 4, dtype=torch.float32)], lambda y: y.to_dense(),
        lambda x: (x.to_mkldnn(),),
    ),
}  # fmt: skip

HOW: dict[str, Callable[..., Any]] = {
    "plain": lambda function, *args: function(*args),
    "torch": lambda function, *args: torch_checkpoint(function, *args, use_reentrant=False),
    "recollect": recollect.checkpoint,
}


def run(case: Case, how: Callable[..., Any], steps: int = 1) -> tuple[type, list[Any]]:
    """Return the output's type, and the loss and gradients, all as plain dense tensors."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), case.mode():
        warnings.simplefilter("ignore")  # prototypes (nested, masked, sparse) say that they are
        leaves = case.make()
        args = case.prepare(*leaves)
        for _ in range(steps):
            output = how(case.function, *args)
        view = case.view(output)
        loss = view.square().sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        return type(output), [dense(loss.detach()), *(None if g is None else dense(g) for g in gradients)]


def dense(tensor: Tensor) -> Tensor:
    """Return a plain copy of any tensor here."""
    if isinstance(tensor, Logging):
        tensor = tensor.elem
    if isinstance(tensor, TwoTensor):
        tensor = torch.stack([tensor.a, tensor.b])
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.detach().as_subclass(Tensor).clone()


# Pairs of such tensors, for invertible functions and couplings: leaves, arguments, and the view of the output.


def swap(a: Any, b: Any) -> tuple[Any, Any]:
    return b + a.tanh(), a


def swap_back(x: Any, a: Any) -> tuple[Any, Any]:
    return a, x - a.tanh()


def logging(x: Tensor) -> Tensor:
    return Logging(x)


PAIRS: dict[str, tuple[Callable[[], list[Tensor]], Callable[..., Any], Callable[[Any], Tensor]]] = {
    "subclass": (
        lambda: [random(3, 4), random(3, 4)],
        lambda a, b: (a.as_subclass(Tagged), b.as_subclass(Tagged)),
        lambda y: y,
    ),
    "torch_function": (
        lambda: [random(3, 4), random(3, 4)], lambda a, b: (counting(a) * 1.0, counting(b) * 1.0), lambda y: y
    ),
    "torch_dispatch": (
        lambda: [Logging(torch.randn(3, 4).double()).requires_grad_() for _ in range(2)],
        lambda a, b: (a * 1.0, b * 1.0),
        lambda y: y,
    ),
    "two_tensor": (
        lambda: [TwoTensor(random(3, 4).detach(), random(3, 4).detach()).requires_grad_() for _ in range(2)],
        lambda a, b: (a * 1.0, b * 1.0),
        lambda y: y,
    ),
    "jagged": (
        lambda: [random(10, 4), random(10, 4)],
        lambda a, b: tuple(
            torch.nested.nested_tensor_from_jagged(v * 1.0, OFFSETS, min_seqlen=2, max_seqlen=5) for v in (a, b)
        ),
        lambda y: y.values(),
    ),
    "complex": (
        lambda: [random(3, 4, dtype=torch.complex128) for _ in range(2)], lambda a, b: (a * 1.0, b * 1.0), squared
    ),
    "bfloat16": (
        lambda: [random(3, 4, dtype=torch.bfloat16) for _ in range(2)], lambda a, b: (a * 1.0, b * 1.0), lambda y: y
    ),
    "transposed": (
        lambda: [random(4, 3), random(4, 3)], lambda a, b: (a.mT * 1.0, (b * 1.0).mT), lambda y: y
    ),
    "no_elements": (lambda: [random(0, 4), random(0, 4)], lambda a, b: (a * 1.0, b * 1.0), lambda y: y),
}  # fmt: skip
OFFSETS = torch.tensor([0, 2, 7, 10])
