"""The seam: what autograd saves in a region is dropped, and recollected when backward asks for it.

Autograd has one interface between forward and backward, the tensors that it saves
(:class:`torch.autograd.graph.saved_tensors_hooks`). A *frame* is a region of the forward pass whose saved tensors are
not kept. Each is replaced by a token; the first token that backward unpacks makes the frame *rebuild*: it gets its
inputs from its *source*, runs the region again under the conditions of the forward, and hands out what autograd saved
the first time. What ran, and what it read and wrote, is observed in the forward; what is handed out is compared with
the forward's by fingerprints.

========== =================================== ============================================
source     the inputs come from                memory
========== =================================== ============================================
Kept       kept inputs: a checkpoint           one input per frame
Inverse    the function's inverse              one output for a whole chain of frames
coupling   subtraction of the blocks' outputs  the same, and one evaluation of each block
Previous   the frame before, run again         one input for frames in a row
Offload    copies in host memory or in files   host memory, disk
========== =================================== ============================================

Frames pull and nobody pushes: a stage whose output is the next stage's input keeps a link instead of the tensor.
No storage is resized behind a caller's back, except inside :func:`eager_release`, where that is asked for.
"""

from recollect._verdicts import settle
from recollect.frames._bits import bits_of
from recollect.frames._certificate import Certificate, Mark, certificate_of_process
from recollect.frames._checkpoint import checkpoint, checkpoint_sequential
from recollect.frames._drift import DRIFT_THRESHOLD, DriftGauge
from recollect.frames._eager import eager_release
from recollect.frames._errors import (
    DriftWarning,
    FrameError,
    GraphFreedError,
    InPlaceError,
    LatticeError,
    RebuildError,
    ReleasedTensorError,
)
from recollect.frames._forward import Forward, Own
from recollect.frames._frame import devices_of, run_frame
from recollect.frames._lattice import Lattice, check_exact, digits_of
from recollect.frames._modes import backward_mode, dry_mode, frames_apply, in_backward, in_dry_mode, keep_everything
from recollect.frames._random import RandomState
from recollect.frames._transform import Add, Transform
from recollect.frames._trial import Others, gradients_of, trial
from recollect.frames.sources._coupling import couple, couple_by, uncouple, uncouple_by
from recollect.frames.sources._inverse import Inverse, run_invertible
from recollect.frames.sources._kept import Kept
from recollect.frames.sources._noted import check_noted, noted
from recollect.frames.sources._offload import Offload, OffloadError
from recollect.frames.sources._previous import Previous
from recollect.frames.sources._source import Arguments, Held, Source

__all__ = [
    "DRIFT_THRESHOLD",
    "Add",
    "Arguments",
    "Certificate",
    "DriftGauge",
    "DriftWarning",
    "Forward",
    "FrameError",
    "GraphFreedError",
    "Held",
    "InPlaceError",
    "Inverse",
    "Kept",
    "Lattice",
    "LatticeError",
    "Mark",
    "Offload",
    "OffloadError",
    "Others",
    "Own",
    "Previous",
    "RandomState",
    "RebuildError",
    "ReleasedTensorError",
    "Source",
    "Transform",
    "backward_mode",
    "bits_of",
    "certificate_of_process",
    "check_exact",
    "check_noted",
    "checkpoint",
    "checkpoint_sequential",
    "couple",
    "couple_by",
    "devices_of",
    "digits_of",
    "dry_mode",
    "eager_release",
    "frames_apply",
    "gradients_of",
    "in_backward",
    "in_dry_mode",
    "keep_everything",
    "noted",
    "run_frame",
    "run_invertible",
    "settle",
    "trial",
    "uncouple",
    "uncouple_by",
]
