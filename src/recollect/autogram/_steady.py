"""Which nodes of a graph leave the elements of a batch apart, whatever the numbers are that they meet."""

from __future__ import annotations

import re
from collections.abc import Collection

from recollect.autogram._layout import Layout
from recollect.autogram._moves import Found, axis_of, layout_of
from recollect.autogram._walk import Graph

__all__ = ["is_steady"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By the names of autograd's nodes, without "Backward" and its number.
# Wherever the batch is: what is done to each entry, what gives entries other places, sums, and what picks by indices,
# which are compared. A fixed sum over the batch shows the first time.
_ANYWHERE = _names(
    """
    Abs Acos Acosh Add Alias AsStrided Asin Asinh Atan Atanh Cat Ceil Celu Clamp ClampMax ClampMin Clone Complex Conj
    ConjPhysical ConstantPadNd Cos Cosh CudnnBatchNorm CudnnRnn Cumsum Detach Diagonal Digamma Elu Embedding Erf Erfc
    Erfinv Exp Exp2 Expand Expm1 Flip Floor Frac FusedRmsNorm Gather Gelu Glu Hardsigmoid Hardswish Hardtanh I0 Im2Col
    Imag Index IndexAdd IndexCopy IndexPut IndexSelect LeakyRelu Lgamma Log Log10 Log1P Log2 LogSigmoid Logit
    MaskedScatter MaskedSelect Mean Mish MkldnnRnnLayer NanToNum NativeBatchNorm NativeDropout NativeLayerNorm Neg
    Permute PixelShuffle PixelUnshuffle PreluKernel Real Reciprocal ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu
    Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias Roll Rot90 Round Rsqrt Scatter ScatterAdd
    Select Selu Sgn Sigmoid Sign Silu Sin Sinc Sinh Slice Softplus Split SplitWithSizes Sqrt Squeeze Stack Sub Sum T
    Take Tan Tanh Threshold ToCopy Transpose Tril Triu Trunc Unbind Unfold UnsafeSplit UnsafeView Unsqueeze View
    ViewAsComplex ViewAsReal
    """
)
# Where the batch has the same axis, counted from the last one, on both sides: another side may be without it, and
# then its entries are factors, masks and the like for sums over the batch that come later.
_BETWEEN_SIDES = _names(
    """
    Addcdiv Addcmul Atan2 BinaryCrossEntropy BinaryCrossEntropyWithLogits Div Fmod HuberLoss Hypot KlDiv L1Loss Lerp
    Logaddexp Logaddexp2 MaskedFill Maximum Minimum MseLoss Mul Pow Remainder SmoothL1Loss SoftMarginLoss Where Xlogy
    """
)
# Where the batch is not along the axes that they normalise or choose along.
_ALONG = _names(
    """
    Amax Amin Cummax Cummin Cumprod Kthvalue LinalgVectorNorm LogSoftmax Logcumsumexp Logsumexp Max Median Min Mode Norm
    Prod Renorm SafeSoftmax Softmax Sort Std Topk Var
    """
)
# Where the batch is the first axis.
_FIRST = _names(
    """
    AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D AvgPool2D AvgPool3D Convolution
    MaxPool2DWithIndices MaxPool3DWithIndices NativeGroupNorm NllLoss NllLoss2D ScaledDotProductEfficientAttention
    ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu UpsampleBicubic2D UpsampleBilinear2D
    UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleTrilinear3D
    """
)
# Products, where the batch is not the axis that they sum over: by their edges, that of what these lead to.
_SUMMED = {
    "Mm": {0: 1, 1: 0},
    "Mv": {1: 0},
    "Addmm": {1: 1, 2: 0},
    "SparseAddmm": {2: 0},
    "Bmm": {0: 2, 1: 1},
    "Baddbmm": {1: 2, 2: 1},
}
# Sums between offsets, where the batch is not in what they add up.
_OFFSETS = ("EmbeddingBag", "SegmentReduce")
# Nodes without a number that stand for no operation: a layer's beginning and end, hooks, and in-place writes.
_BARE = ("CaptureBackward", "BackwardHookFunctionBackward", "CopySlices", "TanhBackwardBackward0")


def is_steady(graph: Graph, node: int, found: Found, scattered: Collection[int]) -> bool:
    """Whether a node with the batch here keeps its elements apart with any other numbers in the same shapes.

    What is not known to do so may have met an identity, a mask without effect, or a gate that was closed.

    Args:
        graph: the node's.
        node: its number.
        found: where the batch is.
        scattered: the nodes where it is somewhere, in no regular order.
    """
    if graph.names[node] in _BARE:
        return True
    if all(layout is None for layout in found[node]):
        # A gradient that mixes the batch can have left it apart in what it goes on to only by coming there as zero.
        return node in scattered or not _sides(graph, node, found)
    match = re.fullmatch(r"(\w+)Backward\d+", graph.names[node])
    name = match[1] if match else ""
    if name in _ANYWHERE:
        return True
    sides = _sides(graph, node, found)
    if name in _BETWEEN_SIDES:
        own = layout_of(found, node, 0)
        return own is None or all(
            _from_last(own, graph, node, 0) == _from_last(layout, graph, child, index)
            for layout, child, index, _ in sides
        )
    if name in _ALONG:
        dims = getattr(graph.nodes[node], "_saved_dim", None)
        along = dims if isinstance(dims, tuple) else (dims,)
        return None not in along and not any(
            layout.dim == axis_of(dim, len(graph.shape(child, index)))
            for layout, child, index, _ in sides
            for dim in along
        )
    if name in _SUMMED:
        return not any(layout.dim == _SUMMED[name].get(k) for layout, _, _, k in sides)
    if name in _OFFSETS:
        return all(k != 0 for *_, k in sides)
    return name in _FIRST and all(layout.dim == 0 for layout, *_ in sides)


def _sides(graph: Graph, node: int, found: Found) -> list[tuple[Layout, int, int, int]]:
    """What of a node's inputs has the batch: where, of which node and output, at which edge."""
    sides = []
    for k, (child, index) in enumerate(zip(graph.edges[node], graph.indices[node], strict=True)):
        layout = layout_of(found, child, index)
        if layout is not None:
            sides.append((layout, child, index, k))
    return sides


def _from_last(layout: Layout, graph: Graph, node: int, output: int) -> int:
    return layout.dim - len(graph.shape(node, output))
