"""The seam: what autograd saves in a region is dropped, and recollected when backward asks for it.

Autograd has one interface between forward and backward, the tensors that it saves
(:class:`torch.autograd.graph.saved_tensors_hooks`). A *frame* is a region of the forward pass whose saved tensors are
not kept. Each is replaced by a token; the first token that backward unpacks makes the frame *rebuild*: it gets its
inputs from its *source*, runs the region again under the conditions of the forward, and hands out what autograd saved
the first time.

========== =================================== ============================================
source     the inputs come from                memory
========== =================================== ============================================
checkpoint kept inputs                         one input per frame
inverse    the function's inverse              one output for a whole chain of frames
coupling   subtraction of the blocks' outputs  the same, and one evaluation of each block
========== =================================== ============================================

Frames pull and nobody pushes: a stage whose output is the next stage's input keeps a link instead of the tensor.
No storage is resized behind a caller's back, except inside :func:`eager_release`, where that is asked for.
"""

from recollect.frames._certificate import Certificate
from recollect.frames._checkpoint import checkpoint, run_invertible
from recollect.frames._coupling import couple, couple_by, uncouple, uncouple_by
from recollect.frames._drift import DRIFT_THRESHOLD, DriftGauge
from recollect.frames._eager import eager_release
from recollect.frames._errors import (
    DriftWarning,
    FrameError,
    GraphFreedError,
    InPlaceError,
    RebuildError,
    ReleasedTensorError,
)
from recollect.frames._keep import devices_of
from recollect.frames._modes import backward_mode, dry_mode, frames_apply, in_backward, in_dry_mode
from recollect.frames._rng import RandomState
from recollect.frames._transform import Add, Transform

__all__ = [
    "DRIFT_THRESHOLD",
    "Add",
    "Certificate",
    "DriftGauge",
    "DriftWarning",
    "FrameError",
    "GraphFreedError",
    "InPlaceError",
    "RandomState",
    "RebuildError",
    "ReleasedTensorError",
    "Transform",
    "backward_mode",
    "checkpoint",
    "couple",
    "couple_by",
    "devices_of",
    "dry_mode",
    "eager_release",
    "frames_apply",
    "in_backward",
    "in_dry_mode",
    "run_invertible",
    "uncouple",
    "uncouple_by",
]
