"""What the table of operations says of an axis is what autograd does, whatever the values are.

Each operation is built with random shapes and settings. For each axis of an output, and each part of one, a gradient
that one owner alone has entries of must leave zeros outside of the entries that the table gives to this owner.
"""

import math
import random
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import GradientEdge

from recollect.autogram import _operations
from recollect.autogram._capture import Recorder
from recollect.autogram._layout import Axis, Layout
from recollect.autogram._operations import Lost, Place, Split, carry
from recollect.autogram._registry import Registry
from recollect.autogram._walk import walk

aten = torch.ops.aten

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of degrees of freedom and the like

# What torch makes on other devices, or of tensors in oneDNN's layout, only.
ELSEWHERE = {
    "CudnnBatchNorm", "CudnnConvolution", "FusedDropout", "Linear", "MiopenBatchNorm", "MiopenConvolution",
    "ConvolutionOverrideable", "FusedRmsNorm", "MkldnnLinear", "MkldnnMaxPool2D", "ScaledDotProductCudnnAttention",
    "ScaledDotProductEfficientAttention", "ScaledDotProductFlashAttention",
}  # fmt: skip
# What keeps nothing apart, or leads to weights alone.
NOTHING_APART = {"Embedding", "EmbeddingBag", "EmbeddingDenseBackward", "MaskedSelect"}
CASES = defaultdict(list)


def case(*names):
    """Add a function that builds an operation from random numbers: it returns the output, or several."""

    def add(build):
        for name in names:
            CASES[name].append(build)
        return build

    return add


# Values between 0.1 and 0.9 are in the domain of nearly everything.


def leaf(*shape, low=0.1, high=0.9, dtype=torch.float64):
    return (torch.rand(shape, dtype=dtype) * (high - low) + low).requires_grad_()


def complex_leaf(*shape):
    return torch.randn(shape, dtype=torch.complex128).requires_grad_()


def a_shape(r, least=1, most=4):
    return [r.choice((1, 2, 3, 4, 6)) for _ in range(r.randint(least, most))]


def broadcast(r, shape):
    """Return a shape that broadcasts to another one."""
    return [1 if r.random() < 0.3 else n for n in shape[r.choice((0, 0, 0, 1)) :]]


def a_dim(r, shape):
    return r.randrange(-len(shape), len(shape))


def some_dims(r, shape):
    dims = r.sample(range(len(shape)), r.randint(1, len(shape)))
    return [d - r.choice((0, len(shape))) for d in dims]


def picks(r, n, *shape):
    return torch.randint(n, shape)


# Entry by entry.

SAME = {
    "Abs": torch.abs, "Acos": torch.acos, "Alias": aten.alias, "Angle": torch.angle, "Asin": torch.asin,
    "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Celu": F.celu,
    "Clone": torch.clone, "Cos": torch.cos, "Cosh": torch.cosh, "Deg2Rad": torch.deg2rad, "Digamma": torch.digamma,
    "Elu": F.elu, "Erf": torch.erf, "Erfc": torch.erfc, "Erfinv": torch.erfinv, "Exp": torch.exp, "Exp2": torch.exp2,
    "Expm1": torch.expm1, "Floor": torch.floor, "Frac": torch.frac, "Gelu": F.gelu, "Hardshrink": F.hardshrink,
    "Hardsigmoid": F.hardsigmoid, "Hardswish": F.hardswish, "Hardtanh": F.hardtanh, "I0": torch.special.i0,
    "LeakyRelu": F.leaky_relu, "Lgamma": torch.lgamma, "Log": torch.log, "Log10": torch.log10, "Log1P": torch.log1p,
    "Log2": torch.log2, "LogSigmoid": F.logsigmoid, "Logit": torch.logit, "Mish": F.mish, "NanToNum": torch.nan_to_num,
    "Neg": torch.neg, "Rad2Deg": torch.rad2deg, "Reciprocal": torch.reciprocal, "Relu": torch.relu,
    "Round": torch.round, "Rsqrt": torch.rsqrt, "Sgn": torch.sgn, "Sigmoid": torch.sigmoid, "Sign": torch.sign,
    "Silu": F.silu, "Sin": torch.sin, "Sinc": torch.sinc, "Sinh": torch.sinh, "Softplus": F.softplus,
    "Softshrink": F.softshrink, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh, "Trunc": torch.trunc,
    "SpecialI0E": torch.special.i0e, "SpecialI1": torch.special.i1, "SpecialI1E": torch.special.i1e,
    "SpecialLogNdtr": torch.special.log_ndtr, "SpecialNdtri": torch.special.ndtri,
    "SpecialErfcx": torch.special.erfcx, "SpecialEntr": torch.special.entr,
    "Pow": lambda x: x**3, "Polygamma": lambda x: torch.polygamma(1, x),
    "Threshold": lambda x: F.threshold(x, 0.5, 0.0), "Clamp": lambda x: x.clamp(0.3, 0.6),
    "ClampMax": lambda x: aten.clamp_max(x, 0.5), "ClampMin": lambda x: aten.clamp_min(x, 0.5),
    "ToCopy": lambda x: x.to(torch.float32), "NativeDropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "RreluWithNoise": lambda x: aten.rrelu_with_noise(x, torch.zeros_like(x), 0.1, 0.3, True),
    "Rsub": lambda x: torch.rsub(x, 2.0), "Mvlgamma": lambda x: torch.mvlgamma(x + 3, 2), "Remainder": lambda x: x % 2,
    "Fmod": lambda x: x.fmod(2), "Mul": lambda x: x * 2.5, "Add": lambda x: x + 1, "Sub": lambda x: x - 1,
    "Div": lambda x: x / 3, "Fill": lambda x: x.clone().fill_(2.0), "ConjPhysical": lambda x: (x + 0j).conj_physical(),
    "Conj": lambda x: (x + 0j).conj(), "MaskedFill": lambda x: x.masked_fill(torch.rand(x.shape) < 0.5, 1.0),
    "Xlogy": lambda x: torch.xlogy(2.0, x), "SpecialXlog1Py": lambda x: torch.special.xlog1py(2.0, x),
    "Copysign": lambda x: torch.copysign(x, -1.0), "Lerp": lambda x: torch.lerp(x, torch.ones_like(x), 0.3),
    "Acosh": lambda x: torch.acosh(x + 1), "Where": lambda x: torch.where(torch.rand(x.shape) < 0.5, x, 0.0),
}  # fmt: skip
for _name, _function in SAME.items():
    CASES[_name].append(lambda r, f=_function: f(leaf(*a_shape(r))))

TWO = {
    "Add": torch.add, "Atan2": torch.atan2,
    "Clamp": lambda x, y: torch.clamp(x.expand(torch.broadcast_shapes(x.shape, y.shape)), y),
    "ClampMax": torch.clamp_max,
    "ClampMin": torch.clamp_min, "Complex": torch.complex, "Copysign": torch.copysign, "Div": torch.div,
    "Fmax": torch.fmax, "Fmin": torch.fmin, "Fmod": torch.fmod, "Hypot": torch.hypot, "Logaddexp": torch.logaddexp,
    "Logaddexp2": torch.logaddexp2, "Maximum": torch.maximum, "Minimum": torch.minimum, "Mul": torch.mul,
    "Polar": torch.polar, "Pow": torch.pow, "Remainder": torch.remainder, "Rsub": torch.rsub, "Sub": torch.sub,
    "Xlogy": torch.xlogy, "SpecialXlog1Py": torch.special.xlog1py, "MseLoss": lambda x, y: aten.mse_loss(x, y, 0),
    "HuberLoss": lambda x, y: aten.huber_loss(x, y, 0, 0.3), "SmoothL1Loss": lambda x, y: aten.smooth_l1_loss(x, y, 0),
    "Where": lambda x, y: torch.where(torch.rand(torch.broadcast_shapes(x.shape, y.shape)) < 0.5, x, y),
    "Igamma": lambda x, y: torch.igamma(x.detach(), y), "Lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "BinaryCrossEntropyWithLogits": lambda x, y: aten.binary_cross_entropy_with_logits(x, y.expand_as(x), None, None, 0)
    if x.shape == torch.broadcast_shapes(x.shape, y.shape) else aten.binary_cross_entropy_with_logits(x, x.detach(),
                                                                                              None, None, 0),
}  # fmt: skip
for _name, _function in TWO.items():

    def _build(r, f=_function):
        shape = a_shape(r)
        return f(*(leaf(*s) for s in r.sample([shape, broadcast(r, shape)], 2)))

    CASES[_name].append(_build)

THREE = {
    "Addcdiv": torch.addcdiv, "Addcmul": torch.addcmul, "Lerp": torch.lerp,
    "Where": lambda x, y, z: x.where(y > 0.5, z),
}  # fmt: skip
for _name, _function in THREE.items():

    def _build(r, f=_function):
        shape = a_shape(r)
        return f(*(leaf(*s) for s in r.sample([shape, broadcast(r, shape), broadcast(r, shape)], 3)))

    CASES[_name].append(_build)

TWO_ALIKE = {
    "SoftMarginLoss": lambda x, y: aten.soft_margin_loss(x, y.detach(), 0),
    "BinaryCrossEntropy": lambda x, y: aten.binary_cross_entropy(x, y, None, 0),
    "TanhBackward": aten.tanh_backward, "SigmoidBackward": aten.sigmoid_backward, "GeluBackward": aten.gelu_backward,
    "SoftplusBackward": lambda x, y: aten.softplus_backward(x, y, 1, 20),
    "EluBackward": lambda x, y: aten.elu_backward(x, 1, 1, 1, False, y),
    "LeakyReluBackward": lambda x, y: aten.leaky_relu_backward(x, y, 0.1, False),
    "LogSigmoidBackward": lambda x, y: aten.log_sigmoid_backward(x, y, (-y.detach().abs()).exp()),
    "HardtanhBackward": lambda x, y: aten.hardtanh_backward(x, y, -1, 1),
    "HardswishBackward": aten.hardswish_backward, "ThresholdBackward": lambda x, y: aten.threshold_backward(x, y, 0.5),
    "SoftshrinkBackward": lambda x, y: aten.softshrink_backward(x, y, 0.5),
    "IndexFill": lambda x, y: torch.index_fill(x, 0, torch.tensor([0]), y.detach().sum()),
}  # fmt: skip
for _name, _function in TWO_ALIKE.items():

    def _build(r, f=_function):
        shape = a_shape(r)
        return f(leaf(*shape), leaf(*shape))

    CASES[_name].append(_build)


@case("SpecialZeta")
def _(r):
    return torch.special.zeta(2.5, leaf(*a_shape(r), low=1.1, high=2))


@case("SpecialZeta")
def _(r):
    shape = a_shape(r)
    return torch.special.zeta(torch.full(broadcast(r, shape), 2.5, dtype=torch.float64), leaf(*shape, low=1.1, high=2))


@case("PreluKernel")
def _(r):
    shape = a_shape(r, 2)
    return aten._prelu_kernel(leaf(*shape, low=-1), leaf(1, shape[1], *[1] * (len(shape) - 2)))


@case("PreluKernel")
def _(r):
    shape = a_shape(r)
    return aten._prelu_kernel(leaf(*shape, low=-1), leaf(*shape))


@case("Fill")
def _(r):
    return torch.rand(*a_shape(r), dtype=torch.float64).fill_(leaf())


@case("MaskedFill")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).masked_fill(torch.rand(shape) < 0.5, leaf())


@case("MaskedFill")
def _(r):  # the mask is the larger one
    shape = a_shape(r)
    return leaf(*broadcast(r, shape)).masked_fill(torch.rand(shape) < 0.5, 1.0)


@case("Tril")
def _(r):
    return leaf(*a_shape(r, 2)).tril(r.randint(-1, 1))


@case("Triu")
def _(r):
    return leaf(*a_shape(r, 2)).triu(r.randint(-1, 1))


@case("Expand")
def _(r):
    shape = a_shape(r)
    return leaf(*broadcast(r, shape)).expand(shape)


@case("Angle")
def _(r):
    return complex_leaf(*a_shape(r)).angle()


@case("Abs")
def _(r):
    return complex_leaf(*a_shape(r)).abs()


# Views and what only moves axes.


def other_shape(r, n):
    """Return some shape of n entries."""
    shape = []
    while n > 1:
        factor = r.choice([f for f in range(2, n + 1) if n % f == 0])
        shape.append(factor)
        n //= factor
    for _ in range(r.randint(0, 2)):
        shape.insert(r.randint(0, len(shape)), 1)
    return shape


@case("View")
def _(r):
    x = leaf(*a_shape(r))
    return x.view(other_shape(r, x.numel()))


@case("UnsafeView")
def _(r):
    x = leaf(*a_shape(r))
    return aten._unsafe_view(x, other_shape(r, x.numel()))


@case("ReshapeAlias")
def _(r):
    x = leaf(*a_shape(r))
    shape = other_shape(r, x.numel())
    return aten._reshape_alias(x, shape, torch.empty(shape).stride())


@case("ReshapeCopy")
def _(r):
    x = leaf(*a_shape(r))
    return aten._reshape_copy(x, other_shape(r, x.numel()))


@case("Squeeze")
def _(r):
    shape = a_shape(r)
    way = r.choice([(), (a_dim(r, shape),), (tuple(range(len(shape))),)])
    return leaf(*shape).squeeze(*way)


@case("Squeeze")
def _(r):
    shape = [*a_shape(r), 1]
    way = r.choice([(), (-1,)])
    return leaf(*shape).clone().squeeze_(*way)


@case("Unsqueeze")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).unsqueeze(r.randint(-len(shape) - 1, len(shape)))


@case("Unsqueeze")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).clone().unsqueeze_(r.randint(-len(shape) - 1, len(shape)))


@case("Repeat")
def _(r):
    shape = a_shape(r, 1, 3)
    return leaf(*shape).repeat(*[r.choice((1, 1, 2, 3)) for _ in range(len(shape) + r.randint(0, 1))])


@case("Permute")
def _(r):
    shape = a_shape(r)
    order = r.sample(range(len(shape)), len(shape))
    return leaf(*shape).permute([d - r.choice((0, len(shape))) for d in order])


@case("Transpose")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).transpose(a_dim(r, shape), a_dim(r, shape))


@case("Transpose")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).clone().transpose_(a_dim(r, shape), a_dim(r, shape))


@case("T")
def _(r):
    return leaf(*a_shape(r, 1, 2)).t()


@case("T")
def _(r):
    return leaf(*a_shape(r, 1, 2)).clone().t_()


@case("ViewAsReal")
def _(r):
    return torch.view_as_real(complex_leaf(*a_shape(r)))


@case("ViewAsComplex")
def _(r):
    return torch.view_as_complex(leaf(*a_shape(r), 2))


@case("Diagonal")
def _(r):
    shape = a_shape(r, 2)
    first, second = r.sample(range(len(shape)), 2)
    return leaf(*shape).diagonal(r.randint(-1, 0), first - len(shape) * r.randint(0, 1), second)


# Along axes that stay.

ALONG = {
    "Softmax": torch.softmax, "LogSoftmax": torch.log_softmax, "SafeSoftmax": torch._safe_softmax,
    "Cumsum": torch.cumsum, "Cumprod": torch.cumprod, "Cummax": torch.cummax, "Cummin": torch.cummin,
    "Logcumsumexp": torch.logcumsumexp, "Sort": torch.sort,
}  # fmt: skip
for _name, _function in ALONG.items():

    def _build(r, f=_function):
        shape = a_shape(r)
        return f(leaf(*shape), a_dim(r, shape))

    CASES[_name].append(_build)


@case("Sort")
def _(r):
    shape = a_shape(r)
    return torch.sort(leaf(*shape), stable=True, dim=a_dim(r, shape))


@case("FftC2C")
def _(r):
    shape = a_shape(r)
    return torch.fft.fftn(complex_leaf(*shape), dim=some_dims(r, shape))


@case("FftR2C")
def _(r):
    shape = a_shape(r)
    return torch._fft_r2c(leaf(*shape), [a_dim(r, shape) % len(shape)], 0, r.random() < 0.5)


@case("FftC2R")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape) % len(shape)
    return torch._fft_c2r(complex_leaf(*shape), [dim], 0, 2 * shape[dim] - 1)


@case("Roll")
def _(r):
    shape = a_shape(r)
    dims = some_dims(r, shape) if r.random() < 0.8 else []
    return leaf(*shape).roll([r.randint(-3, 3) for _ in dims] or [1], dims)


@case("Flip")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).flip(some_dims(r, shape))


@case("Rot90")
def _(r):
    shape = a_shape(r, 2)
    return leaf(*shape).rot90(r.randint(-1, 3), r.sample(range(len(shape)), 2))


@case("Unfold")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    return leaf(*shape).unfold(dim, r.randint(1, shape[dim]), r.randint(1, 2))


@case("Glu")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    shape[dim] = 4
    return F.glu(leaf(*shape), dim)


# Along axes that go.

REDUCED = {
    "Sum": torch.sum, "Mean": torch.mean, "Nansum": torch.nansum, "Amax": torch.amax, "Amin": torch.amin,
    "Logsumexp": torch.logsumexp, "Norm": lambda x, dim, keepdim: aten.norm(x, 3.0, dim, keepdim),
    "LinalgVectorNorm": lambda x, dim, keepdim: torch.linalg.vector_norm(x, 3, dim, keepdim),
}  # fmt: skip
for _name, _function in REDUCED.items():

    def _build(r, f=_function):
        shape = a_shape(r)
        dims = some_dims(r, shape) if r.random() < 0.9 else []
        return f(leaf(*shape), dims or list(range(len(shape))), keepdim=r.random() < 0.5)

    CASES[_name].append(_build)

for _name in ("var", "std", "var_mean", "std_mean"):

    @case(_name.title().replace("_", ""))
    def _(r, name=_name):
        shape = [r.choice((2, 3, 4)) for _ in range(r.randint(1, 4))]
        return getattr(torch, name)(leaf(*shape), some_dims(r, shape), keepdim=r.random() < 0.5)


REDUCED_ALONG_ONE = {
    "Prod": torch.prod, "Kthvalue": lambda x, dim, keepdim: torch.kthvalue(x, 1, dim, keepdim), "Mode": torch.mode,
    "Median": torch.median, "Nanmedian": torch.nanmedian, "Max": torch.max, "Min": torch.min,
    "Aminmax": lambda x, dim, keepdim: torch.aminmax(x, dim=dim, keepdim=keepdim),
}  # fmt: skip
for _name, _function in REDUCED_ALONG_ONE.items():

    def _build(r, f=_function):
        shape = a_shape(r)
        return f(leaf(*shape), a_dim(r, shape), keepdim=r.random() < 0.5)

    CASES[_name].append(_build)


# Whole axes and parts of them.


@case("Select")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).select(a_dim(r, shape), -1)


@case("Unbind")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).unbind(a_dim(r, shape))


@case("Slice")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    return aten.slice(leaf(*shape), dim, r.choice((0, 0, 1 if shape[dim] > 1 else 0)), r.choice((None, shape[dim])),
                      r.choice((1, 1, 2)))  # fmt: skip


@case("Split")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).split(r.choice((1, 2, 6)), a_dim(r, shape))


@case("SplitWithSizes")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    return leaf(*shape).split(r.choice(([shape[dim]], [1] * shape[dim])), dim)


@case("UnsafeSplit")
def _(r):
    shape = a_shape(r)
    return torch.unsafe_split(leaf(*shape), r.choice((1, 2, 6)), a_dim(r, shape))


@case("UnsafeSplitWithSizes")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    return torch.unsafe_split_with_sizes(leaf(*shape), r.choice(([shape[dim]], [1] * shape[dim])), dim)


@case("Cat")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    parts = []
    for _ in range(r.randint(1, 3)):
        part = list(shape)
        part[dim] = r.choice((0, 1, 2, shape[dim]))
        parts.append(leaf(*part))
    return torch.cat([*parts, leaf(0)] if r.random() < 0.2 else parts, dim)


@case("Stack")
def _(r):
    shape = a_shape(r)
    return torch.stack([leaf(*shape) for _ in range(r.choice((1, 2, 3)))], r.randint(-len(shape) - 1, len(shape)))


@case("ConstantPadNd")
def _(r):
    shape = a_shape(r)
    return F.pad(leaf(*shape), [r.choice((0, 0, 1, 2)) for _ in range(2 * r.randint(1, len(shape)))])


@case("ConstantPadNd")
def _(r):
    return F.pad(leaf(4, 6), [r.choice((0, -1)), r.choice((0, 1)), *r.choice(([], [1, -1], [0, 0]))])


# Entries that an index says.


@case("Gather")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    index = [n if r.random() < 0.7 else 1 for n in shape]
    return leaf(*shape).gather(dim, picks(r, shape[dim], *index))


@case("Topk")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    return leaf(*shape).topk(r.randint(1, shape[dim]), dim)


@case("IndexSelect")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    return leaf(*shape).index_select(dim, picks(r, shape[dim], r.choice((shape[dim], 1, 5))))


def _scattered(r, function):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    source = list(shape)
    source[dim] = r.choice((1, 2, shape[dim]))
    index = picks(r, shape[dim], *source)  # of another shape than the source, and torch has no backward
    return function(leaf(*shape), dim, index, leaf(*source))


SCATTERED = {
    "Scatter": torch.scatter, "ScatterAdd": torch.scatter_add,
    "ScatterReduce": lambda x, d, i, s: torch.scatter_reduce(x, d, i, s, random.choice(("sum", "mean", "amax", "prod")))
}  # fmt: skip
for _name, _function in SCATTERED.items():
    CASES[_name].append(lambda r, f=_function: _scattered(r, f))


@case("Scatter")
def _(r):
    return _scattered(r, lambda x, dim, index, source: torch.scatter(x, dim, index, 1.5))


INDEXED_INTO = {
    "IndexAdd": torch.index_add, "IndexCopy": torch.index_copy,
    "IndexReduce": lambda x, d, i, s: aten.index_reduce(x, d, i, s, "mean"),
}  # fmt: skip
for _name, _function in INDEXED_INTO.items():

    @case(_name)
    def _(r, f=_function):
        shape = a_shape(r)
        dim = a_dim(r, shape)
        source = list(shape)
        source[dim] = r.choice((1, shape[dim]))
        index = torch.randperm(shape[dim])[: source[dim]]
        return f(leaf(*shape), dim, index, leaf(*source))


@case("IndexFill")
def _(r):
    shape = a_shape(r)
    dim = a_dim(r, shape)
    return leaf(*shape).index_fill(dim, picks(r, shape[dim], 2), r.choice((1.0, leaf())))


def some_indices(r, shape):
    """Return indices of some axes: vectors, matrices, masks, counts."""
    width = r.choice((1, 2, 3))
    indices: list = []
    axis = 0
    while axis < len(shape):
        way = r.choice(("none", "none", "vector", "matrix", "counts", "one", "mask", "number", "mask of two"))
        n, taken = shape[axis], 1
        if way == "none":
            indices.append(None)
        elif way == "vector":
            indices.append(picks(r, n, width))
        elif way == "matrix":
            indices.append(picks(r, n, r.choice((1, 2)), width))
        elif way == "counts":
            indices.append(torch.arange(width) if width <= n else picks(r, n, width))
        elif way == "one":
            indices.append(picks(r, n, 1) * r.randint(0, 1))
        elif way == "number":
            indices.append(picks(r, n))
        else:
            taken = 2 if way == "mask of two" and axis + 1 < len(shape) else 1
            mask = torch.zeros(shape[axis : axis + taken], dtype=torch.bool)
            mask.view(-1)[torch.randperm(mask.numel())[:width]] = True
            indices.append(mask)
        axis += taken
    return indices


def _fit(indices):
    """Return whether indices broadcast."""
    shapes = [i.shape if i.dtype is not torch.bool else (int(i.sum()),) for i in indices if i is not None]
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return bool(shapes)


def good_indices(r, shape):
    while True:
        indices = some_indices(r, shape)
        if _fit(indices):
            return indices


@case(*["Index"] * 20)
def _(r):
    shape = [r.choice((2, 3, 3, 4)) for _ in range(r.randint(1, 4))]
    return aten.index(leaf(*shape), good_indices(r, shape))


@case("Index")
def _(r):  # a one among as many as there are
    n = r.choice((2, 3, 4))
    return leaf(n, n)[torch.zeros(1, dtype=torch.long), torch.randint(n, (n,))]


@case("Index")
def _(r):
    n = r.choice((2, 3, 4))
    return leaf(n, n, 3)[torch.arange(n), torch.randint(n, (n,))]


@case(*["IndexPut"] * 4)
def _(r):
    shape = [r.choice((2, 3, 4)) for _ in range(r.randint(1, 4))]
    x, indices = leaf(*shape), good_indices(r, shape)
    values = leaf(*aten.index(x.detach(), indices).shape)
    return aten.index_put(x, indices, values, r.random() < 0.5)


@case("MaskedScatter")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).masked_scatter(torch.rand(shape) < 0.5, leaf(*shape))


@case("MaskedSelect")
def _(r):
    shape = a_shape(r)
    return leaf(*shape).masked_select(torch.rand(shape) < 0.7)


@case("Embedding")
def _(r):
    return F.embedding(picks(r, 4, *a_shape(r, 1, 2)), leaf(4, 3))


@case("EmbeddingBag")
def _(r):
    return torch.embedding_bag(leaf(4, 3), picks(r, 4, 6), torch.tensor([0, 2, 3]), False, 0)[0]


@case("EmbeddingDenseBackward")
def _(r):
    return aten.embedding_dense_backward(leaf(4, 4), picks(r, 4, 4), 4, -1, False)


# Products.


def _sizes(r):
    return [r.choice((1, 2, 3, 4, 6)) for _ in range(4)]


@case("Mm")
def _(r):
    b, n, m, _ = _sizes(r)
    return leaf(b, n) @ leaf(n, m)


@case("Mm")
def _(r):
    b, n, m, _ = _sizes(r)
    return torch.rand(b, n, dtype=torch.float64).to_sparse() @ leaf(n, m)


@case("Addmm")
def _(r):
    b, n, m, _ = _sizes(r)
    return torch.addmm(leaf(*broadcast(r, [b, m])), leaf(b, n), leaf(n, m), beta=r.choice((1, 2)))


@case("SparseAddmm")
def _(r):
    b, n, m, _ = _sizes(r)
    return aten._sparse_addmm(leaf(b, m), torch.rand(b, n, dtype=torch.float64).to_sparse(), leaf(n, m))


@case("Trilinear")
def _(r):
    n, out, first, second = _sizes(r)
    return torch.ops.aten._trilinear(
        leaf(n, first), leaf(out, first, second), leaf(n, second), [1, 3], [0], [1, 2], [2, 3]
    )


@case("GridSampler2D")
def _(r):
    n, c, height, width = _sizes(r)
    return F.grid_sample(leaf(n, c, height, width), leaf(n, 3, 2, 2).tanh(), align_corners=False)


@case("GridSampler3D")
def _(r):
    n, c, height, width = _sizes(r)
    return F.grid_sample(leaf(n, c, height, width, 2), leaf(n, 3, 2, 2, 3).tanh(), align_corners=True)


@case("Bmm")
def _(r):
    a, b, n, m = _sizes(r)
    return torch.bmm(leaf(a, b, n), leaf(a, n, m))


@case("Baddbmm")
def _(r):
    a, b, n, m = _sizes(r)
    return torch.baddbmm(leaf(*broadcast(r, [a, b, m])), leaf(a, b, n), leaf(a, n, m))


@case("Mv")
def _(r):
    b, n, _, _ = _sizes(r)
    return leaf(b, n) @ leaf(n)


@case("Addmv")
def _(r):
    b, n, _, _ = _sizes(r)
    return torch.addmv(leaf(r.choice((1, b))), leaf(b, n), leaf(n))


@case("Addr")
def _(r):
    b, n, _, _ = _sizes(r)
    return torch.addr(leaf(*broadcast(r, [b, n])), leaf(b), leaf(n))


@case("EuclideanDist")
def _(r):
    a, b, n, m = _sizes(r)
    lead = r.choice(([], [a]))
    return torch._euclidean_dist(leaf(*lead, b, n), leaf(*lead, m, n))


@case("Cdist")
def _(r):
    a, b, n, m = _sizes(r)
    first, second = r.choice((([], []), ([a], [a]), ([a], [1]), ([1], [a]), ([a], [])))
    return aten._cdist_forward(leaf(*first, b, n), leaf(*second, m, n), 2.0, r.choice((0, 2)))


# Layers.


@case("Convolution")
def _(r):
    b, c = r.choice((1, 2, 3)), r.choice((2, 4))
    return F.conv1d(leaf(b, c, 6), leaf(4, c // 2, 3), leaf(4), groups=2)


@case("Convolution")
def _(r):
    b, c = r.choice((1, 2, 3)), r.choice((1, 2, 3))
    return F.conv_transpose2d(leaf(b, c, 4, 3), leaf(c, b, 2, 2), leaf(b))


@case("MkldnnConvolution")
def _(r):
    b, c = r.choice((1, 2, 3)), r.choice((1, 2, 3))
    x, w = leaf(b, c, 4, 4, dtype=torch.float32), leaf(3, c, 2, 2, dtype=torch.float32)
    return aten.mkldnn_convolution(x, w, leaf(3, dtype=torch.float32), [0, 0], [1, 1], [1, 1], 1)


@case("NativeLayerNorm")
def _(r):
    shape = a_shape(r, 2)
    own = shape[r.randint(1, len(shape) - 1) :]
    return torch.native_layer_norm(leaf(*shape), own, leaf(*own), leaf(*own), 1e-5)[0]


@case("NativeGroupNorm")
def _(r):
    b = r.choice((1, 2, 3, 4))
    return F.group_norm(leaf(b, 8, *a_shape(r, 0, 2)), r.choice((1, 2, 4)), leaf(8), leaf(8), 0.1)


@case("NativeBatchNorm")
def _(r):
    shape = [r.choice((2, 3, 4)), r.choice((1, 2, 4, 6)), *a_shape(r, 0, 2)]
    mean, var = torch.rand(2, shape[1], dtype=torch.float64)
    return aten.native_batch_norm(leaf(*shape), leaf(shape[1]), leaf(shape[1]), mean, var, r.random() < 0.5, 0.1, 0.1)[
        0
    ]


@case("ScaledDotProductFlashAttentionForCpu")
def _(r):
    b, h, q, k = r.choice((1, 2, 3)), r.choice((1, 2, 4)), r.choice((2, 3)), r.choice((2, 3))
    mask = torch.rand(q, k, dtype=torch.float64) if r.random() < 0.5 else None
    return aten._scaled_dot_product_flash_attention_for_cpu(
        leaf(b, h, q, 4), leaf(b, h, k, 4), leaf(b, h, k, 4), 0.0, mask is None and q == k, attn_mask=mask
    )[0]


@case("NllLoss")
def _(r):
    b = r.choice((1, 2, 3, 4, 6))
    return aten.nll_loss_forward(leaf(b, 3), picks(r, 3, b), None, r.choice((0, 0, 1)), -100)[0]


@case("NllLoss2D")
def _(r):
    b = r.choice((1, 2, 3, 4, 6))
    return aten.nll_loss2d_forward(leaf(b, 3, 4, 2), picks(r, 3, b, 4, 2), None, r.choice((0, 0, 1)), -100)[0]


@case("MultiMarginLoss")
def _(r):
    b = r.choice((1, 2, 3, 4, 6))
    return F.multi_margin_loss(leaf(b, 3), picks(r, 3, b), reduction="none")


@case("MultilabelMarginLoss")
def _(r):
    b = r.choice((1, 2, 3, 4, 6))
    return F.multilabel_margin_loss(leaf(b, 3), picks(r, 3, b, 3), reduction="none")


@case("CtcLoss")
def _(r):
    b = r.choice((2, 3, 4))
    return aten._ctc_loss(leaf(6, b, 4), picks(r, 3, b, 2) + 1, [6] * b, [2] * b)[0]


@case("MkldnnRnnLayer")
def _(r):
    b, n, h = r.choice((2, 3, 4)), 3, 4
    weights = [leaf(*s, dtype=torch.float32) for s in ((4 * h, n), (4 * h, h), (4 * h,), (4 * h,))]
    x, state, cell = (leaf(*s, dtype=torch.float32) for s in ((5, b, n), (1, b, h), (1, b, h)))
    lstm = 2
    return aten.mkldnn_rnn_layer(
        x, *weights, state, cell, False, [], lstm, h, 1, True, False, False, True
    )[:3]  # fmt: skip


# Images.

POOLED = {
    2: {
        "MaxPool2DWithIndices": lambda x: aten.max_pool2d_with_indices(x, 2), "AvgPool2D": lambda x: F.avg_pool2d(x, 2),
        "AdaptiveAvgPool2D": lambda x: aten._adaptive_avg_pool2d(x, [2, 2]),
        "AdaptiveMaxPool2D": lambda x: aten.adaptive_max_pool2d(x, [2, 2]),
        "ReflectionPad2D": lambda x: aten.reflection_pad2d(x, [1, 0, 1, 1]),
        "ReplicationPad2D": lambda x: aten.replication_pad2d(x, [1, 0, 1, 1]),
    },
    3: {
        "MaxPool3DWithIndices": lambda x: aten.max_pool3d_with_indices(x, 2), "AvgPool3D": lambda x: F.avg_pool3d(x, 2),
        "AdaptiveAvgPool3D": lambda x: aten._adaptive_avg_pool3d(x, [2, 2, 2]),
        "AdaptiveMaxPool3D": lambda x: aten.adaptive_max_pool3d(x, [2, 2, 2]),
        "ReflectionPad3D": lambda x: aten.reflection_pad3d(x, [1, 0, 1, 1, 0, 1]),
        "ReplicationPad3D": lambda x: aten.replication_pad3d(x, [1, 0, 1, 1, 0, 1]),
    },
    1: {
        "ReflectionPad1D": lambda x: aten.reflection_pad1d(x, [1, 2]),
        "ReplicationPad1D": lambda x: aten.replication_pad1d(x, [1, 2]),
    },
}  # fmt: skip
for _dims, _functions in POOLED.items():
    for _name, _function in _functions.items():

        @case(_name)
        def _(r, f=_function, dims=_dims):
            lead = [r.choice((1, 2, 3, 4)) for _ in range(r.choice((1, 2)))]
            return f(leaf(*lead, *[r.choice((4, 6)) for _ in range(dims)]))


UPSAMPLED = {
    "UpsampleNearest1D": (1, "nearest", False), "UpsampleLinear1D": (1, "linear", False),
    "UpsampleNearestExact1D": (1, "nearest-exact", False), "UpsampleNearest2D": (2, "nearest", False),
    "UpsampleBilinear2D": (2, "bilinear", False), "UpsampleBicubic2D": (2, "bicubic", False),
    "UpsampleNearestExact2D": (2, "nearest-exact", False), "UpsampleBilinear2DAa": (2, "bilinear", True),
    "UpsampleBicubic2DAa": (2, "bicubic", True), "UpsampleNearest3D": (3, "nearest", False),
    "UpsampleTrilinear3D": (3, "trilinear", False), "UpsampleNearestExact3D": (3, "nearest-exact", False),
}  # fmt: skip
for _name, _way in UPSAMPLED.items():

    @case(_name)
    def _(r, way=_way):
        dims, mode, antialias = way
        size = [r.choice((2, 3, 6)) for _ in range(dims)]
        x = leaf(r.choice((1, 2, 3)), r.choice((1, 2, 4)), *[3] * dims)
        return F.interpolate(x, size=size, mode=mode, antialias=antialias)


@case("PixelShuffle")
def _(r):
    return F.pixel_shuffle(leaf(*[r.choice((1, 2, 3)) for _ in range(r.randint(0, 2))], 4, 2, 3), 2)


@case("PixelUnshuffle")
def _(r):
    return F.pixel_unshuffle(leaf(*[r.choice((1, 2, 3)) for _ in range(r.randint(0, 2))], 3, 4, 2), 2)


@case("ChannelShuffle")
def _(r):
    return torch.channel_shuffle(leaf(r.choice((1, 2, 3, 4)), 4, 2, 3), 2)


@case("Im2Col")
def _(r):
    lead = r.choice(([2], [3, 2], [4, 3]))
    return F.unfold(leaf(*lead, 4, 5), r.choice((1, 2)), padding=r.choice((0, 1)), stride=r.choice((1, 2)))


@case("Col2Im")
def _(r):
    k = r.choice((1, 2))
    lead = r.choice(([], [3], [4]))
    return F.fold(leaf(*lead, 2 * k * k, (5 - k) * (6 - k)), (4, 5), k)


# Linear algebra of matrices.


@case("LinalgInvEx")
def _(r):
    return torch.linalg.inv_ex(torch.randn(*a_shape(r, 0, 2), 3, 3, dtype=torch.float64).requires_grad_())[0]


@case("LinalgCholeskyEx")
def _(r):
    x = torch.randn(*a_shape(r, 0, 2), 3, 3, dtype=torch.float64)
    return torch.linalg.cholesky_ex((x @ x.mT + torch.eye(3)).requires_grad_())[0]


@case("LinalgQr")
def _(r):
    return torch.linalg.qr(torch.randn(*a_shape(r, 0, 2), 4, 3, dtype=torch.float64).requires_grad_())


@case("LinalgEigh")
def _(r):
    x = torch.randn(*a_shape(r, 0, 2), 3, 3, dtype=torch.float64)
    return torch.linalg.eigh((x + x.mT).requires_grad_())


@case("LinalgSvd")
def _(r):
    x = torch.randn(*a_shape(r, 0, 2), 4, 3, dtype=torch.float64).requires_grad_()
    return torch.linalg.svd(x, full_matrices=False)


# The comparison.


def parts_of(n):
    """Yield all (size, inner) so that entry i of an axis of n entries may belong to (i // inner) % size."""
    for size in range(2, n + 1):
        if n % size == 0:
            for inner in range(1, n // size + 1):
                if n % (size * inner) == 0:
                    yield size, inner


def graph_of(output):
    return walk(output, Recorder(Registry({}), ()), {})


def edges_of(graph):
    """Return the positions of a node's edges, and what they lead to."""
    found = []
    for position, (child, index) in enumerate(zip(graph.edges[0], graph.indices[0], strict=True)):
        if child >= 0:
            found.append((position, GradientEdge(graph.nodes[child], index)))
    return found


def owners(place, size, shape):
    return Layout((Axis(place.dim, size, place.inner),)).owners(shape, torch.device("cpu")).expand(shape)


def check(output):
    """Compare what is claimed of one output's axes with autograd, and return how many claims there are."""
    graph = graph_of(output)
    step, edges = graph.step(0), edges_of(graph)
    claims = 0
    for dim, n in enumerate(output.shape):
        for size, inner in parts_of(n):
            place = Place(dim, inner)
            carried = [carry(step, graph.output, place, size, position) for position, _ in edges]
            for found in carried:
                if isinstance(found, Split):
                    assert 1 < found.inner < size, (place, size, found)
                    assert size % found.inner == 0, (place, size, found)
            places = [(k, found) for k, found in enumerate(carried) if isinstance(found, Place)]
            claims += len(places)
            if places:
                _compare(output, place, size, edges, places)
    return claims


def _compare(output, place, size, edges, places):
    belongs = owners(place, size, output.shape)
    for owner in range(size):
        cotangent = torch.randn(output.shape, dtype=torch.float64).to(output.dtype) * (belongs == owner)
        ends = [edges[k][1] for k, _ in places]
        grads = torch.autograd.grad(output, ends, cotangent, retain_graph=True, allow_unused=True)
        for (k, claimed), grad in zip(places, grads, strict=True):
            if grad is None:
                continue
            grad = grad.to_dense() if grad.layout != torch.strided else grad
            assert 0 <= claimed.dim < grad.dim(), (place, size, claimed)
            assert grad.shape[claimed.dim] % (size * claimed.inner) == 0, (place, size, claimed, grad.shape)
            others = grad[owners(claimed, size, grad.shape) != owner]
            assert bool((others == 0).all()), (edges[k][0], place, size, claimed, tuple(grad.shape))


def outputs_of(build, seed):
    r = random.Random(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    made = build(r)
    made = made if isinstance(made, (tuple, list)) else (made,)
    return [out for out in made if out.requires_grad and out.numel()]


def name_of(output):
    return type(output.grad_fn).__name__.removesuffix("_copy").rpartition("Backward")[0]


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_is_claimed_is_true(name):
    claims = 0
    for number, build in enumerate(CASES[name]):
        for seed in range(12):
            for output in outputs_of(build, 1000 * number + seed):
                if name_of(output) == name:
                    claims += check(output)
    assert (claims == 0) is (name in NOTHING_APART), claims


class Sums(torch.autograd.Function):
    """Sums over the middle axis of [a, n, b], and says so."""

    independent_axes = ({0: 0, -1: -1},)

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.sum(1)

    @staticmethod
    def backward(ctx, grad):
        return grad.unsqueeze(1).expand(ctx.shape)


class Wrong(Sums):
    """Says that what it sums over is an axis of the output's."""

    independent_axes = ({0: 1, 1: 3},)


def test_what_a_function_says_of_itself():
    output = Sums.apply(leaf(4, 2, 3))
    graph = graph_of(output)
    assert check(output) == 4  # two axes, and the half of one and the other
    assert carry(graph.step(0), 0, Place(1), 3, 0) == Place(2)
    wrong = graph_of(Wrong.apply(leaf(4, 2, 3))).step(0)
    assert all(isinstance(carry(wrong, 0, Place(dim), size, 0), Lost) for dim, size in ((0, 4), (1, 3)))


def test_every_operation_of_the_table_is_tested():
    made = {
        name_of(out) for builds in CASES.values() for build in builds for s in range(4) for out in outputs_of(build, s)
    }
    assert set(CASES) <= made
    assert set(_operations._KINDS) == set(CASES) | ELSEWHERE
    assert not set(CASES) & ELSEWHERE


def test_a_false_claim_is_found(monkeypatch):
    for name, rule in (
        ("Softmax", _operations._pointwise),
        ("Roll", _operations._pointwise),
        ("Mm", _operations._pointwise),
    ):
        monkeypatch.setitem(_operations._KINDS, name, _operations._Kind(rule))
        _operations._by_name.cache_clear()
        with pytest.raises(AssertionError):
            test_what_is_claimed_is_true(name)
    monkeypatch.undo()
    _operations._by_name.cache_clear()


# What must not be lost: for each operation and place in its output, the places in what its edges lead to (None: lost).
EXPECTED = {
    "a bias is added": (lambda: leaf(4, 3) + leaf(3), Place(0), [Place(0), None]),
    "a batch of one is added": (lambda: leaf(4, 3) + leaf(1, 3), Place(0), [Place(0), None]),
    "positions are added": (lambda: leaf(2, 4, 3) + leaf(4, 3), Place(1), [Place(1), Place(0)]),
    "a linear layer": (lambda: F.linear(leaf(4, 3), leaf(5, 3), leaf(5)), Place(0), [None, Place(0), None]),
    "a product's columns": (lambda: leaf(4, 3) @ leaf(3, 5), Place(1), [None, Place(1)]),
    "a product for each": (lambda: torch.bmm(leaf(4, 2, 3), leaf(4, 3, 5)), Place(0), [Place(0), Place(0)]),
    "rows in a product for each": (lambda: torch.bmm(leaf(4, 2, 3), leaf(4, 3, 5)), Place(1), [Place(1), None]),
    "part of a product for each": (lambda: torch.bmm(leaf(8, 2, 3), leaf(8, 3, 5)), Place(0, 2), [Place(0, 2)] * 2),
    "a sparse product's features": (
        lambda: torch.rand(4, 3, dtype=torch.float64).to_sparse() @ leaf(3, 5), Place(1), [Place(1)]),
    "a convolution": (lambda: F.conv2d(leaf(4, 2, 5, 5), leaf(3, 2, 2, 2)), Place(0), [Place(0), None]),
    "an axis is merged": (lambda: leaf(4, 3, 2).reshape(12, 2), Place(0, 3), [Place(0)]),
    "the inner one": (lambda: leaf(4, 3, 2).reshape(12, 2), Place(0), [Place(1)], 3),
    "both": (lambda: leaf(4, 3, 2).reshape(12, 2), Place(0), [Split(3)], 12),
    "an axis is taken apart": (lambda: leaf(12, 2).view(4, 3, 2), Place(0), [Place(0, 3)]),
    "an axis is flattened away": (lambda: leaf(4, 3, 2).flatten(1), Place(0), [Place(0)]),
    "permuted": (lambda: leaf(4, 3, 2).permute(2, 0, 1), Place(1), [Place(0)]),
    "transposed": (lambda: leaf(4, 3, 2).transpose(-1, -3), Place(2), [Place(0)]),
    "transposed matrix": (lambda: leaf(4, 3).t(), Place(1), [Place(0)]),
    "expanded": (lambda: leaf(4, 1).expand(4, 3), Place(0), [Place(0)]),
    "expanded along it": (lambda: leaf(1, 3).expand(4, 3), Place(0), [None]),
    "repeated": (lambda: leaf(4, 3).repeat(2, 1), Place(0), [Place(0)], 4),
    "softmax": (lambda: leaf(4, 3).softmax(-1), Place(0), [Place(0)]),
    "softmax along it": (lambda: leaf(4, 3).softmax(0), Place(0), [None]),
    "sum": (lambda: leaf(4, 3, 2).sum(1), Place(1), [Place(2)]),
    "sum that keeps": (lambda: leaf(4, 3, 2).sum(1, keepdim=True), Place(2), [Place(2)]),
    "mean of two axes": (lambda: leaf(4, 3, 2).mean((-1, 1)), Place(0), [Place(0)]),
    "maximum": (lambda: leaf(4, 3).max(1)[0], Place(0), [Place(0)]),
    "norm": (lambda: torch.linalg.vector_norm(leaf(4, 3), dim=-1), Place(0), [Place(0)]),
    "select": (lambda: leaf(4, 3, 2)[:, 0], Place(1), [Place(2)]),
    "unbind": (lambda: leaf(3, 4, 2).unbind(0)[1], Place(0), [Place(1)]),
    "slice": (lambda: leaf(4, 3)[:, 1:], Place(0), [Place(0)]),
    "slice along it": (lambda: leaf(5, 3)[1:], Place(0), [None]),
    "chunk": (lambda: leaf(4, 6).chunk(3, -1)[2], Place(0), [Place(0)]),
    "cat": (lambda: torch.cat([leaf(4, 1, 2), leaf(4, 3, 2)], 1), Place(0), [Place(0), Place(0)]),
    "cat along it": (lambda: torch.cat([leaf(4, 2), leaf(4, 2)]), Place(0), [None, None], 8),
    "stack": (lambda: torch.stack([leaf(4, 2), leaf(4, 2)], -1), Place(0), [Place(0), Place(0)]),
    "padding": (lambda: F.pad(leaf(4, 3), (1, 1)), Place(0), [Place(0)]),
    "roll": (lambda: leaf(4, 3).roll(1, 1), Place(0), [Place(0)]),
    "windows": (lambda: leaf(4, 6).unfold(1, 2, 2), Place(0), [Place(0)]),
    "gather": (lambda: leaf(4, 3).gather(1, torch.zeros(4, 1, dtype=torch.long)), Place(0), [Place(0)]),
    "one of each": (lambda: leaf(4, 3)[torch.arange(4), torch.tensor([0, 2, 1, 0])], Place(0), [Place(0)]),
    "an index of positions": (lambda: leaf(4, 3)[:, torch.tensor([2, 0])], Place(0), [Place(0)]),
    "an index of elements": (lambda: leaf(4, 3)[torch.tensor([2, 0, 1, 1])], Place(1), [Place(1)]),
    "indices of experts": (lambda: leaf(5, 3).index_select(0, torch.tensor([1, 2])), Place(1), [Place(1)]),
    "scattered over positions": (
        lambda: torch.scatter_add(leaf(4, 3), 1, torch.zeros(4, 2, dtype=torch.long), leaf(4, 2)),
        Place(0), [Place(0), Place(0)]),
    "index_add over nodes": (
        lambda: torch.index_add(leaf(4, 3), 0, torch.tensor([1, 1]), leaf(2, 3)), Place(1), [Place(1), Place(1)]),
    "layer norm": (lambda: F.layer_norm(leaf(4, 3), (3,), leaf(3), leaf(3)), Place(0), [Place(0), None, None]),
    "group norm": (lambda: F.group_norm(leaf(4, 6, 2), 2, leaf(6), leaf(6)), Place(0), [Place(0), None, None]),
    "batch norm": (
        lambda: F.batch_norm(leaf(4, 3), None, None, leaf(3), training=True), Place(0), [None, None]),
    "batch norm's channels": (
        lambda: F.batch_norm(leaf(4, 3), None, None, None, training=True), Place(1), [Place(1)]),
    "batch norm in evaluation": (
        lambda: F.batch_norm(leaf(4, 3), torch.zeros(3).double(), torch.ones(3).double(), leaf(3)),
        Place(0), [Place(0), None]),
    "attention": (
        lambda: F.scaled_dot_product_attention(leaf(4, 2, 5, 3), leaf(4, 2, 6, 3), leaf(4, 2, 6, 3)),
        Place(0), [Place(0)] * 3),
    "attention's queries": (
        lambda: F.scaled_dot_product_attention(leaf(4, 2, 5, 3), leaf(4, 2, 6, 3), leaf(4, 2, 6, 3)),
        Place(2), [Place(2), None, None]),
    "negative log likelihood": (
        lambda: F.nll_loss(leaf(4, 3), torch.tensor([0, 1, 2, 0]), reduction="none"), Place(0), [Place(0)]),
    "the same of pixels": (
        lambda: F.nll_loss(leaf(4, 3, 5, 2), torch.zeros(4, 5, 2).long(), reduction="none"), Place(1), [Place(2)]),
    "squared error": (lambda: F.mse_loss(leaf(4, 3), leaf(4, 3), reduction="none"), Place(0), [Place(0)] * 2),
    "pooling": (lambda: F.avg_pool2d(leaf(4, 3, 6, 6), 2), Place(0), [Place(0)]),
    "upsampling": (lambda: F.interpolate(leaf(4, 3, 2, 2), scale_factor=2), Place(1), [Place(1)]),
    "pixel shuffle": (lambda: F.pixel_shuffle(leaf(4, 4, 2, 2), 2), Place(0), [Place(0)]),
    "patches": (lambda: F.unfold(leaf(4, 3, 6, 6), 2), Place(0), [Place(0)]),
    "distances": (lambda: torch.cdist(leaf(4, 3), leaf(5, 3)), Place(0), [Place(0), None]),
    "sort": (lambda: leaf(4, 3).sort(1)[0], Place(0), [Place(0)]),
    "cumulative sum": (lambda: leaf(4, 3).cumsum(1), Place(0), [Place(0)]),
    "Fourier": (lambda: torch.fft.rfft(leaf(4, 6)), Place(0), [Place(0)]),
    "inverse": (lambda: torch.linalg.inv_ex(leaf(4, 3, 3))[0], Place(0), [Place(0)]),
}  # fmt: skip


@pytest.mark.parametrize("label", EXPECTED)
def test_what_is_expected(label):
    build, place, places, *size = EXPECTED[label]
    torch.manual_seed(0)
    output = build()
    graph = graph_of(output)
    inner = place.inner * (size[0] if size else output.shape[place.dim] // place.inner)
    assert output.shape[place.dim] % inner == 0
    found = [carry(graph.step(0), graph.output, place, inner // place.inner, edge) for edge, _ in edges_of(graph)]
    assert [None if isinstance(one, Lost) else one for one in found] == places
    assert math.prod(output.shape) > 1
