"""What is shared between the processes of ``torch.distributed``: which rows each rank owns, and how others get them."""

from torch import distributed

from recollect.distributed._group import SharesError
from recollect.distributed._ranks import Ranks
from recollect.distributed._routes import Coming as Coming
from recollect.distributed._shares import Shares

if distributed.is_available():
    # The module has the default group of its time in arguments: imported behind init_process_group, as torch's
    # optimizers do, it keeps the group until the interpreter ends, which then ends by a signal. Here there is none yet.
    import torch.distributed.nn  # noqa: F401

__all__ = ["Ranks", "Shares", "SharesError"]
