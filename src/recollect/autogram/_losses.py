"""What an engine is asked about: losses, and how they are weighted."""

from __future__ import annotations

from torch import Tensor

from recollect.autogram._choice import BatchDim

__all__ = ["check_weighting", "check_weights", "checked_dim"]


def checked_dim(output: Tensor, batch_dim: BatchDim) -> BatchDim:
    """Return the batch dimension of losses, counted from the first one, or raise if they have no Gramian."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        found = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"output must be a tensor of a floating-point type, and is {found}")
    if not output.requires_grad:
        raise ValueError(
            "output has no graph: nothing that it was computed from requires a gradient, or it was computed under "
            "no_grad or detached"
        )
    if batch_dim is None or batch_dim == "auto":
        return batch_dim
    if not -output.dim() <= batch_dim < output.dim():
        raise ValueError(
            f"batch_dim is {batch_dim}, and output has the shape {list(output.shape)}; compute the Gramian of losses "
            "that have the batch dimension (reduction='none'), or leave batch_dim out"
        )
    return batch_dim % output.dim()


def check_weighting(weighting: object) -> None:
    """Raise if this is nothing to call with a Gramian."""
    if isinstance(weighting, type) or not callable(weighting):
        found = f"the class {weighting.__name__}" if isinstance(weighting, type) else repr(weighting)
        raise TypeError(f"weighting must be an object that can be called, such as UPGradWeighting() (got {found})")


def check_weights(weights: object, losses: Tensor) -> None:
    """Raise if what a weighting returned is not one weight for each loss."""
    if not isinstance(weights, Tensor):
        raise TypeError(
            f"the weighting returned {type(weights).__name__}; it must return a tensor of one weight for each loss, of "
            f"shape {list(losses.shape)}"
        )
    if weights.shape != losses.shape:
        raise ValueError(
            f"the weighting returned weights of shape {list(weights.shape)} for losses of shape {list(losses.shape)}; "
            "it must return one weight for each loss"
        )
