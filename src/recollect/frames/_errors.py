"""What a frame says when a backward pass cannot be right."""

__all__ = [
    "DriftWarning",
    "FrameError",
    "GraphFreedError",
    "InPlaceError",
    "RebuildError",
    "ReleasedTensorError",
]


class FrameError(RuntimeError):
    """Base of every error that a frame raises."""


class RebuildError(FrameError):
    """A rebuild did not repeat the forward pass."""


class InPlaceError(FrameError):
    """A tensor that the backward pass needs was changed in place after the forward pass."""


class GraphFreedError(FrameError):
    """The graph behind a frame was freed by an earlier backward pass."""


class ReleasedTensorError(FrameError):
    """A tensor whose memory :func:`recollect.eager_release` gave back was read."""


class DriftWarning(UserWarning):
    """What a chain reconstructed differs from what the forward pass saw by more than the threshold."""
