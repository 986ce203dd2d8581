"""Train networks whose depth, graph or objectives have outgrown memory: what backward needs is kept or recollected."""

from recollect.frames import backward_mode, checkpoint, dry_mode, eager_release, in_backward, in_dry_mode

__version__ = "0.1.0"

__all__ = ["backward_mode", "checkpoint", "dry_mode", "eager_release", "in_backward", "in_dry_mode"]
