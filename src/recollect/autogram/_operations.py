"""What autograd's operations do to an axis: by the names of its nodes, and what they keep of how they were called.

A backward pass carries gradients from a node's outputs to its inputs. If each loss of a batch has its own entries of
an output's gradient, those along an axis, an operation either keeps them apart, and says where they are in the
gradient of each input, or it does not. Both follow from what the operation is, from shapes, and from settings such as
``dim``; never from values. What is not in the table keeps nothing apart.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import BackwardCFunction
from torch.nn.modules._functions import BackwardHookFunction

from recollect.autogram._index import counts_up

__all__ = [
    "Lost",
    "Place",
    "Split",
    "Step",
    "carry",
    "declare",
    "goes_by_entry",
    "handed_on",
    "kind_of",
    "looks_up",
    "reaches",
    "settings_of",
]


class Place(NamedTuple):
    """Where a tensor has an axis of the losses: entry i of its axis ``dim`` belongs to (i // inner) % size."""

    dim: int
    inner: int = 1


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a tensor has the losses of an axis nowhere apart.

    Attributes:
        why: "unknown": nothing is declared of the operation; "mixed": the operation works along the axis; "moved": it
            picks or places entries along the axis; "summed": its input has no such axis, as a weight has none; "met":
            two ways from the losses lead to different places.
        node: the number of the node where this happened.
    """

    why: str
    node: int = -1


@dataclass(frozen=True, slots=True)
class Split:
    """An axis that a tensor has in two: its outer part, and an inner one of this size."""

    inner: int


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, as far as it matters here.

    Attributes:
        kind: see :func:`kind_of`.
        settings: see :func:`settings_of`.
        outs: the shapes of its outputs.
        ins: the shapes of what its edges lead to; None where they lead nowhere, or to a tensor without a shape.
    """

    kind: Any
    settings: tuple[Any, ...]
    outs: Sequence[torch.Size | None]
    ins: Sequence[torch.Size | None]


Carried = Place | Lost | Split
_Rule = Callable[[Step, int, Place, int, int], Carried]
"""From an axis' place in output ``k``, and its size, to its place in the input at ``edge``."""

_MIXED, _MOVED, _SUMMED, _UNKNOWN = Lost("mixed"), Lost("moved"), Lost("summed"), Lost("unknown")


def reaches(step: Step, output: int, edge: int) -> bool:
    """Whether anything of an output's gradient comes to an input: of a layer's beginning or end, only to its own."""
    found = _find(step.kind)
    return found is None or found.rule is not handed_on or edge == output + len(step.ins) - len(step.outs)


def carry(step: Step, output: int, place: Place, size: int, edge: int) -> Carried:
    """Return where the input at an edge has the axis that an output has at a place.

    Args:
        step: the operation.
        output: which of its outputs.
        place: the axis' in that output.
        size: the axis'.
        edge: which of its inputs; it leads somewhere.
    """
    found = _find(step.kind)
    if found is None or step.outs[output] is None or step.ins[edge] is None:
        return _UNKNOWN
    return found.rule(step, output, place, size, edge)


def goes_by_entry(node: Any, edge: int) -> bool:
    """Whether a node gives each entry of an input's gradient, before it is summed, from the same entry of its own."""
    found = _find(kind_of(node))
    return found is not None and (found.rule is _pointwise or (edge == 0 and found.rule in _ADDING))


def looks_up(kind: Any) -> bool:
    """Whether an operation picks entries by indices, which are data that need no gradient and have no edge."""
    return isinstance(kind, str) and kind.partition("Backward")[0] in _LOOKING_UP


def settings_of(node: Any, kind: Any) -> tuple[Any, ...]:
    """Return what a node keeps of how its operation was called, as far as it says where an axis goes; hashable."""
    found = _find(kind)
    if found is None or found.settings == ():
        return ()
    if callable(found.settings):
        return found.settings(node)
    return tuple([_hashable(getattr(node, attribute, None)) for attribute in found.settings])


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _axes(value: Any, dims: int) -> tuple[int, ...] | None:
    """Return axes, counted from the first one, of a setting; None where it names none, which means all.

    Autograd keeps negative numbers modulo 2^64.
    """
    if value is None or value == ():
        return None
    values = value if isinstance(value, tuple) else (value,)
    return tuple((axis - 2**64 if axis >= 2**63 else axis) % max(dims, 1) for axis in values)


def _in(step: Step, edge: int) -> torch.Size:
    shape = step.ins[edge]
    assert shape is not None
    return shape


def _out(step: Step, output: int) -> torch.Size:
    shape = step.outs[output]
    assert shape is not None
    return shape


# Rules. What they return of a place holds for every size of the other axes.


def _pointwise(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Entry by entry; an input that was broadcast along the axis has it not."""
    out, taken = _out(step, k), _in(step, edge)
    dim = place.dim - len(out) + len(taken)
    return Place(dim, place.inner) if dim >= 0 and taken[dim] == out[place.dim] else _SUMMED


def _viewed(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """The same entries in the same order, in another shape."""
    out, taken = _out(step, k), _in(step, edge)
    if out.numel() != taken.numel() or not out.numel():
        return _UNKNOWN
    stride = place.inner * math.prod(out[place.dim + 1 :])
    behind = 1  # entries of the axes behind the one that is looked at
    for dim in range(len(taken) - 1, -1, -1):
        if stride < behind * taken[dim] and taken[dim] > 1:
            if stride % behind or (behind * taken[dim]) % stride:
                return _MOVED
            if stride * size <= behind * taken[dim]:
                return _MOVED if behind * taken[dim] % (stride * size) else Place(dim, stride // behind)
            inner = behind * taken[dim] // stride
            return Split(inner) if size % inner == 0 else _MOVED
        behind *= taken[dim]
    return _UNKNOWN


def _repeated(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Copies lie behind one another along each axis: the axis of the losses is in the copied, or it counts copies."""
    out, taken = _out(step, k), _in(step, edge)
    dim = place.dim - len(out) + len(taken)
    if dim < 0 or (out[place.dim] > taken[dim] and place.inner * size > taken[dim]):
        return _SUMMED
    return Place(dim, place.inner) if taken[dim] % (place.inner * size) == 0 else _MOVED


def _permuted(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    order = _axes(step.settings[0], len(_out(step, k)))
    return _MOVED if order is None else Place(order[place.dim], place.inner)


def _transposed(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    if step.settings == ():
        return Place(1 - place.dim if len(_out(step, k)) == 2 else place.dim, place.inner)
    axes = _axes(step.settings, len(_out(step, k)))
    assert axes is not None
    first, second = axes
    return Place({first: second, second: first}.get(place.dim, place.dim), place.inner)


def _along(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Along some axes, whose number stays: the losses' may be any other."""
    axes = _axes(step.settings[0], len(_in(step, edge)))
    return _MIXED if axes is None or place.dim in axes else place


def _reordered(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    carried = _along(step, k, place, size, edge)
    return _MOVED if carried is _MIXED else carried


def _reduced(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Along some axes, which the output has not, or with one entry: settings are those axes and whether they stay."""
    out, taken = _out(step, k), _in(step, edge)
    axes = _axes(step.settings[0], len(taken))
    if axes is None:
        return _MIXED
    if len(out) == len(taken):
        return _MIXED if place.dim in axes else place
    kept = [dim for dim in range(len(taken)) if dim not in axes]
    return Place(kept[place.dim], place.inner) if len(kept) == len(out) else _MIXED


def _selected(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """One entry of an axis, or all of them as outputs of their own."""
    axes = _axes(step.settings[0], len(_in(step, edge)))
    assert axes is not None
    return Place(place.dim + (place.dim >= axes[0]), place.inner)


def _cut(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Some entries of an axis, in order: if it is the losses', only all of them."""
    out, taken = _out(step, k), _in(step, edge)
    if len(out) != len(taken):
        return _MOVED  # an empty vector among others
    return place if out == taken else _reordered(step, k, place, size, edge)


def _stacked(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    axes = _axes(step.settings[0], len(_out(step, k)))
    assert axes is not None
    return _MOVED if place.dim == axes[0] else Place(place.dim - (place.dim > axes[0]), place.inner)


def _shaped_alike(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Axes of the same size on both sides, as long as the operation does not work along them (its settings)."""
    if place.dim >= len(_in(step, edge)) or _in(step, edge)[place.dim] != _out(step, k)[place.dim]:
        return _MOVED
    return _reordered(step, k, place, size, edge)


def _padded(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Settings: two widths for each of the last axes, the last one first."""
    pad, behind = step.settings[0], len(_out(step, k)) - 1 - place.dim
    return _MOVED if any(pad[2 * behind : 2 * behind + 2]) else place


def _rolled(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    axes = _axes(step.settings[0], len(_out(step, k)))
    return _MOVED if axes is None or place.dim in axes else place


def _windows(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """``unfold``: the windows' entries come in a last axis."""
    axes = _axes(step.settings[0], len(_in(step, edge)))
    assert axes is not None
    return _MIXED if place.dim in (axes[0], len(_out(step, k)) - 1) else place


def _leading(behind: int) -> _Rule:
    """Return the rule of what works along that many last axes, the others being the same on both sides."""

    def rule(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
        out, taken = _out(step, k), _in(step, edge)
        if edge > 0:
            return _SUMMED
        same = len(out) == len(taken) and place.dim < len(out) - behind and out[place.dim] == taken[place.dim]
        return place if same else _MIXED

    return rule


def _first(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """The losses' axis is the first one of the input and of the output; other edges lead to weights."""
    if edge > 0:
        return _SUMMED
    return place if place.dim == 0 and _out(step, k)[0] == _in(step, edge)[0] else _MIXED


def _diagonal(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    axes = _axes(step.settings, len(_in(step, edge)))
    assert axes is not None
    kept = [dim for dim in range(len(_in(step, edge))) if dim not in axes]
    return Place(kept[place.dim], place.inner) if place.dim < len(kept) else _MOVED


def _source(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Entries of the second input are placed into the first, along the axis of the settings."""
    return (_pointwise, _shaped_alike)[edge](step, k, place, size, edge)


def _into_first(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Entries of the first input are replaced, at places that are nobody's business; the others are picked."""
    return _pointwise(step, k, place, size, edge) if edge == 0 else _MOVED


def _masked(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    return _MOVED


def _looked_up(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    return _SUMMED


def _indexed(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """``x[indices]``; settings: for each axis None, or the index's number of axes (None: unknown), and what it is."""
    out, taken, entries = _out(step, k), _in(step, edge), step.settings
    tensors = [axis for axis, entry in enumerate(entries) if entry is not None]
    if not tensors or tensors[-1] - tensors[0] + 1 != len(tensors):
        return _MOVED  # what was picked has come to the front
    first = tensors[0]
    if place.dim < first:
        return place
    if any(entries[axis].dims is None for axis in tensors):
        return _MOVED
    masks = sum(entries[axis].mask_dims for axis in tensors)
    plain = [entries[axis] for axis in tensors if not entries[axis].mask_dims]
    width = max([entry.dims for entry in plain] + [1] * (masks > 0))
    covered = masks + len(plain)
    if place.dim >= first + width:
        return Place(place.dim - width + covered, place.inner)
    if width == 1 and not masks:
        for axis, entry in zip(tensors, plain, strict=True):
            if entry.counts == taken[axis] == out[place.dim]:
                return Place(axis, place.inner)
    return _MOVED


class _IndexOf(NamedTuple):
    """One of several indices.

    Attributes:
        dims: its number of axes; None: it is not to be looked at.
        mask_dims: how many axes it covers, if it is a mask.
        counts: how many entries it has, if they are 0, 1, 2 and so on.
    """

    dims: int | None
    mask_dims: int
    counts: int | None


def _indices(node: Any) -> tuple[Any, ...]:
    found: list[_IndexOf | None] = []
    sizes = iter(node._saved_self_sym_sizes)
    for saved in node._raw_saved_indices:
        if saved.unpack_hook is not None:  # what a frame has put away stays there
            found.append(_IndexOf(None, 0, None))
            sizes = iter(())  # of how many axes it takes nothing is known
        elif saved.data is None:
            found.append(None)
            next(sizes, None)
        else:
            index = saved.data
            mask = index.dtype in (torch.bool, torch.uint8)
            size = [next(sizes, None) for _ in range(index.dim() if mask else 1)][-1:]
            counts = not mask and index.dim() == 1 and size == [len(index)] and counts_up(index)
            found.append(_IndexOf(index.dim(), index.dim() if mask else 0, len(index) if counts else None))
    return tuple(found)


_ADDING: set[_Rule] = set()  # rules of products that are added to what the first edge leads to


def _product(*sides: dict[int, int]) -> _Rule:
    """Return the rule of a product: for each edge, by the output's axes, the input's."""

    def rule(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
        if edge >= len(sides):
            return _SUMMED
        dim = sides[edge].get(place.dim)
        return _SUMMED if dim is None else Place(dim, place.inner)

    return rule


def _with_added(*sides: dict[int, int]) -> _Rule:
    """The same, of a product that is added to what the first edge leads to."""
    product = _product(*sides)

    def rule(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
        return _pointwise(step, k, place, size, 0) if edge == 0 else product(step, k, place, size, edge - 1)

    _ADDING.add(rule)
    return rule


def _linear(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    return place if edge == 0 and place.dim < len(_out(step, k)) - 1 else _SUMMED


def _normalised(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Along the last axes, as many as the setting has."""
    return _leading(len(step.settings[0]))(step, k, place, size, edge)


def _batch_normalised(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Settings: whether by the statistics of the batch."""
    if edge > 0:
        return _SUMMED
    return place if place.dim == 1 or not step.settings[0] else _MIXED


def _attended(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Query, key and value: leading axes are the batch's, and queries do not see one another."""
    out = _out(step, k)
    if edge > 2:
        return _SUMMED
    taken, leading = _in(step, edge), len(_out(step, 0)) - 2
    if place.dim < leading or (place.dim == leading and edge == 0):
        return place if taken[place.dim] == out[place.dim] else _MOVED
    return _MIXED


def _negative_log(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Classes are in the second axis, and the output has none of them; the setting is the reduction."""
    if edge > 0 or step.settings[0] != 0:
        return _MIXED
    return Place(place.dim + (place.dim > 0), place.inner)


def _by_row(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    return place if edge == 0 and place.dim == 0 and _in(step, edge)[0] == _out(step, k)[0] else _MIXED


def _connectionist(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    return Place(1) if edge == 0 and place == Place(0) and len(_in(step, edge)) == 3 else _MIXED


def _distances(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    out, taken = _out(step, k), _in(step, edge)
    dims = len(out)
    if len(taken) == dims:
        if place.dim < dims - 2 and taken[place.dim] == out[place.dim]:
            return place
        if place.dim == dims - 2 + edge:
            return Place(dims - 2, place.inner)
    return _SUMMED


def _trilinear(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """A product of three, each laid along some of all axes; settings: which ones each has not, and which are summed."""
    *missing, summed = (_axes(axes, 64) or () for axes in step.settings)
    every = len(_in(step, edge)) + len(missing[edge])
    kept = [axis for axis in range(every) if axis not in summed]
    own = [axis for axis in range(every) if axis not in missing[edge]]
    if len(kept) != len(_out(step, k)) or kept[place.dim] not in own:
        return _SUMMED
    dim = own.index(kept[place.dim])
    return Place(dim, place.inner) if _in(step, edge)[dim] == _out(step, k)[place.dim] else _SUMMED


def _sampled(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """An image, and where to look into it: the first axis of both is the batch's."""
    return place if place.dim == 0 and _in(step, edge)[0] == _out(step, k)[0] else _MIXED


def _recurrent(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """The kernel of one layer: steps, batch, elements, in inputs and states; edges 1 to 4 lead to weights."""
    if edge in (1, 2, 3, 4):
        return _SUMMED
    out, taken = _out(step, k), _in(step, edge)
    return place if place.dim == 1 and len(out) == len(taken) == 3 and out[1] == taken[1] else _MIXED


def _complex(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """Between complex numbers and pairs in a last axis."""
    return place if place.dim < min(len(_out(step, k)), len(_in(step, edge))) else _MIXED


def handed_on(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
    """A layer's beginning or end: each output is an input (an engine's own node leads to its leaf first)."""
    return place if _in(step, edge) == _out(step, k) else _UNKNOWN


@dataclass(frozen=True, slots=True)
class _Kind:
    rule: _Rule
    settings: tuple[str, ...] | Callable[[Any], tuple[Any, ...]] = ()


def _each(names: str, rule: _Rule, *settings: str) -> dict[str, _Kind]:
    return {name: _Kind(rule, tuple(f"_saved_{setting}" for setting in settings)) for name in names.split()}


# By the names of autograd's nodes, without "Backward" and its number.
_KINDS: dict[str, _Kind] = {
    **_each(
        """
        Abs Acos Acosh Add Addcdiv Addcmul Alias Angle Asin Asinh Atan Atan2 Atanh BinaryCrossEntropy
        BinaryCrossEntropyWithLogits Ceil Celu Clamp ClampMax ClampMin Clone Complex Conj ConjPhysical Copysign
        Cos Cosh Deg2Rad Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Fill Floor Fmax Fmin Fmod Frac Gelu
        Hardshrink Hardsigmoid Hardswish Hardtanh HuberLoss Hypot I0 Igamma LeakyRelu Lerp
        Lgamma Log Log10 Log1P Log2 LogSigmoid Logaddexp Logaddexp2 Logit MaskedFill Maximum Minimum Mish MseLoss Mul
        Mvlgamma NanToNum NativeDropout FusedDropout Neg Polar Polygamma Pow PreluKernel Rad2Deg
        Reciprocal Relu Remainder Round Rsqrt Rsub RreluWithNoise Sgn Sigmoid Sign Silu Sin Sinc Sinh
        SmoothL1Loss SoftMarginLoss Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Tril Triu Trunc Where
        Xlogy Expand TanhBackward SigmoidBackward GeluBackward SoftplusBackward EluBackward LeakyReluBackward
        LogSigmoidBackward HardtanhBackward HardswishBackward
        ThresholdBackward SoftshrinkBackward SpecialI0E SpecialI1 SpecialI1E SpecialLogNdtr SpecialNdtri SpecialErfcx
        SpecialEntr SpecialXlog1Py SpecialZeta
        """,
        _pointwise,
    ),
    **_each("View UnsafeView ReshapeAlias Squeeze Unsqueeze ReshapeCopy", _viewed),
    **_each("Repeat", _repeated, "repeats"),
    **_each("Permute", _permuted, "dims"),
    **_each("Transpose", _transposed, "dim0", "dim1"),
    **_each("T", _transposed),
    **_each(
        "Softmax LogSoftmax SafeSoftmax Cumsum Cumprod Cummax Cummin Logcumsumexp FftC2C",
        _along,
        "dim",
    ),
    **_each("Sort", _reordered, "dim"),
    **_each(
        """
        Sum Mean Nansum Amax Amin Aminmax Logsumexp Norm LinalgVectorNorm Prod Var Std VarMean StdMean Kthvalue Mode
        Median Nanmedian Max Min
        """,
        _reduced,
        "dim",
        "keepdim",
    ),
    **_each("Select Unbind", _selected, "dim"),
    **_each("Slice Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Cat", _cut, "dim"),
    **_each("Topk Gather IndexSelect", _shaped_alike, "dim"),
    **_each("Glu FftR2C FftC2R", _shaped_alike, "dim"),
    **_each("Stack", _stacked, "dim"),
    **_each("Scatter ScatterAdd ScatterReduce IndexAdd IndexCopy IndexReduce", _source, "dim"),
    **_each("IndexFill", _into_first),
    **_each("IndexPut MaskedScatter", _into_first),
    **_each("MaskedSelect", _masked),
    **_each("ConstantPadNd", _padded, "pad"),
    **_each("ReflectionPad1D ReplicationPad1D", _leading(1)),
    **_each("ReflectionPad2D ReplicationPad2D", _leading(2)),
    **_each("ReflectionPad3D ReplicationPad3D", _leading(3)),
    **_each("Roll Flip Rot90", _rolled, "dims"),
    **_each("Unfold", _windows, "dimension"),
    **_each("Diagonal", _diagonal, "dim1", "dim2"),
    **_each("PixelShuffle PixelUnshuffle", _leading(3)),
    **_each("MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D AdaptiveMaxPool2D MkldnnMaxPool2D", _leading(2)),
    **_each("MaxPool3DWithIndices AvgPool3D AdaptiveAvgPool3D AdaptiveMaxPool3D", _leading(3)),
    **_each("UpsampleNearest1D UpsampleLinear1D UpsampleNearestExact1D", _leading(1)),
    **_each("UpsampleNearest2D UpsampleBilinear2D UpsampleBicubic2D UpsampleNearestExact2D", _leading(2)),
    **_each("UpsampleBilinear2DAa UpsampleBicubic2DAa", _leading(2)),
    **_each("UpsampleNearest3D UpsampleTrilinear3D UpsampleNearestExact3D", _leading(3)),
    **_each("Im2Col Col2Im ChannelShuffle", _first),
    **_each("Embedding EmbeddingBag EmbeddingDenseBackward", _looked_up),
    "Index": _Kind(_indexed, _indices),
    **_each("Mm", _product({0: 0}, {1: 1})),
    # Where a factor is 1, what the node saved of a product tells its rows: passes are planned for that.
    **_each("Addmm", _with_added({0: 0}, {1: 1}), "beta", "alpha"),
    **_each("SparseAddmm", _with_added({}, {1: 1})),
    **_each("Bmm", _product({0: 0, 1: 1}, {0: 0, 2: 2})),
    **_each("Baddbmm", _with_added({0: 0, 1: 1}, {0: 0, 2: 2})),
    **_each("Mv", _product({0: 0}, {})),
    **_each("Addmv", _with_added({0: 0}, {})),
    **_each("Addr", _with_added({0: 0}, {1: 0})),
    **_each("Linear MkldnnLinear", _linear),
    **_each("Convolution MkldnnConvolution CudnnConvolution MiopenConvolution ConvolutionOverrideable", _first),
    **_each("NativeLayerNorm FusedRmsNorm", _normalised, "normalized_shape"),
    **_each("NativeGroupNorm", _first),
    **_each("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm", _batch_normalised, "training"),
    **_each(
        """
        ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention
        ScaledDotProductCudnnAttention
        """,
        _attended,
    ),
    **_each("NllLoss NllLoss2D", _negative_log, "reduction"),
    **_each("MultiMarginLoss MultilabelMarginLoss", _by_row),
    **_each("CtcLoss", _connectionist),
    **_each("EuclideanDist Cdist", _distances),
    **_each("Trilinear", _trilinear, "expand1", "expand2", "expand3", "sumdim"),
    **_each("GridSampler2D GridSampler3D", _sampled),
    **_each("MkldnnRnnLayer", _recurrent),
    **_each("ViewAsReal ViewAsComplex", _complex),
    **_each("LinalgCholeskyEx LinalgInvEx LinalgQr LinalgEigh LinalgSvd", _leading(2)),
}
_LOOKING_UP = frozenset(("Embedding", "EmbeddingBag", "Gather", "Index", "IndexSelect"))
# By the functions that nodes in Python are of.
_FUNCTIONS: dict[Any, _Kind] = {
    BackwardHookFunction: _Kind(handed_on),
}


def declare(function: type[torch.autograd.Function], rule: _Rule) -> None:
    """Say what a function in Python does to an axis."""
    _FUNCTIONS[function] = _Kind(rule)


def _declared(function: Any) -> _Kind | None:
    """Return what a function in Python says of itself.

    Its attribute ``independent_axes`` is "all" if it works entry by entry, with broadcasting; or it has for each input
    that is a tensor a mapping from axes of the output to the input's axes that they are the same elements in, counted
    from either end.
    """
    axes = getattr(function, "independent_axes", None)
    if axes is None:
        return None
    if axes == "all":
        return _Kind(_pointwise)

    def rule(step: Step, k: int, place: Place, size: int, edge: int) -> Carried:
        out, taken = _out(step, k), _in(step, edge)
        own = axes[edge] if edge < len(axes) else {}
        dim = own.get(place.dim, own.get(place.dim - len(out)))
        if dim is None:
            return _SUMMED
        same = -len(taken) <= dim < len(taken) and taken[dim] == out[place.dim]
        return Place(dim % len(taken), place.inner) if same else _MOVED

    return _Kind(rule)


def kind_of(node: Any) -> Any:
    """Return what kind of operation a node is of: autograd's name, or the function of one in Python."""
    kind: Any = type(node)
    return kind._forward_cls if isinstance(node, BackwardCFunction) else kind.__name__


def _find(kind: Any) -> _Kind | None:
    return _by_name(kind) if isinstance(kind, str) else _FUNCTIONS.get(kind) or _declared(kind)


@functools.cache
def _by_name(name: str) -> _Kind | None:
    match = re.fullmatch(r"(\w+?)Backward\d+(_copy)?", name)
    return None if match is None else _KINDS.get(match[1])
